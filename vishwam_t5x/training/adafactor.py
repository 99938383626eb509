"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with T5X's semantics (`t5x/adafactor.py`).

State has T5X's names and shapes: `m`, `v`, `v_row`, `v_col` per parameter, `[1]` zeros where one is
not used. optax's own Adafactor keeps its state in chained pieces and takes a stack of layers for
one parameter. Here layers stacked under a scan are treated one by one: factored, scaled and clipped
per layer, so a scanned and an unrolled model get the same updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.training import adafactor_layout
from vishwam_t5x.training.adafactor_layout import STACKED_AXIS, STACKED_LAYERS, HParamMap, Layout


class ParamState(NamedTuple):
    """Second and first moments of one parameter; `[1]` zeros stand where one is not kept.

    Attributes:
        m: momentum of the scaled update (learning rate included), the parameter's shape.
        v: unfactored second moment, float32, the parameter's shape.
        v_row: second moment averaged over the larger factored axis, float32.
        v_col: second moment averaged over the smaller factored axis, float32.
    """

    m: Array
    v: Float[Array, "..."]
    v_row: Float[Array, "..."]
    v_col: Float[Array, "..."]


class AdafactorState(NamedTuple):
    """State of `adafactor`: updates done so far (int32 []) and a `ParamState` per parameter."""

    step: Int[Array, ""]
    param_states: Any


@dataclasses.dataclass(frozen=True)
class AdafactorRules:
    """Hyperparameters of Adafactor, named as T5X names them (its defaults, too).

    Attributes:
        decay_rate: exponent of the second moment's decay, 1 - (t+1)^-decay_rate.
        step_offset: step at which the second moment starts anew (for fine-tuning), in steps.
        clipping_threshold: largest root-mean-square of one parameter's update before the learning
            rate; None: no clipping.
        multiply_by_parameter_scale: scale updates by the parameter's root-mean-square; an
            `HParamMap` says so for each parameter.
        beta1: decay of the momentum of updates; None: no momentum, no memory for it.
        dtype_momentum: dtype the momentum is kept in, 'float32' or 'bfloat16'.
        weight_decay_rate: share of a parameter taken off each step (not times the learning rate).
        weight_decay_rate_lr_exponent: if set, and not 0, weight decay is also times learning rate
            ** this; its rate is then 1 unless set.
        min_dim_size_to_factor: factor only if two axes have at least this many elements.
        factored: keep row and column means instead of the whole second moment.
        epsilon1: added to squared gradients.
        epsilon2: least parameter scale.
        max_parameter_scale: largest parameter scale; None: no limit.
        beta2_cap: largest decay of the second moment (Unified-IO 2's addition); None: no limit.
        skip_nan_updates: elements whose update is not finite keep their value, and state that
            would not be finite is kept as it was. T5X looks for NaN alone; a second moment that
            overflows stays infinite there, and its parameter never moves again. A train step
            leaves out whole every batch whose loss or gradients are not finite, so this is for
            what overflows after them.
        factor_map: an `HParamMap` of rules, see `adafactor_layout.by_rule`; None: by size.
        logical_factor_rules: 'row', 'column', 'batch' or 'none' by logical axis name, as in
            `standard_logical_factor_rules`; None: by size.
    """

    decay_rate: float = 0.8
    step_offset: int = 0
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool | HParamMap = True
    beta1: float | None = None
    dtype_momentum: str = "float32"
    weight_decay_rate: float | None = None
    weight_decay_rate_lr_exponent: float | None = None
    min_dim_size_to_factor: int = 128
    factored: bool = True
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3
    max_parameter_scale: float | None = None
    beta2_cap: float | None = None
    skip_nan_updates: bool = False
    factor_map: HParamMap | None = None
    logical_factor_rules: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        _check(self.decay_rate > 0, "decay_rate must be positive", self.decay_rate)
        _check(self.step_offset >= 0, "step_offset must not be negative", self.step_offset)
        _check(self.clipping_threshold is None or self.clipping_threshold > 0,
               "clipping_threshold must be positive, or None", self.clipping_threshold)
        for name in ("beta1", "beta2_cap", "weight_decay_rate"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < 1, f"{name} must be in [0, 1), or None", value)
        _check(self.dtype_momentum in ("float32", "bfloat16"),
               "dtype_momentum must be 'float32' or 'bfloat16'", self.dtype_momentum)
        _check(self.min_dim_size_to_factor >= 1, "min_dim_size_to_factor must be at least 1",
               self.min_dim_size_to_factor)
        _check(self.epsilon1 > 0 and self.epsilon2 > 0, "epsilon1 and epsilon2 must be positive",
               (self.epsilon1, self.epsilon2))
        _check(isinstance(self.multiply_by_parameter_scale, (bool, HParamMap)),
               "multiply_by_parameter_scale must be True, False or an HParamMap",
               self.multiply_by_parameter_scale)
        _check(self.factor_map is None or isinstance(self.factor_map, HParamMap),
               "factor_map must be an HParamMap, or None", self.factor_map)
        _check(self.factor_map is None or self.factored,
               "factored = False leaves no use for a factor_map", self.factor_map)
        _check(self.factor_map is None or self.logical_factor_rules is None,
               "give a factor_map or logical_factor_rules, not both", self.logical_factor_rules)
        _check(self.max_parameter_scale is None or self.max_parameter_scale >= self.epsilon2,
               "max_parameter_scale must be at least epsilon2, or None", self.max_parameter_scale)


