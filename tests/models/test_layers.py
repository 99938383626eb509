"""Single layers against their formulas and against automatic differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from models import model_fixtures

from vishwam_t5x.models import masks, positions
from vishwam_t5x.models.attention import KeysValues, attend
from vishwam_t5x.models.layers import MlpBlock, rms_norm


def test_rms_norm_gradient_is_that_of_the_formula():
    x = jax.random.normal(jax.random.key(0), (3, 4, 16)) * 2
    scale, weights = jax.random.normal(jax.random.key(1), (2, 16))

    def plain(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def gradient(norm):
        return jax.jit(jax.value_and_grad(
            lambda x, scale: jnp.sum(jnp.sin(norm(x, scale)) * weights), (0, 1)))(x, scale)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
                 gradient(lambda x, scale: rms_norm(x, scale, 1e-6)), gradient(plain))


def test_rms_norm_casts_before_it_scales():
    x = jax.random.normal(jax.random.key(0), (8, 64), jnp.bfloat16)
    scale = jnp.linspace(0.5, 1.5, 64)
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    y = rms_norm(x, scale, 1e-6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, normed.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16))
    d_x, d_scale = jax.grad(lambda x, scale: jnp.sum(rms_norm(x, scale, 1e-6).astype(jnp.float32)),
                            (0, 1))(x, scale)
    assert d_x.dtype == jnp.bfloat16 and d_scale.dtype == jnp.float32


def test_rotation_gradient_turns_back():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    turn = positions.rope(positions.text_angles(jnp.arange(10).reshape(2, 5) * 7, 8, 100.0))
    y, pullback = jax.vjp(lambda x: positions.apply_rotary(x, turn), x)
    np.testing.assert_allclose(pullback(y)[0], x, atol=1e-5)  # orthogonal
    shifted = positions.rope(positions.text_angles(jnp.arange(10).reshape(2, 5) * 7 + 3, 8, 100.0))
    z = positions.apply_rotary(x, shifted)
    # Products of queries and keys depend on the distance of their positions alone.
    np.testing.assert_allclose(jnp.einsum("blhd,bmhd->bhlm", y, y),
                               jnp.einsum("blhd,bmhd->bhlm", z, z), atol=1e-4)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attend_is_softmax_attention_with_shared_heads(num_kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    queries = jax.random.normal(keys[0], (2, 4, 3, 8))
    kv = KeysValues(*(jax.random.normal(key, (2, num_kv_heads, 5, 8)) for key in keys[1:3]))
    allowed = jax.random.bernoulli(keys[3], 0.6, (2, 3, 5)).at[0, 1].set(False)
    bias = masks.to_bias(allowed, jnp.float32)

    def ours(queries, kv):
        return attend(queries, kv, bias, float32_logits=True, scale=8**-0.5)

    def plain(queries, kv):
        k, v = (jnp.repeat(array, 4 // num_kv_heads, axis=1) for array in kv)
        weights = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", queries, k) / 8**0.5 + bias)
        return jnp.einsum("bhqk,bhkd->bhqd", weights, v)

    np.testing.assert_allclose(ours(queries, kv), plain(queries, kv), atol=1e-5)
    # A query that may see nothing averages all: finite, and harmless.
    np.testing.assert_allclose(ours(queries, kv)[0, :, 1], jnp.repeat(
        kv.values.mean(axis=2)[0], 4 // num_kv_heads, axis=0), atol=1e-5)
    gradients = [jax.grad(lambda q, kv: jnp.sum(jnp.sin(f(q, kv))), (0, 1))(queries, kv)  # noqa: B023
                 for f in (ours, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_masked_logit_is_finite_in_every_dtype():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        value = jnp.asarray(masks.masked_logit(dtype), dtype)
        assert np.isfinite(float(value)) and float(value) <= -3e4


def test_decoder_mask():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    modality = jnp.asarray([[0, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(masks.decoder_mask(segments, modality)[0].astype(int), [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])


def test_mlp_is_the_product_of_its_activations():
    x = jax.random.normal(jax.random.key(0), (2, 3, 6))
    block = MlpBlock(8, ("gelu_tanh", "linear"))
    variables = block.init(jax.random.key(1), x)
    kernel = {name: node["kernel"] for name, node in nn.meta.unbox(variables)["params"].items()}
    expected = (jax.nn.gelu(x @ kernel["wi_0"]) * (x @ kernel["wi_1"])) @ kernel["wo"]
    np.testing.assert_allclose(block.apply(variables, x), expected, atol=1e-5)


def test_logits_are_scaled_by_the_root_of_the_width():
    model, variables = model_fixtures.build()
    hidden = jax.random.normal(jax.random.key(1), (1, 3, 32))
    embedding = variables["params"]["text_token_embedder"]["embedding"]
    found = model.apply(variables, hidden,
                        method=lambda model, x: model.target_encoders["text"].logits(x))
    np.testing.assert_allclose(found, hidden @ embedding.T / 32**0.5, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_attention_dropout_drops_keys_of_a_head_for_all_queries(num_kv_heads):
    """With values that name their key, the dropped keys can be read off the result."""
    module = nn.Dropout(0.5, broadcast_dims=(-1,))
    values = jnp.broadcast_to(jnp.eye(8), (2, num_kv_heads, 8, 8))
    kv = KeysValues(jnp.zeros((2, num_kv_heads, 8, 8)), values)
    queries, bias = jnp.zeros((2, 4, 3, 8)), jnp.zeros((2, 1, 3, 8))

    class Attend(nn.Module):
        @nn.compact
        def __call__(self):
            return attend(queries, kv, bias, float32_logits=True, scale=1.0,
                          key_dropout=module.copy())

    out = np.asarray(Attend().apply({}, rngs={"dropout": jax.random.key(3)})) * 8
    assert set(np.unique(out.round(4))) == {0.0, 2.0}  # dropped, or kept and doubled
    assert (out == out[:, :, :1]).all()
    heads = out[:, :, 0].reshape(8, 8)
    assert len({tuple(head) for head in heads}) > 4 and 0.3 < (heads > 0).mean() < 0.7
