"""What became of each array of a conversion, and how arrays are read in parts.

A reader of another layout is a `Source` whose leaves have our names. One that can read a part of an
array without the rest has `read_part` as well (`PartSource`): then arrays larger than memory pass.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from vishwam_t5x.checkpointing.sources import Request, Source
from vishwam_t5x.core.errors import UserError

PART_BYTES = 64 * 2**20
"""How much of an array is read at a time."""
_LAYER = re.compile(r"layers_\d+|(?<=\.block\.)\d+|(?<= \[)\d+(?=\] -> )")
_MOMENT = re.compile(r"/(?:m|v|v_row|v_col)(?= ->|$)")

Slices = tuple[slice, ...]


@runtime_checkable
class PartSource(Protocol):
    """A `Source` that reads parts of arrays."""

    def read_part(self, name: str, part: Slices) -> np.ndarray:
        """Reads one part of one array, in the dtype it is stored in.

        Args:
            name: a name of `leaves`.
            part: a slice with both ends for each axis.
        """


def read_part(source: Source, name: str, part: Slices) -> np.ndarray:
    """Reads a part of an array from any source; of one that knows no parts, by reading it all."""
    if isinstance(source, PartSource):
        return source.read_part(name, part)
    whole = source.read({name: Request(np.dtype(source.leaves[name].dtype), None)})[name]
    return np.asarray(whole)[part]


def parts_of(shape: Sequence[int], itemsize: int, most: int = PART_BYTES,
             grid: Sequence[int] | None = None) -> Iterator[Slices]:
    """Cuts an array into parts of at most `most` bytes, where the grid allows.

    Args:
        shape: of the array.
        itemsize: bytes of a number.
        most: bytes of a part.
        grid: sizes that parts are whole multiples of, e.g. those of the chunks it is written in.
    """
    grid = tuple(grid) if grid is not None else (1,) * len(shape)
    size = list(shape)
    # The first axes are cut first: what is left of a row lies together in most files.
    for axis, step in enumerate(grid):
        rest = int(np.prod(size, dtype=np.int64)) // max(1, size[axis]) * itemsize
        fitting = max(1, most // max(1, rest))
        size[axis] = min(size[axis], max(step, fitting // step * step))
    # An empty array has one part, which is empty.
    starts = [range(0, max(1, length), max(1, part))
              for length, part in zip(shape, size, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(first, min(first + part, length))
                    for first, part, length in zip(corner, size, shape, strict=True))


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What became of each array.

    Attributes:
        source: what was read.
        target: what was written.
        matched: (name in the source, name in the target) of each array written.
        missing: names that the target's layout wants and the source has not.
        extra: arrays of the source that have no place in the target: left out by name.
        bookkeeping: arrays of the source that mean nothing outside of it, left out.
        fresh: arrays of the target that were not in the source, and began anew.
        note: anything else to be said, or ''.
    """

    source: str
    target: str
    matched: tuple[tuple[str, str], ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    bookkeeping: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Returns the report as lines of text: counts first, then names, of layers together."""
        rows = (("matched", [old if old == new else f"{old} -> {new}"
                             for old, new in self.matched]),
                ("missing in the source", self.missing),
                ("extra in the source, dropped as asked", self.extra),
                ("of the run alone, not carried over", self.bookkeeping),
                ("not in the source, begun anew", self.fresh))
        lines = [f"{self.source} -> {self.target}"]
        lines += [f"  {len(names):>6} {what}" for what, names in rows if names or what in (
            "matched", "missing in the source", "extra in the source, dropped as asked")]
        for what, names in rows:
            if names:
                lines += [f"  {what}:", *(f"    {line}" for line in _together(names))]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def _together(names: Sequence[str]) -> list[str]:
    """One line for what differs in the layer's number, or in the moment, alone."""
    groups = collections.Counter(
        _MOMENT.sub("/{m,v,v_row,v_col}", _LAYER.sub("layers_*", name)) for name in names)
    return [f"{name}  ({count})" if count > 1 else name for name, count in groups.items()]


def compiled(drop: Sequence[str]) -> list[re.Pattern]:
    """Returns the regular expressions of what may be lost; `UserError` if one is none."""
    patterns = []
    for pattern in drop:
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise UserError("--drop is not a regular expression",
                            got=f"{pattern!r}: {error}") from error
    return patterns


def named(patterns: Sequence[re.Pattern], *spellings: str) -> bool:
    """Returns whether a pattern matches the whole of an array's name, in one of its spellings."""
    return any(pattern.fullmatch(name) for pattern in patterns for name in spellings)
