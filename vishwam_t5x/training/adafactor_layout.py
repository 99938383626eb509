"""Which axes of a parameter Adafactor averages over and which it factors.

Three ways to say so, T5X's names for them: by size (the two largest axes; the default), by logical
axis names (`logical_factor_rules`), or by a rule for each parameter (`factor_map`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vishwam_t5x.core.errors import UserError, one_of

STACKED_LAYERS = r"(^|/)(encoder/encoder|decoder/decoder)/"
"""Names of parameters with a layer axis: T5X's scanned stacks."""

STACKED_AXIS = 1
"""That axis (0 for a scalar per layer)."""

HEURISTIC = "heuristic"
"""A rule of a `factor_map`: by size, as without one."""

_KINDS = {"row": "row", "col": "column", "column": "column", "batch": "batch", "none": "none",
          "unfactorized": "none"}


@dataclasses.dataclass(frozen=True)
class HParamMap:
    """A hyperparameter that differs between parameters, T5X's `adafactor.HParamMap`.

    Attributes:
        rules: (regular expression, value) pairs; the first that is found in a parameter's
            '/'-joined name decides. One must be found in every name: end with ('.*', value).
    """

    rules: Sequence[tuple[str, Any]]

    def __post_init__(self) -> None:
        for rule in self.rules:
            if isinstance(rule, str) or len(rule) != 2:
                raise UserError("HParamMap.rules are pairs (regular expression, value)",
                                got=repr(rule), fix="rules = (('scale$', False), ('.*', True))")
            try:
                re.compile(rule[0])
            except re.error as error:
                raise UserError("a rule of HParamMap is not a regular expression",
                                got=repr(rule[0]), fix=str(error)) from error

    def __getitem__(self, name: str) -> Any:
        for pattern, value in self.rules:
            if re.search(pattern, name):
                return value
        raise UserError(f"no rule of HParamMap is found in the name of parameter '{name}'",
                        got=", ".join(repr(pattern) for pattern, _ in self.rules),
                        fix="add ('.*', value) as the last rule")


def standard_logical_factor_rules() -> dict[str, str]:
    """Returns T5X's rules by logical axis, and those of axes that only our models have."""
    return {"vocab": "column", "embed": "row", "mlp": "column", "heads": "column", "kv": "column",
            "joined_kv": "column", "relpos_buckets": "none", "layers": "batch", "stack": "batch",
            "q_wi_fused": "column", "o_wo_fused": "column", "multiquery_heads": "column",
            "kv_fused": "column", "layer_norm_scale": "none", "image_patch": "column",
            "unmodeled": "none"}


class Layout(NamedTuple):
    """What happens to each axis of a parameter; an axis that is in no field is one of layers.

    Attributes:
        averaged: axes over which scale and clipping are taken.
        row: axes that `v_row` keeps and `v_col` averages over; empty: not factored.
        column: axes that `v_col` keeps and `v_row` averages over.
    """

    averaged: tuple[int, ...]
    row: tuple[int, ...] = ()
    column: tuple[int, ...] = ()


def stacked_layer_axis(name: str, ndim: int, pattern: str | None = STACKED_LAYERS,
                       axis: int = STACKED_AXIS) -> int | None:
    """Returns the axis of parameter `name` that counts layers, or None if it is of one layer."""
    if pattern is None or not re.search(pattern, name):
        return None
    return min(axis, ndim - 1)


def by_size(name: str, shape: tuple[int, ...], layer_axis: int | None, factored: bool,
            min_dim_size: int) -> Layout:
    """Returns the layout of a parameter of one or two axes: the larger axis is the column.

    Raises:
        UserError: it has more axes, the one of layers aside.
    """
    own = tuple(axis for axis in range(len(shape)) if axis != layer_axis)
    if not factored or len(own) < 2:
        return Layout(own)
    if len(own) > 2:
        raise UserError(
            f"Adafactor cannot tell how to factor parameter '{name}'", got=f"shape {shape}",
            fix="store kernels as 2-D (in, out), give a factor_map or logical_factor_rules, or "
                "set factored=False")
    # The sort T5X uses, so that equal sizes give the same rows.
    order = [own[i] for i in np.argsort([shape[axis] for axis in own])]
    if shape[order[-2]] < min_dim_size:
        return Layout(own)
    return Layout(own, (order[-2],), (order[-1],))


def by_rule(name: str, shape: tuple[int, ...], rule: Any, factored: bool, min_dim_size: int
            ) -> Layout:
    """Returns the layout that a rule of a `factor_map` asks for.

    Args:
        name: of the parameter.
        shape: its shape.
        rule: 'row', 'column', 'batch' (an axis of layers) or 'none' for each axis; `HEURISTIC`;
            or None: not factored. As in T5X, a parameter of at most two axes, none of them of
            layers, goes by size whatever its rule says.
        factored: False: nothing is factored.
        min_dim_size: of `by_size`.

    Raises:
        UserError: the rule does not fit the shape.
    """
    if rule is None:
        return Layout(tuple(range(len(shape))))
    if isinstance(rule, str) and rule.lower() == HEURISTIC:
        return by_size(name, shape, None, factored, min_dim_size)
    if isinstance(rule, str) or len(rule) != len(shape):
        raise UserError(f"the factor rule of parameter '{name}' does not fit its shape",
                        got=f"{rule!r} for {shape}",
                        fix="give 'row', 'column', 'batch' or 'none' for each axis, or 'heuristic'")
    kinds = [_KINDS[one_of(str(kind).lower(), _KINDS, "factor rule")] for kind in rule]
    if len(shape) <= 2 and "batch" not in kinds:
        return by_size(name, shape, None, factored, min_dim_size)
    axes = {kind: tuple(axis for axis, found in enumerate(kinds) if found == kind)
            for kind in ("row", "column", "batch")}
    if bool(axes["row"]) != bool(axes["column"]):
        raise UserError(f"the factor rule of parameter '{name}' has rows or columns alone",
                        got=repr(rule), fix="name both, or neither ('none')")
    averaged = tuple(axis for axis in range(len(shape)) if axis not in axes["batch"])
    return Layout(averaged, axes["row"], axes["column"]) if factored else Layout(averaged)


def rule_of_axes(name: str, axes: Sequence[str | None], rules: Mapping[str, str]
                 ) -> tuple[str, ...]:
    """Returns the rule that `logical_factor_rules` make of a parameter's logical axes.

    Raises:
        UserError: an axis has no rule, or some axes are factored and others are not.
    """
    for axis in axes:
        if axis is not None and axis not in rules:
            raise UserError(f"logical_factor_rules lack an axis of parameter '{name}'", got=axis,
                            fix=f"add '{axis}': 'row', 'column', 'batch' or 'none'")
    kinds = tuple("none" if axis is None else
                  _KINDS[one_of(str(rules[axis]).lower(), _KINDS, "factor rule")] for axis in axes)
    if {"row", "column"} <= set(kinds):
        if "none" in kinds:
            raise UserError(f"logical_factor_rules leave an axis of parameter '{name}' out",
                            got=f"{kinds} for {tuple(axes)}", fix="make it a 'row' or a 'column'")
        return kinds
    return tuple("batch" if kind == "batch" else "none" for kind in kinds)
