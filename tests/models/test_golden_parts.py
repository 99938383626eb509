"""Parts of the original Unified-IO 2 network: its numbers, computed once and stored here."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from models.model_fixtures import GOLDEN

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.sequence import Pattern
from vishwam_t5x.core.trees import unflatten_names
from vishwam_t5x.models import patterns, positions
from vishwam_t5x.models.attention import Attention, KeysValues, attend
from vishwam_t5x.models.masks import to_bias
from vishwam_t5x.models.perceiver import PerceiverResampler, Resampler
from vishwam_t5x.precision.policy import resolve_policy


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "components.npz") as file:
        return dict(file)


def part(golden, case):
    return {key.removeprefix(case + "/"): value for key, value in golden.items()
            if key.startswith(case + "/")}


def params_of(case):
    return {"params": unflatten_names(part(case, "params"))}


def test_angles_of_the_image_codes(golden):
    places = jnp.arange(0, 1024, 31)
    angles = np.asarray(positions.grid_angles(places, 32, 64, 10000.0))
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(len(places), -1)
    np.testing.assert_allclose(table, golden["rope2d_img_tgt_32x32_hd64_every_31st"], atol=1e-5)


@pytest.mark.parametrize("name, rows, columns", [
    ("4", 4, 4), ("6", 6, 6), ("8x4", 8, 4), ("16x16", 16, 16)])
def test_patterns(golden, name, rows, columns):
    places = jnp.arange(rows * columns)[None]
    pattern = Pattern(places, jnp.full_like(places, columns), places >= 0)
    causal = np.tril(np.ones((rows * columns,) * 2, bool))
    compared = 0
    for kind, plane in (("row", patterns.ROW), ("col", patterns.COLUMN),
                        ("conv11", patterns.NEIGHBOURHOOD)):
        if f"mask_{kind}_{name}" in golden:
            ours = np.asarray(patterns.plane_mask(plane, pattern)[0]) & causal
            np.testing.assert_array_equal(ours, golden[f"mask_{kind}_{name}"] > 0)
            compared += 1
    assert compared == (1 if name == "16x16" else 3)


def test_patterns_leave_what_is_no_grid_alone():
    pattern = Pattern(jnp.arange(40)[None], jnp.zeros((1, 40), jnp.int32), jnp.ones((1, 40), bool))
    assert all(patterns.plane_mask(plane, pattern).all() for plane in range(3))


def test_layers_take_turns():
    assert patterns.layer_planes(8) == (
        patterns.ROW, patterns.COLUMN, *(patterns.ROW,) * 3, patterns.COLUMN, patterns.ROW,
        patterns.NEIGHBOURHOOD)
    assert patterns.layer_planes(1) == (patterns.NEIGHBOURHOOD,)


def test_cosine_attention(golden):
    case = part(golden, "mha_scaledcos")
    module = Attention(num_heads=3, num_kv_heads=3, head_dim=8, features=24, qk_norm=False,
                       scaled_cosine=True)
    bias = to_bias(jnp.asarray(case["mask"][:, 0] > 0), jnp.float32)
    out = module.apply(params_of(case), jnp.asarray(case["q"]), jnp.asarray(case["kv"]), None, None,
                       bias)
    np.testing.assert_allclose(out, case["out"], atol=1e-5)


def test_a_query_that_may_see_nothing_gets_the_mean():
    heads = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 4)).astype(np.float32)
    bias = to_bias(jnp.zeros((1, 5, 5), bool), jnp.float32)
    out = attend(heads[0], KeysValues(*heads[1:]), bias, float32_logits=True, scale=0.5)
    np.testing.assert_allclose(out, np.broadcast_to(heads[2].mean(-2, keepdims=True), out.shape),
                               atol=1e-6)


@pytest.mark.parametrize("name, changes", [
    ("perceiver_qknorm", {}),
    ("perceiver_scaledcos_3layer_x02",
     {"scaled_cosine": True, "num_layers": 3, "cross_layers": (0, 2)})])
def test_resampler(golden, name, changes):
    config = Resampler(num_latents=4, emb_dim=24, num_heads=3, head_dim=8, mlp_dim=48, **changes)
    case = part(golden, name)
    module = PerceiverResampler(config, resolve_policy("float32"))
    mask = golden["perceiver/mask"]
    assert not mask.any(axis=1).all()  # a frame without features is among them
    out = module.apply(params_of(case), jnp.asarray(golden["perceiver/context"]), jnp.asarray(mask))
    np.testing.assert_allclose(out, case["out"], atol=1e-5)


def test_resampler_settings():
    with pytest.raises(UserError, match="cross_layers are numbers of its layers"):
        Resampler(num_latents=4, cross_layers=(0, 2))
    with pytest.raises(UserError, match="num_latents must be a whole number"):
        Resampler(num_latents=0)
