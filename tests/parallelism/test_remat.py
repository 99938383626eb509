"""Remat policies: the same gradients, and exactly the matmuls again that the table says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.parallelism import remat
from vishwam_t5x.parallelism.remat import remat_policy

NAMES = ("none", "dots", "minimal", "offload", "save_names:qkv,mlp_out", "full")


def block(params, x):
    """One attention head and an MLP: 3 matmuls with weights, 2 with a batch dimension."""
    qkv = checkpoint_name(x @ params["qkv"], remat.QKV)
    query, key, value = jnp.split(qkv, 3, axis=-1)
    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", query, key))
    x = x + checkpoint_name(jnp.einsum("bqk,bkd->bqd", weights, value), remat.ATTENTION_OUT)
    hidden = checkpoint_name(jnp.tanh(x @ params["wi"]), remat.MLP_HIDDEN)
    return x + checkpoint_name(hidden @ params["wo"], remat.MLP_OUT)


def loss_with(policy_name, platform=None):
    policy = remat_policy(policy_name, platform)
    wrapped = block if policy is None else jax.checkpoint(block, policy=policy)

    def loss(params, x):
        for layer in params:
            x = wrapped(layer, x)
        return jnp.sum(x**2)

    return loss


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = {"qkv": (8, 24), "wi": (8, 16), "wo": (16, 8)}
    params = [{name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
               for name, shape in shapes.items()} for _ in range(2)]
    return params, jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_gives_the_same_gradients(name, inputs):
    plain = jax.jit(jax.grad(loss_with("none")))(*inputs)
    other = jax.jit(jax.grad(loss_with(name)))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, other)


def count_dots(name, inputs):
    return str(jax.make_jaxpr(jax.grad(loss_with(name)))(*inputs)).count("dot_general")


def test_what_is_computed_again(inputs):
    dots = {name: count_dots(name, inputs) for name in NAMES}
    layers = 2
    assert dots["dots"] == dots["none"]
    assert dots["minimal"] == dots["none"] + 2 * layers  # the two matmuls of attention
    assert dots["full"] >= dots["none"] + 4 * layers
    assert dots["none"] < dots["offload"] < dots["full"]
    assert dots["none"] < dots["save_names:qkv,mlp_out"] < dots["full"]


def test_offload_goes_to_host_memory_where_that_is_another_memory(inputs):
    def lowered(platform):
        return jax.jit(jax.grad(loss_with("offload", platform))).trace(*inputs).lower(
            lowering_platforms=(platform,)).as_text()
    assert "pinned_host" in lowered("cuda")
    assert "pinned_host" not in lowered("cpu")


@pytest.mark.parametrize("name, words", [
    ("minimul", "did you mean 'minimal'"),
    ("save_names", "needs the names"),
    ("save_names:qkw", "did you mean 'qkv'"),
    ("full:qkv", "takes no names"),
    (None, "unknown remat policy"),
])
def test_a_wrong_name_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        remat_policy(name)
