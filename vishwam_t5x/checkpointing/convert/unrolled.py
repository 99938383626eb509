"""Stacked layers as arrays of their own, for layouts that know no stacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vishwam_t5x.checkpointing.convert.report import Slices, read_part
from vishwam_t5x.checkpointing.layers import LAYER_AXIS
from vishwam_t5x.checkpointing.manifest import Leaf
from vishwam_t5x.checkpointing.sources import Request, Source, place

_STACKED = re.compile(r"params/(encoder|decoder)/\1/(.+)")


class Unrolled:
    """A source with 'params/encoder/layers_3/…' for the fourth layer of 'params/encoder/encoder/…'.

    Attributes:
        source: where the arrays are.
        made: name -> its name in `source`, and which layer it is of a stack, or None.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.made: dict[str, tuple[str, int | None]] = {}
        self._leaves: dict[str, Leaf] = {}
        for name, leaf in source.leaves.items():
            match = _STACKED.fullmatch(name)
            if match is None or len(leaf.shape) <= LAYER_AXIS:
                self.made[name], self._leaves[name] = (name, None), leaf
                continue
            single = leaf.shape[:LAYER_AXIS] + leaf.shape[LAYER_AXIS + 1:]
            for number in range(leaf.shape[LAYER_AXIS]):
                layer = f"params/{match[1]}/layers_{number}/{match[2]}"
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
        if number is None:
            return read_part(self.source, own, part)
        layer = slice(number, number + 1)
        return read_part(self.source, own, (*part[:LAYER_AXIS], layer, *part[LAYER_AXIS:])
                         ).squeeze(LAYER_AXIS)
