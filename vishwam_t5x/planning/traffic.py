"""How many bytes a compiled step moves between a device's memory and its cores.

Each instruction that runs by itself reads its operands and writes its results once, whatever loops
surround it counted; of a fusion only what enters and leaves it counts, and of an array that it
slices or updates only the slice. What a cache or a neighbouring instruction still holds is counted
as read from memory all the same. XLA's own figure counts the body of a loop once.
"""

from __future__ import annotations

from typing import NamedTuple

from vishwam_t5x.planning import hlo

# These move nothing: they rename, or they stand for computations that are counted by themselves.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "domain",
         "async-start", "async-update", "async-done", "copy-start", "add-dependency",
         "optimization-barrier"}
_SLICES = {"dynamic-slice", "slice", "gather"}


def memory_bytes(module: hlo.Module) -> int:
    """Returns the bytes one device reads and writes in a step; loops of unknown length turn once.
    """
    total = 0
    for run in module.runs():
        computation = module.computations.get(run.name, {})
        total += run.times * sum(_moved(module, computation, instruction)
                                 for instruction in computation.values())
    return total


def _moved(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    if opcode in _SLICES:
        return 2 * _in_memory(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * _operand(computation, instruction, 1)
    if opcode == "fusion":
        return _fusion(module, computation, instruction)
    return _in_memory(instruction) + sum(
        _operand(computation, instruction, place) for place in range(len(instruction.operands)))


def _fusion(module: hlo.Module, computation: hlo.Computation, fusion: hlo.Instruction) -> int:
    moved = updated = 0
    for place in range(len(fusion.operands)):
        part = _entered(module, fusion, place, _operand(computation, fusion, place))
        moved, updated = moved + part.moved, updated + part.updated
    return moved + max(0, _in_memory(fusion) - updated)


class _Use(NamedTuple):
    """Bytes of an operand that the inside of a fusion moves, and those of the results that are that
    operand, updated in place: they are not written as a whole."""

    moved: int
    updated: int = 0


def _entered(module: hlo.Module, fusion: hlo.Instruction, place: int, whole: int) -> _Use:
    inside = module.computations.get(dict(fusion.called()).get("calls", ""), {})
    for part in inside.values():
        if part.opcode == "parameter" and part.literal == str(place):
            return _used(module, inside, part, whole)
    return _Use(whole)


def _used(module: hlo.Module, inside: hlo.Computation, value: hlo.Instruction, whole: int) -> _Use:
    """Follows a value of a fusion to what takes slices of it, through fusions within it too."""
    found = []
    for use in inside.values():
        places = [place for place, name in enumerate(use.operands) if name == value.name]
        if not places:
            continue
        if use.opcode == "fusion":
            found += [_entered(module, use, place, whole) for place in places]
        elif use.opcode == "bitcast":
            found.append(_used(module, inside, use, whole))
        elif use.opcode in _SLICES and places == [0]:
            found.append(_Use(use.bytes))
        elif use.opcode == "dynamic-update-slice" and places == [0]:
            update = inside.get(use.operands[1])  # what it is made of is counted where it enters
            found.append(_Use(0 if update is None else update.bytes, use.bytes))
        else:
            return _Use(whole)
    if value.is_root or not found:
        return _Use(whole)
    return _Use(min(whole, sum(use.moved for use in found)), sum(use.updated for use in found))


def _in_memory(instruction: hlo.Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if shape.in_main_memory)


def _operand(computation: hlo.Computation, instruction: hlo.Instruction, place: int) -> int:
    if place >= len(instruction.operands):
        return 0
    source = computation.get(instruction.operands[place])
    return 0 if source is None else _in_memory(source)
