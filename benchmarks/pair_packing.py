"""Unified-IO 2's packing, to be measured against: at most two examples a row, from a small pool.

Written from a description of the released code (github.com/allenai/unified-io-2) and held against
a stream of pairs that it made; see tests/data/test_pair_packing.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Sizes(NamedTuple):
    """What an example takes: encoder tokens and decoder tokens."""

    inputs: int
    targets: int


def pairs(examples: Iterable[Sizes], limits: Sizes = Sizes(864, 1280), pool_size: int = 10
          ) -> Iterator[tuple[int, ...]]:
    """Yields the rows of a stream: the numbers of the one or two examples in each.

    An example goes with the longest of the pool (both sides counted, the oldest of equals) that
    it fits beside. If there is none it joins the pool; if that is full, the longer of it and the
    pool's longest gets a row of its own. What is in the pool at the end is dropped.

    Args:
        examples: their sizes, in order.
        limits: tokens of a row.
        pool_size: examples that wait for a partner.
    """
    pool: list[tuple[int, Sizes]] = []

    def length(entry: tuple[int, Sizes]) -> int:
        return sum(entry[1])

    for number, sizes in enumerate(examples):
        fitting = [entry for entry in pool if entry[1].inputs + sizes.inputs <= limits.inputs
                   and entry[1].targets + sizes.targets <= limits.targets]
        if fitting:
            partner = max(fitting, key=length)  # of equals the first, which waits longest
            pool.remove(partner)
            yield number, partner[0]
        elif len(pool) < pool_size:
            pool.append((number, sizes))
        else:
            longest = max(pool, key=length)
            if length(longest) > sum(sizes):
                pool.remove(longest)
                pool.append((number, sizes))
                yield (longest[0],)
            else:
                yield (number,)
