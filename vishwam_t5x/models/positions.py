"""Rotary positions: one angle per pair of features, from text positions or places in a grid.

RoPE (arXiv 2104.09864) in the interleaved layout: features (2p, 2p+1) of a head turn together by
angle p. Text turns pair p by position · theta^(-2p/d), d the head size. A grid gives the first half
of the pairs to the row and the second half to the column, each with frequencies theta^(-2j/(d/2)),
as Unified-IO 2 (arXiv 2312.17172) does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rope(NamedTuple):
    """Cosines and sines of rotary angles, [B, L, head_dim / 2] float32."""

    cos: Float[Array, "B L P"]
    sin: Float[Array, "B L P"]


def _frequencies(num_pairs: int, theta: float) -> np.ndarray:
    return (float(theta) ** (-np.arange(num_pairs) / num_pairs)).astype(np.float32)


def text_angles(pos_ids: Int[Array, "*batch"], head_dim: int, theta: float
                ) -> Float[Array, "*batch P"]:
    """Returns float32 angles [..., head_dim / 2] in radians of 1-D positions."""
    freqs = _frequencies(head_dim // 2, theta)
    return pos_ids[..., None].astype(jnp.float32) * freqs


def grid_angles(pos_ids: Int[Array, "*batch"], width: int, head_dim: int, theta: float,
                scale: float = 1.0) -> Float[Array, "*batch P"]:
    """Returns float32 angles [..., head_dim / 2] in radians of places in a grid.

    Args:
        pos_ids: row-major index in the grid.
        width: columns of the grid.
        head_dim: features of a head, a multiple of 4.
        theta: base of the frequencies.
        scale: multiplies row and column numbers (4/3 makes a 24-wide grid span a 32-wide one).
    """
    freqs = _frequencies(head_dim // 4, theta)
    places = jnp.stack([pos_ids // width, pos_ids % width], axis=-1).astype(jnp.float32)
    angles = (places * jnp.float32(scale))[..., None] * freqs
    return angles.reshape(*pos_ids.shape, head_dim // 2)


def rope(angles: Float[Array, "B L P"] | None) -> Rope | None:
    """Returns the cosines and sines of `angles`; computed once per stack, not once per layer."""
    return None if angles is None else Rope(jnp.cos(angles), jnp.sin(angles))


def apply_rotary(x: Float[Array, "B L H D"], turn: Rope) -> Float[Array, "B L H D"]:
    """Turns each pair of features (a, b) of x to (a·cos − b·sin, b·cos + a·sin), in float32.

    Differentiable in x alone: angles come from integers.
    """
    return _turn(x, turn.cos[:, :, None, :], turn.sin[:, :, None, :])


@jax.custom_vjp
def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).astype(jnp.float32)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _turn_forward(x: jax.Array, cos: jax.Array, sin: jax.Array
                  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _turn(x, cos, sin), (cos, sin)


def _turn_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
                   ) -> tuple[jax.Array, None, None]:
    # The transpose of a rotation is the rotation back; automatic differentiation would pad and add.
    cos, sin = residuals
    return _turn(gradient, cos, -sin), None, None


_turn.defvjp(_turn_forward, _turn_backward)