def _check(holds: bool, problem: str, got: object) -> None:
    if not holds:
        raise UserError(f"Adafactor: {problem}", got=repr(got))


def _unused() -> Array:
    return jnp.zeros((1,), jnp.float32)


def _init_param(param: Any, layout: Layout, rules: AdafactorRules) -> ParamState:
    shape = param.shape
    m = _unused()
    if rules.beta1 is not None:
        m = jnp.zeros(shape, rules.dtype_momentum)
    if not layout.row:
        return ParamState(m, jnp.zeros(shape, jnp.float32), _unused(), _unused())
    without = lambda axes: tuple(size for i, size in enumerate(shape) if i not in axes)
    return ParamState(m, _unused(), jnp.zeros(without(layout.column), jnp.float32),
                      jnp.zeros(without(layout.row), jnp.float32))


def _rms(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))


def _update_param(grad: Array, state: ParamState, param: Array, layout: Layout,
                  rules: AdafactorRules, decay: Array, learning_rate: Any,
                  decay_weights: bool, scaled: bool) -> tuple[Array, ParamState]:
    """Returns the float32 change of one parameter and its next state (section 4 of the paper)."""
    grad, param = grad.astype(jnp.float32), param.astype(jnp.float32)
    squared = grad * grad + rules.epsilon1
    v, v_row, v_col = state.v, state.v_row, state.v_col
    if layout.row:
        v_row = decay * v_row + (1.0 - decay) * jnp.mean(squared, axis=layout.column)
        v_col = decay * v_col + (1.0 - decay) * jnp.mean(squared, axis=layout.row)
        row_in_v_row = tuple(axis - sum(column < axis for column in layout.column)
                             for axis in layout.row)
        mean = jnp.mean(v_row, axis=row_in_v_row, keepdims=True)
        update = (grad * jnp.expand_dims((v_row / mean) ** -0.5, layout.column)
                  * jnp.expand_dims(v_col ** -0.5, layout.row))
    else:
        v = decay * v + (1.0 - decay) * squared
        update = grad * v ** -0.5
    if rules.clipping_threshold is not None:
        update /= jnp.maximum(1.0, _rms(update, layout.averaged) / rules.clipping_threshold)

    scale = learning_rate
    if scaled:
        parameter_scale = jnp.maximum(_rms(param, layout.averaged), rules.epsilon2)
        if rules.max_parameter_scale is not None:
            parameter_scale = jnp.minimum(parameter_scale, rules.max_parameter_scale)
        scale = scale * parameter_scale
    step = scale * update
    m = state.m
    if rules.beta1 is not None:
        # The momentum holds scaled updates, so a change of learning rate acts with its delay.
        step = rules.beta1 * m.astype(jnp.float32) + (1.0 - rules.beta1) * step
        m = step.astype(m.dtype)
    change = -step
    rate = _weight_decay(rules, learning_rate) if decay_weights else None
    if rate is not None:
        change = change - rate * param
    new_state = ParamState(m, v, v_row, v_col)
    if rules.skip_nan_updates:
        keep = lambda new, old: jnp.where(jnp.isfinite(new), new, old)
        new_state = ParamState(*(keep(new, old) for new, old in zip(new_state, state, strict=True)))
        change = jnp.where(jnp.isfinite(change), change, 0.0)
    return change, new_state


