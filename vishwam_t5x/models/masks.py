"""Who may attend to whom, from segment ids; built once per stack as an additive bias."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


def masked_logit(dtype: DTypeLike) -> float:
    """Returns the finite stand-in for -inf in `dtype`: -1e10, or what float16 can hold.

    Finite, so that a query that may attend to nothing (padding) gets a uniform average and not NaN.
    """
    return max(-1e10, float(jnp.finfo(dtype).min) / 2)


def to_bias(allowed: Bool[Array, "B Q K"], dtype: DTypeLike) -> Float[Array, "B 1 Q K"]:
    """Returns 0 where `allowed` and `masked_logit` elsewhere, with an axis for heads."""
    bias = jnp.where(allowed, 0.0, masked_logit(dtype)).astype(dtype)
    return bias[:, None, :, :]


def same_segment(queries: Int[Array, "B Q"], keys: Int[Array, "B K"]) -> Bool[Array, "B Q K"]:
    """Returns whether query and key belong to the same example; padding (0) belongs to none."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys > 0)[:, None, :]


def encoder_mask(segment_ids: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Every slot of an example sees the whole example."""
    return same_segment(segment_ids, segment_ids)


def decoder_mask(segment_ids: Int[Array, "B M"], modality: Int[Array, "B M"],
                 prefix: Bool[Array, "B M"] | None = None) -> Bool[Array, "B M M"]:
    """Causal in row order, within one example and one modality (Unified-IO 2 keeps them apart).

    Slots of the `prefix` of an example see one another whatever their order, and are seen by all
    that follow.
    """
    same_modality = modality[:, :, None] == modality[:, None, :]
    columns = jnp.arange(segment_ids.shape[1])
    causal = columns[:, None] >= columns[None, :]
    seen = causal[None]
    if prefix is not None:
        seen = seen | (prefix[:, :, None] & prefix[:, None, :])
        same_modality = same_modality | prefix[:, None, :]
    return same_segment(segment_ids, segment_ids) & same_modality & seen
