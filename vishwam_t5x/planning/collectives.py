"""The messages a compiled step sends: kind, bytes, mesh axis, how often."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vishwam_t5x.planning import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Messages of one kind over the same mesh axes, in one step.

    Attributes:
        kind: one of `KINDS`.
        axes: mesh axes joined by '+', or 'unknown' where the groups follow none.
        group: devices that exchange with each other.
        count: how many.
        operand_bytes: what one device puts in, all of them together.
        sent_bytes: what one device sends for it, by the ring algorithm.
        torus: places at which a group has devices, along each dimension of a TPU's torus; () where
            there is none.
        loops_known: False where a loop around some of them does not say how often it turns: then
            they are counted for one turn.
    """

    kind: str
    axes: str
    group: int
    count: int
    operand_bytes: int
    sent_bytes: float
    torus: tuple[int, ...] = ()
    loops_known: bool = True


def sent_bytes(kind: str, operand: int, group: int) -> float:
    """Returns what one device sends, in bytes.

    Args:
        kind: one of `KINDS`.
        operand: bytes that one device puts in.
        group: devices of the group.
    """
    if group <= 1:
        return 0.0
    if kind == "all-gather":
        return float(operand * (group - 1))
    if kind == "all-reduce":
        return 2 * operand * (group - 1) / group
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return operand * (group - 1) / group
    return float(operand)


def find(module: hlo.Module, mesh_shape: dict[str, int], devices: Sequence[Any] = ()
         ) -> list[Collective]:
    """Returns the collectives of a program, summed by kind and mesh axes, the largest first.

    Args:
        module: the program.
        mesh_shape: devices along each mesh axis; partition ids count them in C order.
        devices: those of the mesh in that order; where they have coordinates, they tell which
            dimensions of the torus a group spans.
    """
    total = math.prod(mesh_shape.values())
    sums: dict[tuple, list] = {}
    for run in module.runs():
        seen: set[str] = set()
        for kind, instruction, computation in _in(module, run.name):
            # One message that several fusions carry on: it has the same channel in each.
            chain = instruction.attribute(r'chain_id="(\d+)"')
            channel = instruction.attribute(r"channel_id=(\d+)")
            if chain is not None:
                if f"{chain}/{channel}" in seen:
                    continue
                seen.add(f"{chain}/{channel}")
            groups = _groups(instruction, total)
            axes, size, torus = _axes(groups, mesh_shape, devices)
            if size <= 1:
                continue
            operand = sum(computation[name].bytes for name in instruction.operands
                          if name in computation)
            key = (kind, axes, size, torus, run.known)
            entry = sums.setdefault(key, [0, 0, 0.0])
            entry[0] += run.times
            entry[1] += run.times * operand
            entry[2] += run.times * sent_bytes(kind, operand, size)
    found = [Collective(kind, axes, size, count, operand, sent, torus, known)
             for (kind, axes, size, torus, known), (count, operand, sent) in sums.items()]
    return sorted(found, key=lambda one: -one.sent_bytes)


def _in(module: hlo.Module, name: str
        ) -> Iterable[tuple[str, hlo.Instruction, hlo.Computation]]:
    """Yields (kind, instruction, computation) of the collectives of one computation."""
    computation = module.computations.get(name, {})
    for instruction in computation.values():
        if (kind := _kind(instruction.opcode)) is not None:
            yield kind, instruction, computation
        elif instruction.opcode == "fusion":
            for _, called in instruction.called():
                # A TPU's reduce-scatter is an all-reduce of which each device keeps its part.
                scatter = called.startswith("all-reduce-scatter")
                for kind, part, inside in _in(module, called):
                    yield ("reduce-scatter" if scatter and kind == "all-reduce" else kind,
                           part, inside)


def _kind(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in KINDS else None


def _groups(instruction: hlo.Instruction, total: int) -> np.ndarray | None:
    """The ids of the devices of each group, [groups, size]; None where the text is not understood.

    XLA has four spellings: lists, an iota ([4,2]<=[2,4]T(1,0)), axes of a mesh, and pairs.
    """
    text = instruction.attributes
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        pairs = re.findall(r"\{(\d+),(\d+)\}", match[1])
        return np.array([[int(a), int(b)] for a, b in pairs]) if pairs else None
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = _ints(match[1]), _ints(match[2])
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose(_ints(match[3])) if match[3] else ids
        return ids.reshape(shape)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? ?"
                          r"\{([^}]*)\}", text):
        return _mesh_groups(match[1], match[2], match[3])
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        lists = [_ints(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
        if not lists:
            return np.arange(total).reshape(1, total)
        return np.array(lists) if len({len(group) for group in lists}) == 1 else None
    return None


def _mesh_groups(axes: str, order: str | None, names: str) -> np.ndarray | None:
    """The groups along some axes of a mesh whose devices may be an iota, transposed."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    wanted = re.findall(r"'([^']+)'", names)
    ids = np.arange(math.prod(sizes.values()))
    if order is not None:
        match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
        if match is None:
            return None
        ids = ids.reshape(_ints(match[1]))
        ids = ids.transpose(_ints(match[2])) if match[2] else ids
    if ":" in names or not set(wanted) <= set(sizes):
        return None  # a part of an axis
    kept = [*(name for name in sizes if name not in wanted), *wanted]
    moved = [list(sizes).index(name) for name in kept]
    grid = ids.reshape(tuple(sizes.values())).transpose(moved)
    return grid.reshape(-1, math.prod(sizes[name] for name in wanted))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _axes(groups: np.ndarray | None, mesh_shape: dict[str, int], devices: Sequence[Any]
          ) -> tuple[str, int, tuple[int, ...]]:
    """The mesh axes along which a group's devices differ, its size, and its places on the torus."""
    total = math.prod(mesh_shape.values())
    if groups is None or groups.size == 0 or groups.max() >= total:
        return UNKNOWN, total, _places(np.arange(total)[None], devices)
    size = groups.shape[1]
    if size == 1:
        return "", 1, ()
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())), -1)
    varies = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    axes = [name for name, moves in zip(mesh_shape, varies, strict=True) if moves]
    return "+".join(axes), size, _places(groups, devices)


def _places(groups: np.ndarray, devices: Sequence[Any]) -> tuple[int, ...]:
    """At how many places a group has devices, along each dimension of the torus."""
    coordinates = [getattr(device, "coords", None) for device in devices]
    if not coordinates or None in coordinates:
        return ()
    where = np.sort(np.array(coordinates)[groups], axis=1)
    steps = (np.diff(where, axis=1) != 0).sum(axis=1) + 1
    return tuple(int(most) for most in steps.max(axis=0))
