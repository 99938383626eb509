"""The encoder: pre-norm blocks of self-attention and MLP over the joined input modalities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.models import masks, positions
from vishwam_t5x.models.attention import Attention
from vishwam_t5x.models.config import EncoderDecoderConfig, RelativePositions
from vishwam_t5x.models.layers import MlpBlock, RMSNorm, dropout
from vishwam_t5x.models.relative_positions import RelativePositionBias
from vishwam_t5x.models.scan import apply_layers
from vishwam_t5x.parallelism.sharding import constrain

RESIDUAL = ("batch", "length", "embed")
"""Logical axes of the residual stream."""


def make_norm(config: EncoderDecoderConfig) -> RMSNorm:
    """Returns the norm of the residual stream."""
    policy = config.policy
    return RMSNorm(dtype=policy.compute_dtype, param_dtype=policy.param_dtype)


def make_attention(config: EncoderDecoderConfig) -> Attention:
    """Returns attention of the sizes in `config`."""
    policy = config.policy
    return Attention(
        config.num_heads, config.kv_heads, config.head_dim, config.emb_dim, config.qk_norm,
        config.float32_attention_logits, config.scale_attention_logits, config.dropout_rate,
        policy.compute_dtype, policy.param_dtype)


def make_mlp(config: EncoderDecoderConfig) -> MlpBlock:
    """Returns the MLP of the sizes in `config`."""
    policy = config.policy
    return MlpBlock(config.mlp_dim, config.mlp_activations, config.dropout_rate,
                    policy.compute_dtype, policy.param_dtype)


def make_relative_bias(config: EncoderDecoderConfig, *, bidirectional: bool, in_layer: bool
                       ) -> RelativePositionBias | None:
    """Returns the relative position biases of a stack or of a layer; None where it has none."""
    position = config.position
    if not isinstance(position, RelativePositions) or position.per_layer != in_layer:
        return None
    return RelativePositionBias(
        config.num_heads, bidirectional, position.num_buckets, position.max_distance,
        logits_dtype(config), config.policy.param_dtype)


def logits_dtype(config: EncoderDecoderConfig) -> DTypeLike:
    """Returns the dtype of attention logits, and so of the masks added to them."""
    return jnp.dtype(jnp.float32) if config.float32_attention_logits \
        else config.policy.compute_dtype


class EncoderLayer(nn.Module):
    """x += Drop(Attention(Norm x)); x += Drop(MLP(Norm x))."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        cfg = self.config
        self.relpos_bias = make_relative_bias(cfg, bidirectional=True, in_layer=True)
        self.pre_attention_layer_norm = make_norm(cfg)
        self.attention = make_attention(cfg)
        self.pre_mlp_layer_norm = make_norm(cfg)
        self.mlp = make_mlp(cfg)
        self.dropout = dropout(cfg.dropout_rate)

    def __call__(self, x: Float[Array, "B L D"], rope: positions.Rope | None,
                 bias: Float[Array, "B 1 L L"], relative: Float[Array, "1 H L L"] | None = None,
                 enable_dropout: bool = False) -> Float[Array, "B L D"]:
        x = constrain(x, RESIDUAL)
        if self.relpos_bias is not None:
            relative = self.relpos_bias(x.shape[1], x.shape[1])
        y = self.pre_attention_layer_norm(x)
        y = self.attention(y, y, rope, rope, bias, relative, enable_dropout)
        x = x + self.dropout(y, deterministic=not enable_dropout)
        y = self.mlp(self.pre_mlp_layer_norm(x), enable_dropout)
        x = x + self.dropout(y, deterministic=not enable_dropout)
        return constrain(x, RESIDUAL)


class Encoder(nn.Module):
    """A stack of `EncoderLayer` and a final norm."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        cfg = self.config
        if cfg.scan_layers:
            self.encoder = EncoderLayer(cfg)
        else:
            self.layers = [EncoderLayer(cfg) for _ in range(cfg.num_encoder_layers)]
        self.relpos_bias = make_relative_bias(cfg, bidirectional=True, in_layer=False)
        self.encoder_norm = make_norm(cfg)
        self.input_dropout = dropout(cfg.dropout_rate)
        self.output_dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(self, sequence: InputSequence, enable_dropout: bool = False
                 ) -> Float[Array, "B L D"]:
        """Returns the encoded slots; those of padding (segment 0) mean nothing.

        Args:
            sequence: embedded slots in row order.
            enable_dropout: whether to drop; needs the rng 'dropout'.
        """
        cfg = self.config
        rope = positions.rope(sequence.angles)
        bias = masks.to_bias(masks.encoder_mask(sequence.segment_ids), logits_dtype(cfg))
        length = sequence.segment_ids.shape[1]
        relative = None if self.relpos_bias is None else self.relpos_bias(length, length)

        def body(layer: EncoderLayer, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return layer(x, rope, bias, relative, enable_dropout), None

        x = constrain(sequence.embeddings, RESIDUAL)
        x = self.input_dropout(x, deterministic=not enable_dropout)
        x, _ = apply_layers(self.encoder if cfg.scan_layers else self.layers, body, x,
                            num_layers=cfg.num_encoder_layers, policy=cfg.remat_policy)
        return self.output_dropout(self.encoder_norm(x), deterministic=not enable_dropout)
