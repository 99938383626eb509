"""Loss scaling: overflow halves and skips, good steps grow, limits hold, gradients survive."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwam_t5x.precision.loss_scale import (
    LossScaleState,
    adopt_config,
    all_finite,
    init_loss_scale,
)
from vishwam_t5x.precision.policy import LossScaleConfig, policy_by_name

CONFIG = LossScaleConfig("dynamic", initial=8, growth_interval=3, minimum=2, maximum=32)


def follow(state: LossScaleState, finite: list[bool]) -> list[tuple[float, int]]:
    update = jax.jit(LossScaleState.update)
    seen = []
    for flag in finite:
        state = update(state, jnp.asarray(flag))
        seen.append((float(state.value), int(state.num_skipped)))
    return seen


def test_growth_overflow_minimum_and_maximum():
    yes, no = True, False
    assert follow(init_loss_scale(CONFIG), [yes, yes, yes]) == [(8, 0), (8, 0), (16, 0)]
    # An overflow halves the scale and starts the count of good steps again.
    assert follow(init_loss_scale(CONFIG), [yes, yes, no, yes, yes, yes]) == [
        (8, 0), (8, 0), (4, 1), (4, 1), (4, 1), (8, 1)]
    assert [value for value, _ in follow(init_loss_scale(CONFIG), [no] * 4)] == [4, 2, 2, 2]
    assert follow(init_loss_scale(CONFIG), [yes] * 12)[-1] == (32, 0)


def test_an_injected_overflow_skips_one_update_and_recovers():
    """A float16 step as training does it: non-finite gradients leave the parameters alone."""
    @jax.jit
    def step(w, state, x):
        def loss(w):
            y = (w.astype(jnp.float16) * x.astype(jnp.float16)).sum()
            return state.scale(y.astype(jnp.float32))
        grads = state.unscale(jax.grad(loss)(w))
        finite = all_finite(grads)
        return jnp.where(finite, w - 0.1 * grads, w), state.update(finite)

    w, state = jnp.ones(4), init_loss_scale(LossScaleConfig("dynamic", initial=2.0**10))
    x = jnp.full(4, 0.5)
    w1, state = step(w, state, x)
    np.testing.assert_allclose(w1, 0.95, rtol=1e-3)
    w2, state = step(w1, state, x * 2.0**9)  # the gradient, 256 * 1024, is beyond float16
    np.testing.assert_array_equal(w2, w1)
    assert state.metrics() == {"loss_scale": 2.0**9, "num_skipped_steps": 1}
    w3, state = step(w2, state, x)
    np.testing.assert_allclose(w3, 0.90, rtol=1e-3)
    assert int(state.num_skipped) == 1


def test_scaling_saves_gradients_that_float16_would_lose():
    def gradient(state):
        loss = lambda w: state.scale((w.astype(jnp.float16) * jnp.float16(1e-4)).sum() * 1e-5)
        return float(state.unscale(jax.grad(loss)(jnp.ones(1)))[0])
    assert gradient(init_loss_scale(policy_by_name("float32"))) == 0
    assert gradient(init_loss_scale(policy_by_name("float16"))) == pytest.approx(1e-9, rel=1e-2)


def test_unscaling_widens_float16_gradients_first():
    state = init_loss_scale(LossScaleConfig("static", initial=2.0**15))
    grads = state.unscale({"w": jnp.asarray([2.0**-10], jnp.float16)})
    assert grads["w"].dtype == jnp.float32 and float(grads["w"][0]) == 2.0**-25


def test_static_and_none_never_change_but_count():
    static = init_loss_scale(LossScaleConfig("static", initial=16))
    assert float(static.scale(jnp.float16(2))) == 32
    assert follow(static, [False, True]) == [(16, 1), (16, 1)]
    none = init_loss_scale(LossScaleConfig())
    grads = {"w": jnp.ones(2)}
    assert none.scale(jnp.float32(3)) == 3 and none.unscale(grads) is grads
    assert follow(none, [True, False]) == [(1, 0), (1, 1)]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_all_finite(bad):
    assert all_finite({"a": jnp.ones(3), "b": jnp.zeros(2)})
    assert not all_finite({"a": jnp.ones(3), "b": jnp.asarray([0.0, bad])})
    assert all_finite({})


def test_every_kind_has_the_same_arrays_so_precision_may_change():
    kinds = [init_loss_scale(LossScaleConfig(kind)) for kind in ("none", "static", "dynamic")]
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(state)] for state in kinds]
    assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) == 3


def test_a_restored_state_under_another_config():
    dynamic = init_loss_scale(CONFIG).update(jnp.asarray(False))
    same = adopt_config(dynamic, CONFIG)  # value and count go on
    assert (float(same.value), int(same.num_skipped)) == (4, 1)
    slower = adopt_config(dynamic, LossScaleConfig("dynamic", growth_interval=7))
    assert float(slower.value) == 4 and slower.config.growth_interval == 7
    fresh = adopt_config(dynamic, LossScaleConfig("dynamic", minimum=64))  # 4 is out of range
    assert (float(fresh.value), int(fresh.num_skipped)) == (2.0**15, 1)
    none = adopt_config(dynamic, LossScaleConfig())
    assert (float(none.value), int(none.num_skipped)) == (1, 1)
    # A run that had no scale starts one; its value of 1 is no dynamic scale that fell to 1.
    assert float(adopt_config(none, CONFIG).value) == 8
