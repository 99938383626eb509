"""Figures as one screen of text, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vishwam_t5x.planning.figures import Figures
from vishwam_t5x.planning.gpu_description import PREALLOCATED
from vishwam_t5x.planning.remedies import Remedy
from vishwam_t5x.planning.roofline import Estimate, estimate, message_seconds
from vishwam_t5x.planning.search import Found
from vishwam_t5x.planning.targets import Target

MOST_COLLECTIVES = 8


def size(count: float) -> str:
    """Returns bytes in three digits: '12.3 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 999.5:
            return f"{_three_digits(count)} {unit}"
        count /= 1024
    return f"{_three_digits(count)} GiB"


def duration(seconds: float) -> str:
    """Returns seconds in three digits: '41.2 ms'."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 0.9995:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e6)} us"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def describe(figures: Figures) -> str:
    """Returns mesh, remat and microbatches on one line."""
    axes = [f"{axis} {count}" for axis, count in figures.mesh.items() if count > 1]
    parts = f"{figures.microbatches} microbatch{'es' if figures.microbatches > 1 else ''}"
    return f"{' x '.join(axes) or 'not split'}, remat {figures.remat}, {parts}"


def page(figures: Figures, target: Target, remedies: Sequence[Remedy] = ()) -> str:
    """Returns the answer for one program."""
    lines = [_headline(target), "", f"  {describe(figures)}, {figures.precision}, batch of "
             f"{figures.batch_size} rows", f"  {_verdict(figures)}", ""]
    lines += _memory(figures)
    lines += ["", f"  FLOPs of a step        {figures.flops:.3g}, all devices, on full rows"]
    if figures.traffic_bytes is not None:
        lines += _messages(figures, target)
    lines += _time(estimate(figures, target))
    lines += [f"  note: {note}" for note in notes(figures, target)]
    return "\n".join(lines + _advice(remedies))


def _advice(remedies: Sequence[Remedy]) -> list[str]:
    if not remedies:
        return []
    lines = ["", "  what would help, the cheapest first (bytes are predicted):"]
    for number, one in enumerate(remedies, 1):
        fits = "should fit" if one.fits else "not enough by itself"
        lines.append(f"    {number}. {size(one.total)} a device, {fits}: {one.cost}")
        lines += [f"         {line}" for line in one.lines]
    return lines


def search_page(found: Sequence[Found], target: Target, recipe_lines: Sequence[str],
                remedies: Sequence[Remedy] = ()) -> str:
    """Returns the ranking of a search.

    Args:
        found: of `search.search`.
        target: what for.
        recipe_lines: gin lines of the best one.
        remedies: what else would help, where nothing fits.
    """
    ranked = "by the time if nothing overlaps" if target.hardware else "by what was predicted"
    lines = [_headline(target), f"  those that fit first, {ranked}", "",
             f"  {'':3}{'at best':>9}  {'no overlap':>10}  {'MFU':>6}  {'a device':>9}  "
             f"{'predicted':>9}  choice"]
    for number, one in enumerate(found, 1):
        best = estimate(one.figures, target)
        times = [duration(value) if value is not None else "-" for value in (best.best, best.worst)]
        share = f"{100 * best.mfu:.1f}%" if best.mfu is not None else "-"
        fits = "  tight" if one.figures.tight else "" if one.figures.fits else "  does not fit"
        lines.append(f"  {number:<3}{times[0]:>9}  {times[1]:>10}  {share:>6}  "
                     f"{size(one.figures.bytes.total):>9}  {size(one.predicted.total):>9}  "
                     f"{describe(one.figures)}{fits}")
    if found and found[0].figures.fits:
        lines += ["", "  paste at the end of your recipe:", ""] + [f"    {x}" for x in recipe_lines]
    else:
        lines += ["", "  nothing that was compiled fits: a smaller model, or more devices"]
        lines += _advice(remedies)
    return "\n".join(lines)


def notes(figures: Figures, target: Target) -> list[str]:
    """Returns what a reader must know to trust the figures."""
    found = []
    capability = target.compute_capability
    if capability is not None:
        if float(capability) < 8 and figures.precision == "bfloat16":
            found.append("this GPU has no bfloat16 matmuls: PRECISION = 'float16'")
        assert target.hardware is not None
        if figures.fits and figures.bytes.total > PREALLOCATED * target.hardware.hbm_bytes:
            found.append("jax takes three quarters of a GPU unless told otherwise: "
                         "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")
    if target.hardware is None:
        found.append("no roofline for CPUs: their memory's speed is not on a data sheet")
    if target.platform == "tpu" and figures.precision == "float16":
        found.append("TPUs multiply bfloat16: PRECISION = 'bfloat16' needs no loss scale")
    if not figures.loops_known:
        found.append("a loop does not say how often it turns: memory's time and messages marked * "
                     "count one turn")
    if any(one.axes == "unknown" for one in figures.collectives):
        found.append("some messages follow no mesh axis: they count as among all devices")
    return found


def to_json(figures: Figures, target: Target, remedies: Sequence[Remedy] = ()) -> dict[str, Any]:
    """Returns everything `page` says, and more digits."""
    return {**figures.to_json(), "tight": figures.tight, "devices": target.num_devices,
            "hosts": target.hosts,
            "estimate": dataclasses.asdict(estimate(figures, target)),
            "remedies": [dataclasses.asdict(one) for one in remedies],
            "notes": notes(figures, target)}


def search_json(found: Sequence[Found], target: Target, remedies: Sequence[Remedy] = ()
                ) -> dict[str, Any]:
    """Returns the ranking of a search, and remedies where nothing fits."""
    return {"target": target.name, "remedies": [dataclasses.asdict(one) for one in remedies],
            "ranking": [
        {**to_json(one.figures, target), "predicted_bytes": one.predicted.total,
         "gin": one.choice.gin_lines()} for one in found]}


def _headline(target: Target) -> str:
    kind = "CPU device" if target.hardware is None else target.hardware.name
    hosts = f", {target.hosts} hosts" if target.hosts > 1 else ""
    return (f"{target.name}: {target.num_devices} x {kind}, {size(target.limit_bytes)} usable "
            f"each{hosts}")


def _verdict(figures: Figures) -> str:
    total, limit = figures.bytes.total, figures.limit_bytes
    if figures.fits:
        held = f"{size(total)} of {size(limit)} a device ({100 * total / limit:.0f} %)"
        return f"TIGHT: {held}; it may run out of memory all the same" if figures.tight else \
            f"FITS: {held}"
    short = f", {size(total - limit)} too much" if total > limit else ""
    return f"DOES NOT FIT: {size(total)} of {size(limit)} a device{short}"


def _memory(figures: Figures) -> list[str]:
    held = figures.bytes
    rows = [("parameters", held.parameters), ("optimizer state", held.optimizer),
            ("batch", held.batch), ("activations", held.activations),
            ("temporaries", held.temporaries)]
    said = {"activations": "  kept for the backward pass, by their shapes",
            "temporaries": "  gradients, gathered parameters, work space"}
    return [f"  {name:22} {size(count):>9}{said.get(name, '')}" for name, count in rows]


def _messages(figures: Figures, target: Target) -> list[str]:
    if not figures.collectives:
        return ["  messages               none"]
    lines = ["", f"  {'messages of a step':22} {'axis':12} {'count':>6} {'put in':>9} {'sent':>9}"
             + ("   at link speed" if target.hardware else "")]
    for one in figures.collectives[:MOST_COLLECTIVES]:
        mark = "" if one.loops_known else "*"
        took = f"   {duration(message_seconds(one, target)):>9}" if target.hardware else ""
        lines.append(f"    {one.kind:20} {one.axes:12} {one.count:>5}{mark or ' '} "
                     f"{size(one.operand_bytes):>9} {size(one.sent_bytes):>9}{took}")
    if left := len(figures.collectives) - MOST_COLLECTIVES:
        lines += [f"    and {left} smaller kinds (--json lists them)"] if left > 0 else []
    return lines


def _time(best: Estimate) -> list[str]:
    if best.best is None or best.compute is None:
        return [""]
    share = f", MFU {100 * best.mfu:.1f} %" if best.mfu is not None else ""
    if best.memory is None or best.messages is None or best.worst is None:
        return ["", f"  step time by roofline  compute {duration(best.compute)}{share} if that "
                "were all; the rest is not known"]
    return ["", f"  step time by roofline  compute {duration(best.compute)}, memory "
            f"{duration(best.memory)}, messages {duration(best.messages)}",
            f"    at best              {duration(best.best)}, bound by {best.bound}{share}",
            f"    if nothing overlaps  {duration(best.worst)}"]
