"""Multi-head attention: grouped keys, QK-norm or cosines, and rotary or relative positions."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vishwam_t5x.models import positions
from vishwam_t5x.models.layers import ATTENTION_KERNEL, Dense, Initializer, RMSNorm, named
from vishwam_t5x.parallelism.remat import ATTENTION_CONTEXT, ATTENTION_OUT, QKV
from vishwam_t5x.parallelism.sharding import constrain


class KeysValues(NamedTuple):
    """Keys and values as they are attended to and cached, [B, K, L, head_dim]."""

    keys: Float[Array, "B K L D"]
    values: Float[Array, "B K L D"]


def attend(queries: Float[Array, "B H Q D"], keys_values: KeysValues,
           bias: Float[Array, "B 1 Q K"], relative: Float[Array, "1 H Q K"] | None = None, *,
           float32_logits: bool, scale: float, key_dropout: nn.Dropout | None = None
           ) -> Float[Array, "B H Q D"]:
    """Softmax attention; query head n reads key head n // (H / K).

    The weights stay unnormalised until they have been applied: dividing [B, H, Q, D] instead of
    [B, H, Q, K] is the same to rounding and cheaper.

    Args:
        queries: [B, H, Q, D].
        keys_values: [B, K, L, D] each, K a divisor of H.
        bias: added to the logits, broadcast over the heads; in the dtype of the logits.
        relative: added to the logits, broadcast over the batch; in their dtype. None: nothing.
        float32_logits: logits and softmax in float32 whatever the dtype of the queries.
        scale: multiplies the queries.
        key_dropout: dropout of whole keys [B, H, K, 1], or None.

    Returns:
        [B, H, Q, D] in the dtype of the queries.
    """
    batch, num_heads, length, head_dim = queries.shape
    keys, values = keys_values
    num_kv_heads = keys.shape[1]
    grouped = (batch, num_kv_heads, num_heads // num_kv_heads * length)
    logits_dtype = jnp.float32 if float32_logits else queries.dtype
    scaled = (queries * scale if scale != 1.0 else queries).reshape(*grouped, head_dim)
    logits = jax.lax.dot_general(scaled, keys, (((3,), (3,)), ((0, 1), (0, 1))),
                                 preferred_element_type=logits_dtype)
    logits = logits.reshape(batch, num_heads, length, keys.shape[2]) + bias
    if relative is not None:
        logits = logits + relative
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    total = jnp.sum(weights, -1, keepdims=True, dtype=jnp.float32)
    weights = weights.astype(queries.dtype)
    if key_dropout is not None:
        weights, values = _drop(weights, values, key_dropout)
    context = jax.lax.dot_general(
        weights.reshape(*grouped, keys.shape[2]), values, (((3,), (2,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32)
    return (context.reshape(queries.shape) / total).astype(queries.dtype)


def attend_after_prefix(queries: Float[Array, "R H 1 D"], prefix: KeysValues, own: KeysValues,
                        bias: Float[Array, "B 1 1 K"], relative: Float[Array, "1 H 1 K"] | None,
                        *, float32_logits: bool, scale: float) -> Float[Array, "R H 1 D"]:
    """Softmax attention of one token of each decode to its example's prefix and its own tokens.

    Args:
        queries: [R, H, 1, D], R = B · decodes, those of one example next to each other.
        prefix: [B, K, P, D], stored once for all decodes of an example.
        own: [R, K, T, D].
        bias: added to the logits of all P + T keys.
        relative: added to them too, or None.
        float32_logits: as in `attend`.
        scale: multiplies the queries.
    """
    batch, kv_heads, prefix_length, head_dim = prefix.keys.shape
    grouped = queries.reshape(batch, -1, kv_heads, queries.shape[1] // kv_heads, head_dim)
    grouped = grouped * scale if scale != 1.0 else grouped
    own = KeysValues(*(part.reshape(batch, -1, *part.shape[1:]) for part in own))
    dtype = jnp.float32 if float32_logits else queries.dtype
    logits = jnp.concatenate(
        [jnp.einsum("bnkgd,bkpd->bnkgp", grouped, prefix.keys, preferred_element_type=dtype),
         jnp.einsum("bnkgd,bnktd->bnkgt", grouped, own.keys, preferred_element_type=dtype)], -1)
    logits = logits + bias[:, :, :, None, :]
    if relative is not None:
        logits = logits + relative.reshape(1, 1, kv_heads, -1, relative.shape[-1])
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    total = jnp.sum(weights, -1, keepdims=True, dtype=jnp.float32)
    before, after = jnp.split(weights.astype(queries.dtype), [prefix_length], axis=-1)
    context = (
        jnp.einsum("bnkgp,bkpd->bnkgd", before, prefix.values, preferred_element_type=jnp.float32)
        + jnp.einsum("bnkgt,bnktd->bnkgd", after, own.values, preferred_element_type=jnp.float32))
    return (context / total).astype(queries.dtype).reshape(queries.shape)


def _drop(weights: jax.Array, values: jax.Array, key_dropout: nn.Dropout
          ) -> tuple[jax.Array, jax.Array]:
    """Drops keys of a head for all queries alike.

    That is to drop their values, which are fewer numbers than the weights; but where query heads
    share values they drop different keys.
    """
    if weights.shape[1] == values.shape[1]:
        return weights, key_dropout(values, deterministic=False)
    kept = key_dropout(jnp.ones((*weights.shape[:2], weights.shape[3], 1), weights.dtype),
                       deterministic=False)
    return weights * kept.swapaxes(2, 3), values


def _unit(heads: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Vectors of length one, float32."""
    wide = heads.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), -1, keepdims=True) + 1e-12)


