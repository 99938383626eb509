"""Stacked layers as arrays of their own, for layouts and programs that know no stacks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vishwam_t5x.checkpointing.convert.report import Slices, read_part
from vishwam_t5x.checkpointing.convert.stores import dtype_named
from vishwam_t5x.checkpointing.layers import LAYER_AXIS
from vishwam_t5x.checkpointing.manifest import Leaf
from vishwam_t5x.checkpointing.sources import Request, Source, place
from vishwam_t5x.core.errors import UserError

_STACKED = re.compile(
    r"(?P<tree>params/|opt_state/(?:\d+/)*param_states/)"
    r"(?P<stack>encoder|decoder)/(?P=stack)/(?P<rest>.+)")
_PARAMS = "params/"
_MOMENTS = ("m", "v", "v_row", "v_col")
_UNUSED = (1,)  # shape of a moment that Adafactor does not keep of a parameter
_HELD_BYTES = 4 * 2**30  # of a stack that is read once for all of its layers


def has_stacks(leaves: Mapping[str, Leaf]) -> bool:
    """Whether there are parameters of stacked layers among these arrays."""
    return any((match := _STACKED.fullmatch(name)) and match["tree"] == _PARAMS
               and len(leaf.shape) > LAYER_AXIS for name, leaf in leaves.items())


class Unrolled:
    """A source with 'params/encoder/layers_3/…' for the fourth layer of 'params/encoder/encoder/…',
    and so of Adafactor's moments.

    One stack is held in memory at a time, if it has no more than 4 GiB: read in the order of
    `leaves`, each is read once.

    Attributes:
        source: where the arrays are.
        made: name -> its name in `source`, and which layer it is of a stack, or None.
    """

    def __init__(self, source: Source, moments: bool = True) -> None:
        """Finds the layers of every stack.

        Args:
            source: where the arrays are.
            moments: take apart the stacks of Adafactor's moments, too.

        Raises:
            UserError: the shapes of Adafactor's moments do not tell which axis counts layers.
        """
        self.source = source
        self.made: dict[str, tuple[str, int | None]] = {}
        self._leaves: dict[str, Leaf] = {}
        self._axes: dict[str, int | None] = {}
        self._held: tuple[str, np.ndarray] | None = None
        for name, leaf in source.leaves.items():
            match = _STACKED.fullmatch(name)
            found = match and (moments or match["tree"] == _PARAMS) and _layers_of(
                match, name, source.leaves)
            if not match or not found:
                self.made[name], self._leaves[name] = (name, None), leaf
                continue
            count, axis = found
            self._axes[name] = axis
            single = leaf.shape if axis is None else leaf.shape[:axis] + leaf.shape[axis + 1:]
            for number in range(count):
                layer = f"{match['tree']}{match['stack']}/layers_{number}/{match['rest']}"
                self.made[layer], self._leaves[layer] = (name, number), Leaf(single, leaf.dtype)

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return self._leaves

    def own(self, names: Mapping[str, str]) -> dict[str, str]:
        """Returns what each array is called where it comes from.

        Args:
            names: name in `source` -> what that is called there.
        """
        return {name: names[own] + ("" if number is None else f" [{number}]")
                for name, (own, number) in self.made.items() if own in names}

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`."""
        return {name: place(self.read_part(name, tuple(
            slice(0, length) for length in self._leaves[name].shape)).astype(request.dtype),
            request.sharding) for name, request in requests.items()}

    def read_part(self, name: str, part: Slices) -> np.ndarray:
        """See `PartSource.read_part`."""
        own, number = self.made[name]
        axis = None if number is None else self._axes[own]
        if number is None or axis is None:
            return read_part(self.source, own, part)
        own_part = (*part[:axis], slice(number, number + 1), *part[axis:])
        leaf = self.source.leaves[own]
        if math.prod(leaf.shape) * dtype_named(leaf.dtype).itemsize > _HELD_BYTES:
            return read_part(self.source, own, own_part).squeeze(axis)
        if self._held is None or self._held[0] != own:
            self._held = None  # before the next is read
            self._held = own, np.asarray(read_part(
                self.source, own, tuple(slice(0, length) for length in leaf.shape)))
        return self._held[1][own_part].squeeze(axis)


def _layers_of(match: re.Match, name: str, leaves: Mapping[str, Leaf]
               ) -> tuple[int, int | None] | None:
    """How many layers a stacked array has, and on which axis, None: all have the same; or None of
    an array that has none.
    """
    shape = leaves[name].shape
    if match["tree"] == _PARAMS:
        return (shape[LAYER_AXIS], LAYER_AXIS) if len(shape) > LAYER_AXIS else None
    rest, _, moment = match["rest"].rpartition("/")
    param = leaves.get(f"params/{match['stack']}/{match['stack']}/{rest}")
    if moment not in _MOMENTS:
        return None
    if param is None or len(param.shape) <= LAYER_AXIS:
        raise UserError("this moment is of a stack of layers that is not there", got=name,
                        fix="--drop the moments of what is dropped, too: --drop='opt_state/.*'")
    count = param.shape[LAYER_AXIS]
    if shape == _UNUSED:
        return count, None
    if moment in ("m", "v"):
        return count, LAYER_AXIS
    beside = name.removesuffix(moment) + ("v_col" if moment == "v_row" else "v_row")
    axes = _axes_of_means(param.shape, shape, leaves[beside].shape if beside in leaves else ())
    if len(axes) != 1:
        raise UserError("the axis that counts layers cannot be told from the shape of a moment",
                        got=f"{name} {shape}, of a parameter {param.shape}",
                        fix="--layers=stacked, or --drop='opt_state/.*'")
    return count, axes.pop()


def _axes_of_means(param: tuple[int, ...], own: tuple[int, ...], beside: tuple[int, ...]
                   ) -> set[int]:
    """On which axes of `own` the layers may lie, where it and `beside` have each lost what the
    other has kept of a parameter's axes, the layers' aside.
    """
    others = [axis for axis in range(len(param)) if axis != LAYER_AXIS]
    axes = set()
    for kept in range(1, 2**len(others) - 1):
        mine = {axis for place, axis in enumerate(others) if kept >> place & 1} | {LAYER_AXIS}
        theirs = set(others) - mine | {LAYER_AXIS}
        if (tuple(param[axis] for axis in sorted(mine)) == own
                and tuple(param[axis] for axis in sorted(theirs)) == beside):
            axes.add(sorted(mine).index(LAYER_AXIS))
    return axes
