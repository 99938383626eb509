"""What several processes answer together: each reads for itself, and all leave out the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax

from vishwam_t5x.core.coordination import exchange, process_name
from vishwam_t5x.core.distributed import refuse_together

_BLOCK = 64  # examples that processes read before they agree on them

Number = TypeVar("Number")
Found = TypeVar("Found")


class LeftOut(Exception):
    """One example cannot be used; the others are.

    Attributes:
        why: what is wrong with it.
        damaged: whether its record cannot be read.
    """

    def __init__(self, why: str, damaged: bool = False) -> None:
        self.why, self.damaged = why, damaged
        super().__init__(why)

    def __reduce__(self) -> tuple:
        return type(self), (self.why, self.damaged)


def read(what: str, numbers: Iterable[Number], one: Callable[[Number], Found]
         ) -> Iterator[tuple[Number, Found | LeftOut]]:
    """Yields each number with what `one` makes of it, or with why it is left out.

    Every process must go through it together: what one of them cannot read, all leave out, since
    a batch must be the same on all. Of several processes each reads some examples ahead.

    Args:
        what: is read, for messages.
        numbers: of the examples, the same on every process.
        one: reads one, or raises `LeftOut`.

    Raises:
        Exception: on every process, what else `one`, or going through `numbers`, raised on any.
    """
    ahead = 1 if jax.process_count() == 1 else _BLOCK
    waiting = iter(numbers)
    while True:
        block: list[Number] = []
        found: list[Found | LeftOut] = []

        def read_block(block: list[Number] = block, found: list[Found | LeftOut] = found) -> None:
            block.extend(itertools.islice(waiting, ahead))
            for number in block:
                try:
                    found.append(one(number))
                except LeftOut as error:
                    found.append(error)

        refuse_together(what, read_block)
        if not block:
            return
        yield from zip(block, _agreed(what, found), strict=True)


def _agreed(what: str, found: list[Found | LeftOut]) -> list[Found | LeftOut]:
    mine = [(index, error.why, error.damaged) for index, error in enumerate(found)
            if isinstance(error, LeftOut)]
    for process, said in enumerate(exchange(f"{what}: left out", json.dumps(mine))):
        for index, why, damaged in json.loads(said):
            if not isinstance(found[index], LeftOut):
                found[index] = LeftOut(f"{why} ({process_name(process)})", damaged)
    return found