class Attention(nn.Module):
    """Projections, QK-norm (arXiv 2302.05442), rotation, `attend`, output projection.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads` (arXiv 2305.13245).
        head_dim: features of a head.
        features: size of the output.
        qk_norm: RMSNorm over each head of queries and keys, one scale vector for all heads.
        float32_logits: logits and softmax in float32.
        scale_logits: divide the logits by √head_dim; else the kernel of the queries starts smaller
            by that factor, as in T5.
        dropout_rate: share of attention weights zeroed, the same keys for every query of a head.
        dtype: dtype of matmuls.
        param_dtype: dtype of stored parameters.
        scaled_cosine: logits are cosines of query and key times a learned factor of each head, at
            most 100 (arXiv 2111.09883); goes without `qk_norm`, and `scale_logits` is not looked
            at.
        use_bias: each of the four projections adds a vector (a ViT's do).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    features: int
    qk_norm: bool = True
    float32_logits: bool = True
    scale_logits: bool = True
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    scaled_cosine: bool = False
    use_bias: bool = False

    def setup(self) -> None:
        assert not (self.scaled_cosine and self.qk_norm)

        def dense(features: int, axes: tuple[str, str], init: Initializer = ATTENTION_KERNEL
                  ) -> Dense:
            return Dense(features, axes, init, self.dtype, self.param_dtype, self.use_bias)

        query_init = ATTENTION_KERNEL if self.scale_logits else nn.initializers.variance_scaling(
            1.0 / self.head_dim, "fan_in", "normal")
        self.query = dense(self.num_heads * self.head_dim, ("embed", "joined_kv"), query_init)
        self.key = dense(self.num_kv_heads * self.head_dim, ("embed", "joined_kv"))
        self.value = dense(self.num_kv_heads * self.head_dim, ("embed", "joined_kv"))
        self.out = dense(self.features, ("joined_kv", "embed"))
        if self.qk_norm:
            self.query_norm = RMSNorm("kv", dtype=self.dtype, param_dtype=self.param_dtype)
            self.key_norm = RMSNorm("kv", dtype=self.dtype, param_dtype=self.param_dtype)
        if self.scaled_cosine:
            self.logit_scale = self.param(
                "logit_scale", named(
                    nn.initializers.constant(math.log(10)), "heads"),
                (self.num_heads,), self.param_dtype)
        self.key_dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-1,))

    def queries(self, x: Float[Array, "B L D"], rope: positions.Rope | None
                ) -> Float[Array, "B H L C"]:
        """Returns projected, normed and rotated queries."""
        heads = self._heads(self.query(x), self.num_heads)
        if self.qk_norm:
            heads = self.query_norm(heads)
        if self.scaled_cosine:
            factor = jnp.exp(jnp.minimum(self.logit_scale.astype(jnp.float32), math.log(100)))
            heads = (_unit(heads) * factor[:, None]).astype(heads.dtype)
        if rope is not None:
            heads = positions.apply_rotary(heads, rope)
        return heads.swapaxes(1, 2)

    def keys_values(self, x: Float[Array, "B L D"], rope: positions.Rope | None) -> KeysValues:
        """Returns projected, normed and rotated keys, and values."""
        keys = self._heads(self.key(x), self.num_kv_heads)
        values = self._heads(self.value(x), self.num_kv_heads)
        if self.qk_norm:
            keys = self.key_norm(keys)
        if self.scaled_cosine:
            keys = _unit(keys).astype(keys.dtype)
        if rope is not None:
            keys = positions.apply_rotary(keys, rope)
        return KeysValues(keys.swapaxes(1, 2), values.swapaxes(1, 2))

    def attend_to(self, queries: Float[Array, "B H Q C"], keys_values: KeysValues,
                  bias: Float[Array, "B 1 Q K"], relative: Float[Array, "1 H Q K"] | None = None,
                  enable_dropout: bool = False) -> Float[Array, "B Q D"]:
        """Returns the attended values after the output projection."""
        use_dropout = enable_dropout and self.dropout_rate > 0
        context = attend(queries, keys_values, bias, relative, float32_logits=self.float32_logits,
                         scale=self._scale, key_dropout=self.key_dropout if use_dropout else None)
        context = context.swapaxes(1, 2)
        context = checkpoint_name(context.reshape(*context.shape[:2], -1), ATTENTION_CONTEXT)
        context = constrain(context, ("batch", "length", "joined_kv"))
        return checkpoint_name(self.out(context), ATTENTION_OUT)

    def attend_after_prefix(self, queries: Float[Array, "R H 1 C"], prefix: KeysValues,
                            own: KeysValues, bias: Float[Array, "B 1 1 K"],
                            relative: Float[Array, "1 H 1 K"] | None) -> Float[Array, "R 1 D"]:
        """Returns what `attend_after_prefix` does, after the output projection."""
        context = attend_after_prefix(
            queries, prefix, own, bias, relative, float32_logits=self.float32_logits,
            scale=self._scale)
        context = context.swapaxes(1, 2)
        return self.out(context.reshape(*context.shape[:2], -1))

    def __call__(self, x: Float[Array, "B Q D"], context: Float[Array, "B K E"],
                 rope: positions.Rope | None, context_rope: positions.Rope | None,
                 bias: Float[Array, "B 1 Q K"], relative: Float[Array, "1 H Q K"] | None = None,
                 enable_dropout: bool = False) -> Float[Array, "B Q D"]:
        """Lets the slots of `x` attend to those of `context` (the same array: self-attention).

        Args:
            x: [B, Q, D] where the queries come from.
            context: [B, K, E] where keys and values come from.
            rope: rotation of the queries, or None.
            context_rope: rotation of the keys, or None.
            bias: additive mask, broadcast over heads.
            relative: relative position biases, broadcast over the batch, or None.
            enable_dropout: whether to drop attention weights; needs the rng 'dropout'.
        """
        return self.attend_to(self.queries(x, rope), self.keys_values(context, context_rope), bias,
                              relative, enable_dropout)

    @property
    def _scale(self) -> float:
        plain = self.scaled_cosine or not self.scale_logits
        return 1.0 if plain else 1.0 / math.sqrt(self.head_dim)

    def _heads(self, projected: jax.Array, num_heads: int) -> jax.Array:
        projected = checkpoint_name(projected, QKV)
        heads = projected.reshape(*projected.shape[:2], num_heads, self.head_dim)
        return constrain(heads, ("batch", "length", "heads", "kv"))
