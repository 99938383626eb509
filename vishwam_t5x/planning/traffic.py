"""How many bytes a compiled step moves between a device's memory and its cores.

Each instruction that runs by itself reads its operands and writes its results once, whatever loops
surround it counted; of a fusion only what enters and leaves it counts, and of an array that it
slices or updates only the slice. What a cache or a neighbouring instruction still holds is counted
as read from memory all the same. XLA's own figure counts the body of a loop once.
"""

from __future__ import annotations

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
    if opcode in _FREE or opcode.endswith("-done"):
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
    called = dict(fusion.called()).get("calls", "")
    inside = module.computations.get(called, {})
    users: dict[str, list[hlo.Instruction]] = {}
    for part in inside.values():
        for name in part.operands:
            users.setdefault(name, []).append(part)
    moved = 0
    updated = 0
    for part in inside.values():
        if part.opcode != "parameter" or not part.literal.isdigit():
            continue
        uses = users.get(part.name, [])
        if uses and all(use.opcode in _SLICES and use.operands[0] == part.name for use in uses):
            moved += min(_operand(computation, fusion, int(part.literal)),
                         sum(use.bytes for use in uses))
        elif uses and all(use.opcode == "dynamic-update-slice" and use.operands[0] == part.name
                          for use in uses):
            # Written in place: only the slice is read and written.
            slices = sum(inside[use.operands[1]].bytes for use in uses if use.operands[1] in inside)
            moved += 2 * slices
            updated += part.bytes
        else:
            moved += _operand(computation, fusion, int(part.literal))
    return moved + max(0, _in_memory(fusion) - updated)


def _in_memory(instruction: hlo.Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if shape.in_main_memory)


def _operand(computation: hlo.Computation, instruction: hlo.Instruction, place: int) -> int:
    if place >= len(instruction.operands):
        return 0
    source = computation.get(instruction.operands[place])
    return 0 if source is None else _in_memory(source)
