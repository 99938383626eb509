"""Reads the text of a compiled program: its computations, and how often each of them runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|to_apply|condition|body|true_computation|false_computation)="
                     r"%?([\w.\-]+)|branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program on one device.

    Attributes:
        dtype: as HLO writes it, 'bf16'.
        dims: its dimensions.
        in_main_memory: False for what is kept in a memory near the cores, or on the host.
    """

    dtype: str
    dims: tuple[int, ...]
    in_main_memory: bool = True

    @property
    def bytes(self) -> int:
        """Its size, without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 32
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in the program.
        shapes: of the results, tuples flattened.
        opcode: e.g. 'fusion'.
        operands: names of what it reads.
        attributes: the rest of the line.
        literal: what stands in the parentheses, for a constant or a parameter.
        is_root: whether it is what the computation returns.
    """

    name: str
    shapes: list[Shape]
    opcode: str
    operands: list[str]
    attributes: str
    literal: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of its results."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, pattern: str) -> str | None:
        """Returns what the first group of `pattern` finds in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def called(self) -> Iterator[tuple[str, str]]:
        """Yields (role, name) of the computations it calls."""
        for match in _CALLED.finditer(self.attributes):
            if match[3] is not None:
                yield from (("branch", name) for name in _OPERAND.findall(match[3]))
            else:
                yield match[1], match[2]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Run:
    """A computation that the program runs by itself, not as the inside of a fusion.

    Attributes:
        name: of the computation.
        times: how often in one step.
        known: whether every loop around it says how often it turns; else `times` counts one turn.
    """

    name: str
    times: int
    known: bool


@dataclasses.dataclass
class Module:
    """A compiled program.

    Attributes:
        computations: by name, their instructions by name.
        entry: name of the first one.
    """

    computations: Mapping[str, Computation]
    entry: str

    def runs(self) -> list[Run]:
        """Returns every computation that runs, once for each call of it.

        Of the branches of a conditional, only the one that writes the most.
        """
        found: list[Run] = []
        self._visit(self.entry, 1, True, found)
        return found

    @property
    def loops_known(self) -> bool:
        """Whether every loop says how often it turns."""
        return all(run.known for run in self.runs())

    def _visit(self, name: str, times: int, known: bool, found: list[Run]) -> None:
        found.append(Run(name, times, known))
        for instruction in self.computations.get(name, {}).values():
            if instruction.opcode == "while":
                turns = self.trip_count(instruction)
                for role, called in instruction.called():
                    if role == "body":
                        self._visit(called, times * (1 if turns is None else turns),
                                    known and turns is not None, found)
            elif instruction.opcode in ("call", "async-start"):
                for _, called in instruction.called():
                    self._visit(called, times, known, found)
            elif instruction.opcode == "conditional":
                branches = [called for _, called in instruction.called()]
                if branches:
                    self._visit(max(branches, key=self._written), times, known, found)

    def _written(self, name: str) -> int:
        """Bytes of all that runs from a computation on: of two branches, which does more."""
        runs: list[Run] = []
        self._visit(name, 1, True, runs)
        return sum(run.times * instruction.bytes for run in runs
                   for instruction in self.computations.get(run.name, {}).values()
                   if instruction.opcode not in ("parameter", "tuple", "get-tuple-element"))

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields what a fusion consists of, fusions within it opened."""
        for role, called in instruction.called():
            if role == "calls":
                for part in self.computations.get(called, {}).values():
                    yield part
                    if part.opcode == "fusion":
                        yield from self.inside(part)

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a loop turns, or None where the program does not say.

        XLA notes it down for CPUs and GPUs. For a TPU it is read off the condition: a counter,
        which in jax's scans begins at 0 and grows by 1, less than a constant.
        """
        noted = loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"\}')
        if noted is not None:
            return int(noted)
        condition = dict(loop.called()).get("condition", "")
        body = list(self.computations.get(condition, {}).values())
        body += [part for whole in body if whole.opcode == "fusion" for part in self.inside(whole)]
        compared = [part for part in body if part.opcode == "compare"]
        limits = {int(part.literal) for part in body
                  if part.opcode == "constant" and re.fullmatch(r"\d+", part.literal)}
        if len(compared) != 1 or len(limits) != 1:
            return None
        return limits.pop() if "direction=LT" in compared[0].attributes else None


def parse(text: str) -> Module:
    """Returns the program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            if match := _HEAD.match(line):
                current = computations.setdefault(match[2], {})
                entry = match[2] if match[1] else entry
            elif line.startswith("}"):
                current = None
        elif (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if match is None:
        return None
    rest = line[match.end():]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1:end]
    return Instruction(match[2], _shapes(shapes), opcode.strip(), _OPERAND.findall(inside),
                       rest[end + 1:], inside, bool(match[1]))


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


@functools.lru_cache(maxsize=8192)
def _shapes_cached(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(re.sub(r"\D", "", size)) for size in dims.split(",") if size),
              not re.search(r"S\([1-9]\d*\)", layout or ""))
        for dtype, dims, layout in _ARRAY.findall(text))


def _shapes(text: str) -> list[Shape]:
    return list(_shapes_cached(text))
