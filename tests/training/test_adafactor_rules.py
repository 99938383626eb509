"""Adafactor against the formulas of T5X written out in NumPy; what a rule says for each parameter.

T5X's own numbers for three steps are in test_adafactor.py; of momentum, global clipping and NaN
there are none, so they are held against float64 arithmetic here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.training import adafactor_layout, optimizers
from vishwam_t5x.training.adafactor import AdafactorRules, scale_by_adafactor
from vishwam_t5x.training.adafactor_layout import HParamMap, standard_logical_factor_rules

RATE = 0.05


def reference(param, grads, *, row=None, column=None, batch=(), beta1=None, decay=None,
              scaled=True):
    """The parameter and its moments after some steps, in float64 (arXiv:1804.04235, section 4)."""
    param = param.astype(np.float64)
    own = tuple(axis for axis in range(param.ndim) if axis not in batch)
    rms = lambda x: np.sqrt(np.mean(x * x, axis=own, keepdims=True))
    v = v_row = v_col = 0.0
    m = np.zeros_like(param)
    for t, grad in enumerate(grads, start=1):
        grad = grad.astype(np.float64)
        beta2, squared = 1 - t ** -0.8, grad * grad + 1e-30
        if row is None:
            v = beta2 * v + (1 - beta2) * squared
            estimate = v
        else:
            v_row = beta2 * v_row + (1 - beta2) * squared.mean(axis=column, keepdims=True)
            v_col = beta2 * v_col + (1 - beta2) * squared.mean(axis=row, keepdims=True)
            estimate = v_row * v_col / v_row.mean(axis=row, keepdims=True)
        update = grad / np.sqrt(estimate)
        update = update / np.maximum(1.0, rms(update))
        step = RATE * update * (np.maximum(rms(param), 1e-3) if scaled else 1.0)
        if beta1 is not None:
            m = step = beta1 * m + (1 - beta1) * step
        param = param * (1 - (decay or 0.0)) - step
    return param, m, v, v_row, v_col


def draw(shape, number=3, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape).astype(np.float32),
            [rng.normal(size=shape).astype(np.float32) for _ in range(number)])


def run(optimizer, params, grads, steps=3):
    state = optimizer.init(params)
    for i in range(steps):
        updates, state = optimizer.update(jax.tree.map(lambda g, i=i: g[i], grads, is_leaf=is_list),
                                          state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def is_list(x):
    return isinstance(x, list)


@pytest.mark.parametrize("shape, fields", [
    ((130, 200), {}), ((200, 130), {"beta1": 0.9, "weight_decay_rate": 0.01}),
    ((64, 300), {"beta1": 0.9}), ((40,), {"weight_decay_rate": 0.01})])
def test_three_steps_are_the_formulas(shape, fields):
    param, grads = draw(shape)
    found, state = run(scale_by_adafactor(RATE, AdafactorRules(**fields)), {"w": param},
                       {"w": grads})
    factored = len(shape) == 2 and min(shape) >= 128
    row, column = (int(np.argmin(shape)), int(np.argmax(shape))) if factored else (None, None)
    want, m, v, v_row, v_col = reference(param, grads, row=row, column=column,
                                         beta1=fields.get("beta1"),
                                         decay=fields.get("weight_decay_rate"))
    np.testing.assert_allclose(found["w"], want, rtol=1e-5, atol=2e-6)
    moments = state.param_states["w"]
    if "beta1" in fields:
        np.testing.assert_allclose(moments.m, m, rtol=1e-4, atol=1e-6)
    if factored:
        np.testing.assert_allclose(moments.v_row, v_row.squeeze(), rtol=1e-5)
        np.testing.assert_allclose(moments.v_col, v_col.squeeze(), rtol=1e-5)
    else:
        np.testing.assert_allclose(moments.v, v, rtol=1e-5)


def test_global_clip_is_over_all_parameters():
    (a, grads_a), (b, grads_b) = draw((130, 140)), draw((50,), seed=1)
    clip = 0.5
    norms = [np.sqrt(np.sum(x.astype(np.float64) ** 2) + np.sum(y.astype(np.float64) ** 2))
             for x, y in zip(grads_a, grads_b, strict=True)]
    optimizer = optimizers.Adafactor(RATE, global_norm_clip=clip, beta1=0.9).build()
    found, _ = run(optimizer, {"a": a, "b": b}, {"a": grads_a, "b": grads_b})
    for name, param, grads, axes in (("a", a, grads_a, (0, 1)), ("b", b, grads_b, (None, None))):
        clipped = [grad * (clip / max(norm, clip)) for grad, norm in zip(grads, norms, strict=True)]
        want = reference(param, clipped, row=axes[0], column=axes[1], beta1=0.9)[0]
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=2e-6)


def test_a_nan_gradient_is_skipped_and_the_next_steps_are_as_if_it_had_not_come():
    """As in T5X: one NaN under a global clip spoils every gradient, so nothing moves."""
    param, grads = draw((130, 140))
    bad = grads[1].copy()
    bad[3, 4] = np.nan
    optimizer = optimizers.Adafactor(RATE, beta1=0.9, global_norm_clip=1e9,
                                     skip_nan_updates=True).build()
    found, state = run(optimizer, {"w": param}, {"w": [grads[0], bad]}, steps=2)
    want = reference(param, grads[:1], row=0, column=1, beta1=0.9)[0]
    np.testing.assert_allclose(found["w"], want, rtol=1e-5, atol=2e-6)
    assert int(state[1].step) == 2 and all(np.isfinite(leaf).all()
                                           for leaf in jax.tree.leaves(state))


def test_a_second_moment_that_overflows_is_left_out_too():
    """T5X keeps the infinite moment, and the parameter never moves again."""
    param, grads = draw((130, 140))
    huge = jnp.full_like(grads[0], 1e25)
    optimizer = scale_by_adafactor(RATE, AdafactorRules(skip_nan_updates=True))
    after, state = run(optimizer, {"w": param}, {"w": [grads[0], huge]}, steps=2)
    np.testing.assert_allclose(
        after["w"], reference(param, grads[:1], row=0, column=1)[0], rtol=1e-5, atol=2e-6)
    updates, _ = optimizer.update({"w": grads[2]}, state, after)
    assert np.abs(updates["w"]).min() > 0


def test_hparam_map_scales_some_parameters():
    (a, grads_a), (b, grads_b) = draw((40,)), draw((40,), seed=1)
    rules = AdafactorRules(multiply_by_parameter_scale=HParamMap((("^norm/", False), (".*", True))))
    found, _ = run(scale_by_adafactor(RATE, rules), {"norm": {"scale": a * 9}, "w": b * 9},
                   {"norm": {"scale": grads_a}, "w": grads_b})
    np.testing.assert_allclose(found["norm"]["scale"], reference(a * 9, grads_a, scaled=False)[0],
                               rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["w"], reference(b * 9, grads_b)[0], rtol=1e-5, atol=1e-5)
    incomplete = AdafactorRules(multiply_by_parameter_scale=HParamMap((("^norm/", False),)))
    with pytest.raises(UserError, match="parameter 'w'"):
        run(scale_by_adafactor(RATE, incomplete), {"w": b}, {"w": grads_b})


# --- how parameters of more axes are factored ---

AXES = {"wi": ("embed", "layers", "mlp"), "out": ("joined_kv", "layers", "embed"),
        "heads": ("embed", "heads", "kv"), "scale": ("embed", "layers"),
        "table": ("vocab", "embed")}
SHAPES = {"wi": (8, 3, 12), "out": (12, 3, 12), "heads": (10, 3, 5), "scale": (8, 3),
          "table": (300, 130)}
# As T5X factors them: layers apart, whatever the sizes; two axes go by size all the same.
EXPECTED = {"wi": ((0,), (2,), (1,)), "out": ((2,), (0,), (1,)), "heads": ((0,), (1, 2), ()),
            "scale": (None, None, (1,)), "table": ((1,), (0,), ())}


@pytest.mark.parametrize("name, by", [*((name, "axes") for name in AXES), ("heads", "map"),
                                      ("scale", "map")])
def test_factoring_by_logical_axes_or_by_map(name, by):
    standard = standard_logical_factor_rules()
    if by == "axes":
        rules = AdafactorRules(logical_factor_rules=standard)
    else:
        rule = adafactor_layout.rule_of_axes(name, AXES[name], standard)
        rules = AdafactorRules(factor_map=HParamMap((("nothing", None), (f"^{name}$", rule))))
    optimizer = scale_by_adafactor(RATE, rules, logical_axes=lambda: AXES)
    param, grads = draw(SHAPES[name])
    found, state = run(optimizer, {name: param}, {name: grads})
    row, column, batch = EXPECTED[name]
    want, _, v, v_row, v_col = reference(param, grads, row=row, column=column, batch=batch)
    np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=2e-6)
    moments = state.param_states[name]
    if row is None:
        np.testing.assert_allclose(moments.v, v, rtol=1e-5)
    else:
        np.testing.assert_allclose(moments.v_row, v_row.squeeze(column), rtol=1e-5)
        np.testing.assert_allclose(moments.v_col, v_col.squeeze(row), rtol=1e-5)


@pytest.mark.parametrize("fields, shape, words", [
    ({"factor_map": HParamMap(((".*", ("row", "column")),))}, (3, 4, 5), "does not fit"),
    ({"factor_map": HParamMap(((".*", ("row", "none", "none")),))}, (3, 4, 5), "rows or columns"),
    ({"factor_map": HParamMap(((".*", ("row", "colum", "none")),))}, (3, 4, 5), "column"),
    ({"logical_factor_rules": {"embed": "row"}}, (8, 3, 12), "layers"),
    ({"logical_factor_rules": {"embed": "row", "layers": "none", "mlp": "column"}}, (8, 3, 12),
     "leave an axis"),
])
def test_rules_that_do_not_fit(fields, shape, words):
    optimizer = scale_by_adafactor(RATE, AdafactorRules(**fields), logical_axes=lambda: AXES)
    with pytest.raises(UserError, match=words):
        optimizer.init({"wi": jnp.ones(shape)})


@pytest.mark.parametrize("fields, words", [
    ({"factored": False, "factor_map": HParamMap(((".*", None),))}, "factor_map"),
    ({"factor_map": HParamMap(((".*", None),)), "logical_factor_rules": {}}, "not both"),
    ({"multiply_by_parameter_scale": 0.5}, "multiply_by_parameter_scale"),
    ({"factor_map": {"w": None}}, "HParamMap"),
])
def test_rules_that_contradict(fields, words):
    with pytest.raises(UserError, match=words):
        AdafactorRules(**fields)


def test_hparam_map_is_checked():
    for rules, words in (((("(", 1),), "regular expression"), (("ab",), "pairs")):
        with pytest.raises(UserError, match=words):
            HParamMap(rules)


def test_no_weight_decay_by_an_exponent_of_zero():
    """T5X takes an exponent of 0 for none; lr ** 0 would take every weight off."""
    optimizer = scale_by_adafactor(RATE, AdafactorRules(weight_decay_rate_lr_exponent=0.0))
    params = {"w": jnp.ones((3,))}
    updates, _ = optimizer.update({"w": jnp.zeros((3,))}, optimizer.init(params), params)
    assert np.abs(flatten_names(updates)["w"]).max() == 0
