"""What one-token-at-a-time decoding remembers: an explicit pytree, updated functionally."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vishwam_t5x.models.attention import KeysValues

LENGTH_AXIS = -2
"""Axis of cached keys and values along which tokens lie."""


class LayerCache(NamedTuple):
    """Cache of one decoder layer.

    Attributes:
        own: self-attention keys and values, [R, K, T, head_dim], slots not yet decoded arbitrary.
        cross: keys and values of the encoder's output, or of a decoder-only model's prefix,
            [B, K, L, head_dim].
    """

    own: KeysValues
    cross: KeysValues


@struct.dataclass
class DecodeCache:
    """Cache of a whole decoder; R = B · decodes rows, those of one example next to each other.

    The encoder's side is stored once per example, however many decodes (beams, samples) it has.

    Attributes:
        index: scalar int32, tokens decoded so far and so the position of the next one.
        layers: a tuple of `LayerCache`, or one with all arrays stacked on axis 0 (scanned layers).
        cross_bias: [B, 1, 1, L] additive mask of the encoder's slots (of those of the prefix).
        first: [B, 1, D], of a decoder-only model that writes one modality: the last slot of the
            prefix, which predicts the first token in the place of BOS; None for others.
        hidden: [B, T], which of the tokens to be decoded the task hid from the encoder; None: it
            hid nothing.
    """

    index: Int[Array, ""]
    layers: Any
    cross_bias: Float[Array, "B 1 1 L"]
    first: Float[Array, "B 1 D"] | None = None
    hidden: Bool[Array, "B T"] | None = None

    @property
    def stacked(self) -> bool:
        """Whether the layers are stacked on axis 0."""
        return isinstance(self.layers, LayerCache)

    @property
    def max_length(self) -> int:
        """Tokens the cache has room for."""
        return self._first().own.keys.shape[LENGTH_AXIS]

    @property
    def num_rows(self) -> int:
        """Rows decoded side by side, examples times decodes."""
        return self._first().own.keys.shape[-4]

    @property
    def num_decodes(self) -> int:
        """Decodes per example."""
        return self.num_rows // self.cross_bias.shape[0]

    def _first(self) -> LayerCache:
        return self.layers if self.stacked else self.layers[0]

    def advance(self, new: Sequence[KeysValues] | KeysValues) -> DecodeCache:
        """Returns the cache with the keys and values [R, K, 1, head_dim] of one more token."""

        def write(old: jax.Array, token: jax.Array) -> jax.Array:
            return write_token(old, token, self.index)

        if self.stacked:
            layers: Any = self.layers._replace(own=jax.tree.map(write, self.layers.own, new))
        else:
            layers = tuple(layer._replace(own=jax.tree.map(write, layer.own, token))
                           for layer, token in zip(self.layers, new, strict=True))
        return dataclasses.replace(self, layers=layers, index=self.index + 1)

    def reorder(self, rows: Int[Array, "R"]) -> DecodeCache:
        """Returns the cache whose row r continues what row `rows[r]` decoded.

        Rows may only move within their example: the encoder's side stays where it is.
        """
        axis = 1 if self.stacked else 0

        def move(layer: LayerCache) -> LayerCache:
            return layer._replace(own=jax.tree.map(
                lambda array: jnp.take(array, rows, axis=axis), layer.own))

        layers = move(self.layers) if self.stacked else tuple(map(move, self.layers))
        return dataclasses.replace(self, layers=layers)


def write_token(cached: Float[Array, "*batch T D"], token: Float[Array, "*batch 1 D"],
                index: Int[Array, ""]) -> Float[Array, "*batch T D"]:
    """Returns `cached` with `token` at position `index`."""
    return jax.lax.dynamic_update_slice_in_dim(cached, token.astype(cached.dtype), index,
                                               axis=cached.ndim + LENGTH_AXIS)
