"""What is known of one compiled step, and the folder in which it is remembered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vishwam_t5x.planning.collectives import Collective
from vishwam_t5x.planning.targets import Target

VERSION = 4
"""Raised when a field changes its meaning or is read off otherwise: what was remembered is then
forgotten.
"""

TIGHT = 0.9
"""Share of the limit above which a program that fits may yet fail: planned bytes have been off by a
tenth, and what else lives on a device is a guess.
"""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes on one device.

    Attributes:
        parameters: this device's share, in the dtype they are stored in.
        optimizer: its share of the optimizer's state, loss scale and counters included.
        batch: its rows.
        activations: of `temporary`, what the forward pass keeps for the backward pass; worked out
            from shapes.
        temporaries: the rest of `temporary`: gradients, gathered parameters, work space.
        temporary: what the compiled program asks for besides its arguments and results, in bytes.
        total: everything, as the compiler has it.
    """

    parameters: int
    optimizer: int
    batch: int
    activations: int
    temporaries: int
    temporary: int
    total: int


@dataclasses.dataclass(frozen=True)
class Figures:
    """One step of one recipe on one target.

    Attributes:
        target: its name.
        program: SHA-256 of the traced program.
        compiled: whether the compiler found room for it.
        fits: whether a device holds it.
        limit_bytes: what a device's programs may use.
        bytes: per device; where the compiler gave up, `total` is what it said it would need.
        flops: of the whole step on full rows, all devices, nothing counted twice.
        traffic_bytes: read and written in one device's memory in a step; None if not compiled.
        loops_known: False where a loop does not say how often it turns; it then counts one turn.
        collectives: messages of one device in a step.
        mesh: devices by mesh axis.
        remat: remat policy.
        microbatches: parts of a batch.
        precision: name of the compute dtype.
        batch_size: rows.
        trace_seconds, compile_seconds: what it took to find out.
    """

    target: str
    program: str
    compiled: bool
    fits: bool
    limit_bytes: int
    bytes: Bytes
    flops: float
    traffic_bytes: int | None
    loops_known: bool
    collectives: tuple[Collective, ...]
    mesh: dict[str, int]
    remat: str
    microbatches: int
    precision: str
    batch_size: int
    trace_seconds: float
    compile_seconds: float

    @property
    def tight(self) -> bool:
        """Whether it fits by so little that it may not."""
        return self.fits and self.bytes.total > TIGHT * self.limit_bytes

    def judged(self, target: Target) -> Figures:
        """Returns the same with the verdict that the target's memory, as now known, allows."""
        limit = target.limit_bytes
        # A TPU's compiler knows the limit better than a sum of bytes does.
        fits = self.compiled and (target.platform == "tpu" or self.bytes.total <= limit)
        return dataclasses.replace(self, fits=fits, limit_bytes=limit)

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Figures:
        """The inverse of `to_json`."""
        return cls(**{**values, "bytes": Bytes(**values["bytes"]), "collectives": tuple(
            Collective(**{**one, "torus": tuple(one["torus"])})
            for one in values["collectives"])})


class Cache:
    """Figures by what was compiled for what, by which compiler: one small file each."""

    def __init__(self, directory: str | os.PathLike | None = None) -> None:
        """`directory`: None for ~/.cache/vishwam_t5x/plans."""
        self._folder = pathlib.Path(directory or "~/.cache/vishwam_t5x/plans").expanduser()

    @staticmethod
    def key(*parts: object) -> str:
        """Returns the name of an entry: a hash of what it depends on."""
        return hashlib.sha256(json.dumps([VERSION, *map(str, parts)]).encode()).hexdigest()

    def get(self, key: str) -> Figures | None:
        """Returns what is remembered under `key`, or None."""
        try:
            return Figures.from_json(json.loads((self._folder / f"{key}.json").read_text()))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, key: str, figures: Figures) -> None:
        """Remembers; a folder that cannot be written is left alone."""
        path = self._folder / f"{key}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(figures.to_json()))
            os.replace(temporary, path)
        except OSError:
            return