def _weight_decay(rules: AdafactorRules, learning_rate: Any) -> Any:
    if not rules.weight_decay_rate_lr_exponent:  # 0 is none, as in T5X
        return rules.weight_decay_rate
    return (rules.weight_decay_rate or 1.0) * learning_rate ** rules.weight_decay_rate_lr_exponent


def scale_by_adafactor(learning_rate: optax.ScalarOrSchedule, rules: AdafactorRules, *,
                       decays: Callable[[str], bool] = lambda name: True,
                       stacked_layers: str | None = STACKED_LAYERS,
                       stacked_axis: int = STACKED_AXIS,
                       logical_axes: Callable[[], Mapping[str, Sequence[str | None]]] | None = None
                       ) -> optax.GradientTransformation:
    """Returns the optimizer: gradients to what is to be added to the parameters.

    Args:
        learning_rate: number, or function of the number of updates done so far (int32 []).
        rules: the hyperparameters.
        decays: tells by name ('/'-joined) whether a parameter's weights decay.
        stacked_layers: regular expression of the names of parameters with a layer axis; None: none.
        stacked_axis: that axis.
        logical_axes: returns {parameter name: logical axis names}, for `logical_factor_rules`,
            which then say which axes are of layers.

    Raises:
        UserError: from `init` or `update`, a parameter's axes do not say how to factor it.
    """

    def layout(name: str, shape: tuple[int, ...]) -> Layout:
        by = (name, shape)
        if rules.logical_factor_rules is not None:
            assert logical_axes is not None, "logical_factor_rules need the logical axes"
            rule = adafactor_layout.rule_of_axes(name, logical_axes()[name],
                                                 rules.logical_factor_rules)
            return adafactor_layout.by_rule(*by, rule, rules.factored, rules.min_dim_size_to_factor)
        if rules.factor_map is not None:
            return adafactor_layout.by_rule(*by, rules.factor_map[name], rules.factored,
                                            rules.min_dim_size_to_factor)
        layer_axis = adafactor_layout.stacked_layer_axis(name, len(shape), stacked_layers,
                                                         stacked_axis)
        return adafactor_layout.by_size(*by, layer_axis, rules.factored,
                                        rules.min_dim_size_to_factor)

    def layouts(params: Any) -> list[tuple[str, Layout]]:
        return [(name, layout(name, tuple(param.shape)))
                for name, param in flatten_names(params).items()]

    def scaled(name: str) -> bool:
        value = rules.multiply_by_parameter_scale
        return bool(value[name] if isinstance(value, HParamMap) else value)

    def init(params: Any) -> AdafactorState:
        leaves, treedef = jax.tree.flatten(params)
        states = [_init_param(param, layout, rules)
                  for param, (_, layout) in zip(leaves, layouts(params), strict=True)]
        return AdafactorState(jnp.zeros((), jnp.int32), jax.tree.unflatten(treedef, states))

    def update(grads: Any, state: AdafactorState, params: Any = None
               ) -> tuple[Any, AdafactorState]:
        assert params is not None, "Adafactor scales updates by the parameters: pass them"
        treedef: Any = jax.tree.structure(params)
        leaves = jax.tree.leaves(params)
        t = (state.step - rules.step_offset).astype(jnp.float32) + 1.0
        decay = 1.0 - t ** (-rules.decay_rate)
        if rules.beta2_cap is not None:
            decay = jnp.minimum(decay, rules.beta2_cap)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        results = [
            _update_param(grad, param_state, param, layout, rules, decay, rate, decays(name),
                          scaled(name))
            for grad, param_state, param, (name, layout) in zip(
                treedef.flatten_up_to(grads), treedef.flatten_up_to(state.param_states), leaves,
                layouts(params), strict=True)]
        return (jax.tree.unflatten(treedef, [change for change, _ in results]),
                AdafactorState(state.step + 1,
                               jax.tree.unflatten(treedef, [new for _, new in results])))

    return optax.GradientTransformation(init, update)
