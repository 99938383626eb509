"""A run on one page: its losses, where its time went, and the picture that it drew."""

from __future__ import annotations

import io
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.training import ledger
from vishwam_t5x.training.run_dir import RunDir
from vishwam_t5x.training.writers import read_records

_COLOURS = {"init": "#b0b0b0", "cache": "#795548", "compile": "#8c6bb1", "data_wait": "#e6772e",
            "step": "#2b8a3e", "host": "#1c7ed6", "eval": "#e0b000", "save": "#0b7285",
            "down": "#343a40", "lost": "#c92a2a"}
PICTURE = "reconstructions.png"
"""In the MODEL_DIR of a codec: held-out pictures above what comes back of them."""
_CURVES = re.compile(r"(eval/)?loss(/[^/]+)?")


def summary(run_dir: RunDir) -> str:
    """Returns the run in a few lines of text.

    Raises:
        UserError: the folder holds no run.
    """
    records, sessions = _read(run_dir)
    lines = [f"run: {run_dir.place}"]
    if records:
        last = {name: value for record in records for name, value in record.items()}
        losses = "  ".join(f"{name} {value:.4g}" for name, value in last.items()
                           if _CURVES.fullmatch(name) and isinstance(value, int | float))
        lines.append(f"step {max(record['step'] for record in records)}: {losses}")
    if sessions:
        times = ledger.goodput(sessions)
        lines.append(f"{len(sessions)} starts, {_clock(times['total'])} in all, "
                     f"goodput {100 * times['goodput']:.0f} %")
        lines += [f"  {name:<10} {_clock(seconds):>10}  {100 * seconds / times['total']:5.1f} %"
                  for name, seconds in _parts(times) if times["total"]]
        lines += [f"  steps {s.first_step} to {s.last_step}, {s.processes} processes, {s.devices} "
                  f"devices: {s.why[:90]}" + (f" ({s.lost_steps} steps taken again)"
                                              if s.lost_steps else "") for s in sessions[-10:]]
    return "\n".join(lines)


def draw(run_dir: RunDir, page: pathlib.Path) -> None:
    """Draws losses over steps, time by phase, and the sessions over the time of day; and below them
    `PICTURE`, where the run has one.

    Args:
        run_dir: of the run.
        page: the PNG file to write.

    Raises:
        UserError: the folder holds no run.
    """
    from matplotlib.figure import Figure

    records, sessions = _read(run_dir)
    picture = _picture(run_dir)
    heights = [5.0, 1.0, 2.0]
    if picture is not None:
        heights.append(8 * picture.shape[0] / picture.shape[1])  # as wide as the page
    figure = Figure(figsize=(11, 11 * sum(heights) / 8), layout="constrained")
    curves, shares, days, *last = figure.subplots(len(heights), 1, height_ratios=heights)
    figure.suptitle(run_dir.place.rstrip("/").rpartition("/")[2] or run_dir.place)
    names = sorted({name for record in records for name in record if _CURVES.fullmatch(name)})
    for name in names:
        points = [(record["step"], float(record[name])) for record in records
                  if record.get(name) is not None]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        curves.plot(*zip(*points, strict=True) if points else ([], []), label=name,
                    linestyle="--" if name.startswith("eval/") else "-",
                    marker="o" if len(points) < 10 else None, linewidth=1.2)
    curves.set(xlabel="step", ylabel="loss")
    curves.grid(alpha=0.3)
    if names:
        curves.legend(fontsize="small")
    times = ledger.goodput(sessions)
    left = 0.0
    for name, seconds in _parts(times):
        shares.barh([0], [seconds], left=left, color=_COLOURS[name],
                    label=f"{name} {_clock(seconds)}")
        left += seconds
    shares.set(yticks=[], xlabel="seconds", title=f"goodput {100 * times['goodput']:.0f} % of "
               f"{_clock(times['total'])}")
    if sessions:
        shares.legend(ncols=5, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.35))
    _draw_sessions(days, sessions)
    if picture is not None:
        last[0].imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        last[0].set_axis_off()
        last[0].set_title("held-out pictures, and below them what came back")
    page.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(page, dpi=110)


def _picture(run_dir: RunDir) -> np.ndarray | None:
    """Pixels [height, width] or [height, width, 3] of the run's picture; None if it has none."""
    from PIL import Image

    try:
        data = storage.read_bytes(storage.join(run_dir.place, PICTURE))
    except FileNotFoundError:
        return None
    return np.asarray(Image.open(io.BytesIO(data)))


def _draw_sessions(axes: Any, sessions: Sequence[ledger.Session]) -> None:
    origin = sessions[0].start - sessions[0].seconds.get("init", 0.0) if sessions else 0.0
    for row, session in enumerate(sessions):
        # Its first line was written when the first state was there.
        begin = session.start - session.seconds.get("init", 0.0) - origin
        for name in ledger.PHASES:
            seconds = session.seconds.get(name, 0.0)
            axes.barh([row], [seconds], left=begin, color=_COLOURS[name])
            begin += seconds
        axes.text(begin, row, f" {session.first_step}-{session.last_step}: {session.why}"[:44],
                  va="center", fontsize="x-small")
    axes.set(yticks=[], xlabel="seconds since the first start",
             title=f"{len(sessions)} starts: steps and how each ended")
    axes.invert_yaxis()
    axes.margins(x=0.25)


def _parts(times: dict[str, float]) -> list[tuple[str, float]]:
    """(name, seconds) of what the total is made of; work that was lost is no part of the steps."""
    parts = dict(times)
    parts["step"] = max(parts.get("step", 0.0) - parts.get("lost", 0.0), 0.0)
    return [(name, parts[name]) for name in _COLOURS if parts.get(name, 0.0) > 0]


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _read(run_dir: RunDir) -> tuple[list[dict[str, Any]], list[ledger.Session]]:
    records, sessions = read_records(run_dir.metrics), ledger.read(run_dir.ledger)
    if not records and not sessions:
        raise UserError("this folder holds no run", got=run_dir.place,
                        fix="give the MODEL_DIR of a run that has begun")
    return records, sessions
