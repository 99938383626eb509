"""States to save in tests: every number a function of the step, so that a mix-up shows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

NUM_LAYERS = 3


def make_state(step: int, width: int = 16, sharding=None):
    """A small training state; `sharding` maps an array's number of axes to its sharding."""
    rng = np.random.default_rng(step)

    def array(*shape, dtype=np.float32):
        value = jnp.asarray(rng.standard_normal(shape), dtype)
        return value if sharding is None else jax.device_put(value, sharding(len(shape)))

    params = {"encoder": {f"layers_{i}": {"mlp": {"wi": {"kernel": array(width, 2 * width)}},
                                          "norm": {"scale": array(width)}}
                          for i in range(NUM_LAYERS)},
              "embedder": {"embedding": array(8, width, dtype=jnp.bfloat16)}}
    moments = jax.tree.map(lambda leaf: leaf * 2, params)
    return {"step": jnp.asarray(step, jnp.int32), "params": params,
            "opt_state": (optax.EmptyState(), optax.TraceState(moments)),
            "position": {"next_example": np.asarray(7 * step, np.int64),
                         "carried": np.arange(32, dtype=np.int64) + step}}


def abstract(state, sharding=None):
    """Shapes, dtypes and places of a state; NumPy leaves as they are."""
    def describe(leaf):
        if isinstance(leaf, np.ndarray):
            return np.zeros_like(leaf)
        place = leaf.sharding if sharding is None else sharding(leaf.ndim)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(describe, state)


def assert_equal(got, want):
    """Bit-equal, with equal dtypes and structure."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and isinstance(a, np.ndarray) == isinstance(b, np.ndarray)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
