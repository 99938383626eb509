"""How long a step takes by data sheets: by arithmetic, by memory, by messages."""

from __future__ import annotations

import dataclasses

from vishwam_t5x.core.flops import mfu
from vishwam_t5x.planning.collectives import Collective
from vishwam_t5x.planning.figures import Figures
from vishwam_t5x.planning.targets import Target

RECOMPUTED = {"none": 0.0, "dots": 0.0, "minimal": 0.05, "offload": 0.1, "save_names": 0.2,
              "full": 1 / 3}
"""Share of a step's FLOPs that a remat policy does again: for 'full' a forward pass, for the others
the part of one that attention weights and projections commonly are."""

HOP_SECONDS = {"tpu": 1e-6, "gpu": 5e-6, "cpu": 0.0}
"""What each step of a ring costs beside its bytes: a guess."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step if one thing alone were the limit; None where no figure is known.

    No bounds in the strict sense: what stays in a cache between two uses counts as read twice, and
    hops are a guess.

    Attributes:
        compute: matmuls at the data sheet's peak, those done twice included.
        memory: bytes moved at the data sheet's bandwidth.
        messages: bytes sent over the links, and hops.
        best: all that is known of the three overlaps.
        worst: nothing overlaps.
        bound: what limits `best`: 'compute', 'memory' or 'messages'.
        mfu: share of the peak at `best`; None where there is no peak.
    """

    compute: float | None
    memory: float | None
    messages: float | None
    best: float | None
    worst: float | None
    bound: str | None
    mfu: float | None


def estimate(figures: Figures, target: Target) -> Estimate:
    """Returns the estimate; all None for a CPU, of which no data sheet is known.

    Of a program for which the compiler found no room only the arithmetic is known.
    """
    hardware = target.hardware
    if hardware is None:
        return Estimate(None, None, None, None, None, None, None)
    peak = hardware.matmul_peak(figures.precision)
    again = RECOMPUTED[figures.remat.partition(":")[0]]
    compute = figures.flops * (1 + again) / (target.num_devices * peak)
    if figures.traffic_bytes is None:
        return Estimate(compute, None, None, compute, None, "compute",
                        mfu(figures.flops, compute, target.num_devices, peak))
    parts = {
        "compute": compute,
        "memory": figures.traffic_bytes / hardware.hbm_bandwidth,
        "messages": sum(message_seconds(one, target) for one in figures.collectives)}
    best = max(parts.values())
    bound = max(parts, key=lambda name: parts[name])
    return Estimate(parts["compute"], parts["memory"], parts["messages"], best,
                    sum(parts.values()), bound,
                    mfu(figures.flops, best, target.num_devices, peak))


def message_seconds(one: Collective, target: Target) -> float:
    """Returns the seconds of all messages of a kind, one after the other.

    On a torus a group has the links of the dimensions that it spans; its ring turns along each of
    them in turn, so the hops grow with the sides of the torus and not with the devices.
    """
    assert target.hardware is not None
    bandwidth = target.hardware.link_bandwidth * link_share(one, target)
    dims = max(1, sum(places > 1 for places in one.torus))
    hops = dims * (one.group ** (1 / dims) - 1)
    turns = 2 if one.kind == "all-reduce" else 1
    latency = one.count * turns * max(1.0, hops) * HOP_SECONDS[target.platform]
    return one.sent_bytes / bandwidth + latency


def link_share(one: Collective, target: Target) -> float:
    """Returns the share of a device's link bandwidth that a group can use.

    Each dimension of the torus has an equal part, in two directions. A group has both of them only
    where it goes all the way round: along a line, what the far end needs comes in by one link. All
    of it where there is no torus, and between the two devices of one chip.
    """
    assert target.hardware is not None
    spanned = [(places == side and wraps) for places, side, wraps
               in zip(one.torus, target.torus, target.wraps, strict=False) if places > 1]
    if not spanned:
        return 1.0
    return sum(1.0 if closed else 0.5 for closed in spanned) / target.hardware.torus_dims
