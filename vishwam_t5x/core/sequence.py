"""Checked pytrees for what a modality hands to the encoder and to the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class InputSequence:
    """Embedded slots of one input modality, or of several after `concatenate`.

    Attributes:
        embeddings: [B, N, D] in the compute dtype.
        angles: [B, N, head_dim / 2] float32, rotary angle of each pair of features, or None for
            models whose positions are not rotary.
        segment_ids: [B, N] int32, number of the example within its row from 1; 0 is padding.
    """

    embeddings: Float[Array, "B N D"]
    angles: Float[Array, "B N P"] | None
    segment_ids: Int[Array, "B N"]

    @classmethod
    def create(cls, embeddings: jax.Array, angles: jax.Array | None, mask: jax.Array,
               segment_ids: jax.Array | None = None) -> InputSequence:
        """Builds a sequence; `segment_ids` defaults to the mask (one example a row)."""
        segments = mask if segment_ids is None else segment_ids * (mask > 0)
        segments = segments.astype(jnp.int32)
        assert embeddings.ndim == 3 and embeddings.shape[:2] == segments.shape, (
            embeddings.shape, segments.shape)
        assert angles is None or angles.shape[:2] == segments.shape, angles.shape
        return cls(embeddings, angles, segments)

    @staticmethod
    def concatenate(parts: Sequence[InputSequence]) -> InputSequence:
        """Joins modalities along the slot axis, in the order given."""
        assert parts
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)


@struct.dataclass
class Pattern:
    """What decides which earlier slots of its example a target slot sees; see `models.patterns`.

    Attributes:
        places: [B, M] int32, row-major place of the slot's target in its grid.
        widths: [B, M] int32, columns of that grid; 0: no grid, all earlier slots are seen.
        visible: [B, M] bool, whether the slot's input may be seen by others.
    """

    places: Int[Array, "B M"]
    widths: Int[Array, "B M"]
    visible: Bool[Array, "B M"]


@struct.dataclass
class TargetSequence:
    """Embedded decoder inputs of one target modality and what they should predict.

    Attributes:
        embeddings: [B, M, D] in the compute dtype (of the inputs shifted right).
        angles: [B, M, head_dim / 2] float32, or None.
        segment_ids: [B, M] int32, as in `InputSequence`.
        modality: [B, M] int32, number of the modality, or of one of several answers in it;
            attention stays within it, but for the `prefix`.
        prefix: [B, M] bool, slots that all slots of the prefix of their example see, later ones
            too (decoder-only models); None: causal throughout.
        pattern: what narrows causal attention further; None: nothing.
    """

    embeddings: Float[Array, "B M D"]
    angles: Float[Array, "B M P"] | None
    segment_ids: Int[Array, "B M"]
    modality: Int[Array, "B M"]
    prefix: Bool[Array, "B M"] | None = None
    pattern: Pattern | None = None

    @staticmethod
    def concatenate(parts: Sequence[TargetSequence]) -> TargetSequence:
        """Joins modalities along the slot axis, in the order given."""
        assert parts
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)
