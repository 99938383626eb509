"""What several processes answer together: each reads for itself, and all leave out the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax

from vishwam_t5x.core.coordination import exchange, process_name
from vishwam_t5x.core.distributed import refuse_together
from vishwam_t5x.core.errors import UserError

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


def read(what: str, numbers: Iterable[Number], one: Callable[[Number], Found],
         files: Callable[[], list[tuple[str, str]]] | None = None
         ) -> Iterator[tuple[Number, Found | LeftOut]]:
    """Yields each number with what `one` makes of it, or with why it is left out.

    Every process must go through it together: what one of them cannot read, all leave out, since
    a batch must be the same on all. Of several processes each reads some examples ahead.

    Args:
        what: is read, for messages.
        numbers: of the examples, the same on every process.
        one: reads one, or raises `LeftOut`.
        files: called after each; returns (name, what its content is) of the files that `one` read
            of it, in that order, for several processes to compare. None: it read none by name.

    Raises:
        UserError: on every process, files of one name are not the same on all.
        Exception: on every process, what else `one`, or going through `numbers`, raised on any.
    """
    ahead = 1 if jax.process_count() == 1 else _BLOCK
    waiting = iter(numbers)
    while True:
        block: list[Number] = []
        found: list[Found | LeftOut] = []
        opened: list[list[tuple[str, str]]] = []

        def read_block(block: list[Number] = block, found: list[Found | LeftOut] = found,
                       opened: list[list[tuple[str, str]]] = opened) -> None:
            block.extend(itertools.islice(waiting, ahead))
            for number in block:
                try:
                    found.append(one(number))
                except LeftOut as error:
                    found.append(error)
                opened.append(files() if files is not None else [])

        refuse_together(what, read_block)
        if not block:
            return
        if files is not None and jax.process_count() > 1:
            _refuse_others(what, opened)
        yield from zip(block, _agreed(what, found), strict=True)


def _agreed(what: str, found: list[Found | LeftOut]) -> list[Found | LeftOut]:
    mine = [(index, error.why, error.damaged) for index, error in enumerate(found)
            if isinstance(error, LeftOut)]
    for process, said in enumerate(exchange(f"{what}: left out", json.dumps(mine))):
        for index, why, damaged in json.loads(said):
            if not isinstance(found[index], LeftOut):
                found[index] = LeftOut(f"{why} ({process_name(process)})", damaged)
    return found


def _refuse_others(what: str, opened: list[list[tuple[str, str]]]) -> None:
    """Of an example that one process could not read to its end the files before are compared."""
    everywhere = [json.loads(said) for said in exchange(f"{what}: files", json.dumps(opened))]
    for process, theirs in enumerate(everywhere):
        for first, other in zip(everywhere[0], theirs, strict=True):
            for (name, content), (_, another) in zip(first, other, strict=False):
                if content != another:
                    raise UserError(
                        f"the processes read different files of one name: {name}",
                        got=f"{process_name(0)}: {content}\n       "
                            f"{process_name(process)}: {another}",
                        fix="give every host the same files (on a shared disk, or copies)")
