"""`model-info.txt`: every parameter, how it is split over the mesh, and what it weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax.core import meta

from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import AnyMesh, describe_mesh
from vishwam_t5x.parallelism.sharding import (
    axes_size,
    logical_axes_by_name,
    parameter_mesh_axes,
)

_HEAD = ("parameter", "shape", "dtype", "logical axes", "mesh axes", "bytes per device")


def model_info(params: Any, mesh: AnyMesh, rules: LogicalAxisRules | None = None,
               axes: Mapping[str, Sequence[str | None]] | None = None) -> list[str]:
    """Returns the lines of `model-info.txt`: the mesh, a row a parameter, totals by module, totals.

    Args:
        params: arrays or `ShapeDtypeStruct`s in Flax boxes; or without boxes, with `axes` given.
        mesh: mesh of `make_mesh`.
        rules: logical axis rules; the standard ones by default.
        axes: logical axes by '/'-joined parameter name, instead of the boxes.

    Raises:
        UserError: see `parallelism.sharding.parameter_shardings`.
    """
    axes = logical_axes_by_name(params) if axes is None else axes
    leaves = flatten_names(meta.unbox(params))
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    split = parameter_mesh_axes(axes, shapes, mesh, rules)
    rows: list[tuple[str, ...]] = [_HEAD]
    modules: dict[str, list[int]] = {}
    for name, leaf in leaves.items():
        count = math.prod(shapes[name])
        whole = count * leaf.dtype.itemsize
        here = whole // math.prod(axes_size(mesh, part) for part in split[name])
        rows.append((name, _dims(shapes[name], "x"), leaf.dtype.name, _dims(axes[name]),
                     _dims("+".join(part) or "-" for part in split[name]), f"{here:,}"))
        totals = modules.setdefault(name.split("/")[0], [0, 0, 0])
        for index, value in enumerate((count, whole, here)):
            totals[index] += value
    totals = [sum(values) for values in zip(*modules.values(), strict=True)] or [0, 0, 0]
    summary: list[tuple[str, ...]] = [("module", "parameters", "bytes", "bytes per device")]
    summary += [(name, *(f"{value:,}" for value in values)) for name, values in modules.items()]
    summary += [("total", *(f"{value:,}" for value in totals))]
    return [f"mesh: {describe_mesh(mesh)}", "", *_table(rows, numbers=1), "",
            *_table(summary, numbers=3)]


def _dims(values: Any, separator: str = ", ") -> str:
    return separator.join("-" if value is None else str(value) for value in values) or "scalar"


def _table(rows: Sequence[Sequence[str]], numbers: int) -> list[str]:
    """Aligns columns; the last `numbers` of them to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(
        cell.rjust(width) if column >= len(widths) - numbers else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows]
