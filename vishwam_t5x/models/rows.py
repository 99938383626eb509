"""Slots of several modalities put in the order of packed rows, and back.

`row/index` sends each column of a row to a slot (or to none, -1) and uses no slot twice, so the
transpose of the gather is a gather too: with the inverse index. XLA would emit a scatter-add, which
is slow on every backend.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped


def invert(index: Int[Array, "B L"], num_slots: int) -> Int[Array, "B N"]:
    """Returns for each of `num_slots` slots the column that holds it, -1 where none does."""
    length = index.shape[1]
    columns = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), index.shape)
    empty = jnp.full((index.shape[0], num_slots), -1, jnp.int32)
    where = jnp.where(index < 0, num_slots, index)  # out of bounds: dropped
    return jax.vmap(lambda out, at, column: out.at[at].set(column, mode="drop"))(
        empty, where, columns)


def take(x: Shaped[Array, "B N *rest"], index: Int[Array, "B L"]) -> Shaped[Array, "B L *rest"]:
    """Returns x[b, index[b, l]], zero where the index is -1."""
    taken = jax.vmap(lambda row, at: row.at[at].get(mode="clip"))(x, index)
    filled = (index >= 0).reshape(index.shape + (1,) * (x.ndim - 2))
    return jnp.where(filled, taken, jnp.zeros((), x.dtype))


@jax.custom_vjp
def permute(x: Float[Array, "B N D"], index: Int[Array, "B L"], inverse: Int[Array, "B N"]
            ) -> Float[Array, "B L D"]:
    """As `take`, differentiable in x by the gather with `inverse` = `invert(index, N)`."""
    return take(x, index)


def _permute_forward(x: jax.Array, index: jax.Array, inverse: jax.Array
                     ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return take(x, index), (index, inverse)


def _permute_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
                      ) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    index, inverse = residuals
    nothing = jax.dtypes.float0
    return (take(gradient, inverse), np.zeros(index.shape, nothing),
            np.zeros(inverse.shape, nothing))


permute.defvjp(_permute_forward, _permute_backward)
