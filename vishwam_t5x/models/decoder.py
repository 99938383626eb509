"""The decoder: causal self-attention, cross-attention and MLP; whole rows or a token at a time.

Without an encoder there is no cross-attention, and the row is a prefix with its continuation: see
`models.prefix`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vishwam_t5x.core.sequence import TargetSequence
from vishwam_t5x.models import masks, patterns, positions
from vishwam_t5x.models.attention import KeysValues
from vishwam_t5x.models.cache import DecodeCache, LayerCache, write_token
from vishwam_t5x.models.config import EncoderDecoderConfig
from vishwam_t5x.models.encoder import (
    RESIDUAL,
    logits_dtype,
    make_attention,
    make_mlp,
    make_norm,
    make_relative_bias,
)
from vishwam_t5x.models.layers import dropout
from vishwam_t5x.models.scan import apply_layers
from vishwam_t5x.parallelism.sharding import constrain


@struct.dataclass
class Encoded:
    """The encoder's output and what cross-attention must know about it.

    Attributes:
        hidden: [B, L, D] in the compute dtype.
        angles: [B, L, head_dim / 2] float32 rotary angles of the slots, or None.
        segment_ids: [B, L] int32, number of the example in its row from 1; 0 is padding.
    """

    hidden: Float[Array, "B L D"]
    angles: Float[Array, "B L P"] | None
    segment_ids: Int[Array, "B L"]


class DecoderLayer(nn.Module):
    """As `EncoderLayer`, with cross-attention between self-attention and MLP if it has encoders."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        cfg = self.config
        self.relpos_bias = make_relative_bias(cfg, bidirectional=False, in_layer=True)
        self.pre_self_attention_layer_norm = make_norm(cfg)
        self.self_attention = make_attention(cfg)
        if not cfg.decoder_only:
            self.pre_cross_attention_layer_norm = make_norm(cfg)
            self.encoder_decoder_attention = make_attention(cfg)
        self.pre_mlp_layer_norm = make_norm(cfg)
        self.mlp = make_mlp(cfg)
        self.dropout = dropout(cfg.dropout_rate)

    def __call__(self, x: Float[Array, "B M D"], encoded: Float[Array, "B L D"] | None,
                 rope: positions.Rope | None, encoded_rope: positions.Rope | None,
                 self_bias: Float[Array, "B 1 M M"], cross_bias: Float[Array, "B 1 M L"] | None,
                 relative: Float[Array, "1 H M M"] | None = None, enable_dropout: bool = False
                 ) -> Float[Array, "B M D"]:
        x = constrain(x, RESIDUAL)
        if self.relpos_bias is not None:
            relative = self.relpos_bias(x.shape[1], x.shape[1])
        y = self.pre_self_attention_layer_norm(x)
        y = self.self_attention(y, y, rope, rope, self_bias, relative, enable_dropout)
        x = x + self.dropout(y, deterministic=not enable_dropout)
        if encoded is not None:
            assert cross_bias is not None
            y = self.pre_cross_attention_layer_norm(x)
            y = self.encoder_decoder_attention(y, encoded, rope, encoded_rope, cross_bias, None,
                                               enable_dropout)
            x = x + self.dropout(y, deterministic=not enable_dropout)
        y = self.mlp(self.pre_mlp_layer_norm(x), enable_dropout)
        x = x + self.dropout(y, deterministic=not enable_dropout)
        return constrain(x, RESIDUAL)

    def encode_context(self, encoded: Float[Array, "B L D"], rope: positions.Rope | None
                       ) -> KeysValues:
        """Returns cross-attention keys and values of the encoder's output."""
        return self.encoder_decoder_attention.keys_values(encoded, rope)

    def prefill(self, x: Float[Array, "B N D"], rope: positions.Rope | None,
                bias: Float[Array, "B 1 N N"], relative: Float[Array, "1 H N N"] | None
                ) -> tuple[Float[Array, "B N D"], KeysValues]:
        """Runs a prefix; returns its output and its self-attention keys and values."""
        if self.relpos_bias is not None:
            relative = self.relpos_bias(x.shape[1], x.shape[1])
        y = self.pre_self_attention_layer_norm(x)
        own = self.self_attention.keys_values(y, rope)
        queries = self.self_attention.queries(y, rope)
        x = x + self.self_attention.attend_to(queries, own, bias, relative)
        return x + self.mlp(self.pre_mlp_layer_norm(x)), own

    def step(self, x: Float[Array, "R 1 D"], cache: LayerCache, index: Int[Array, ""],
             rope: positions.Rope | None, cross_bias: Float[Array, "B 1 1 L"],
             relative: Float[Array, "1 H 1 T"] | None = None,
             pattern: Bool[Array, "#R T"] | None = None
             ) -> tuple[Float[Array, "R 1 D"], KeysValues]:
        """Runs one token; returns its output and its self-attention keys and values.

        Of a decoder-only model `cross_bias` and `relative` are of the prefix and the own tokens.
        `pattern` says which of the earlier tokens are seen, None: all.
        """
        y = self.pre_self_attention_layer_norm(x)
        new = self.self_attention.keys_values(y, rope)
        own = jax.tree.map(lambda old, token: write_token(old, token, index), cache.own, new)
        max_length = own.keys.shape[2]
        if self.config.decoder_only:
            return self._step_after_prefix(x, y, own, new, cache.cross, index, rope, cross_bias,
                                           relative)
        if self.relpos_bias is not None:
            relative = self.relpos_bias.at(index, max_length)
        seen = (jnp.arange(max_length) <= index)[None]
        if pattern is not None:
            seen = seen & pattern
        bias = masks.to_bias(seen[:, None, :], logits_dtype(self.config))
        queries = self.self_attention.queries(y, rope)
        x = x + self.self_attention.attend_to(queries, own, bias, relative)
        # The decodes of an example stand in the place of query positions: they share its keys.
        y = self.pre_cross_attention_layer_norm(x).reshape(cross_bias.shape[0], -1, x.shape[-1])
        queries = self.encoder_decoder_attention.queries(y, rope)
        y = self.encoder_decoder_attention.attend_to(queries, cache.cross, cross_bias)
        x = x + y.reshape(x.shape)
        return x + self.mlp(self.pre_mlp_layer_norm(x)), new


    def _step_after_prefix(self, x: jax.Array, y: jax.Array, own: KeysValues, new: KeysValues,
                           prefix: KeysValues, index: jax.Array, rope: positions.Rope | None,
                           bias: jax.Array, relative: jax.Array | None
                           ) -> tuple[jax.Array, KeysValues]:
        if self.relpos_bias is not None:
            length = prefix.keys.shape[2]
            relative = self.relpos_bias.at(length + index, length + own.keys.shape[2])
        queries = self.self_attention.queries(y, rope)
        x = x + self.self_attention.attend_after_prefix(queries, prefix, own, bias, relative)
        return x + self.mlp(self.pre_mlp_layer_norm(x)), new


class Decoder(nn.Module):
    """A stack of `DecoderLayer` and a final norm."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        cfg = self.config
        if cfg.scan_layers:
            self.decoder = DecoderLayer(cfg)
        else:
            self.layers = [DecoderLayer(cfg) for _ in range(cfg.num_decoder_layers)]
        self.relpos_bias = make_relative_bias(cfg, bidirectional=False, in_layer=False)
        self.decoder_norm = make_norm(cfg)
        self.input_dropout = dropout(cfg.dropout_rate)
        self.output_dropout = dropout(cfg.dropout_rate)

    def __call__(self, sequence: TargetSequence, encoded: Encoded | None,
                 enable_dropout: bool = False) -> Float[Array, "B M D"]:
        """Returns the hidden states after the final norm; those of padding mean nothing.

        Args:
            sequence: embedded decoder inputs in row order.
            encoded: the encoder's output; None where there is no encoder.
            enable_dropout: whether to drop; needs the rng 'dropout'.
        """
        cfg = self.config
        dtype = logits_dtype(cfg)
        rope = positions.rope(sequence.angles)
        allowed = masks.decoder_mask(sequence.segment_ids, sequence.modality, sequence.prefix)
        pattern = sequence.pattern
        if pattern is not None:
            allowed = allowed & patterns.visible_mask(pattern.visible)
        self_bias = masks.to_bias(allowed, dtype)
        read = encoded_rope = cross_bias = None
        if encoded is not None:
            read, encoded_rope = encoded.hidden, positions.rope(encoded.angles)
            cross_bias = masks.to_bias(
                masks.same_segment(sequence.segment_ids, encoded.segment_ids), dtype)
        length = sequence.segment_ids.shape[1]
        relative = None if self.relpos_bias is None else self.relpos_bias(length, length)

        def body(layer: DecoderLayer, x: jax.Array, plane: Any) -> tuple[jax.Array, None]:
            bias = self_bias
            if pattern is not None and plane is not None:
                bias = masks.to_bias(allowed & patterns.plane_mask(plane, pattern), dtype)
            return layer(x, read, rope, encoded_rope, bias, cross_bias, relative,
                         enable_dropout), None

        x = constrain(sequence.embeddings, RESIDUAL)
        x = self.input_dropout(x, deterministic=not enable_dropout)
        x, _ = apply_layers(self._layers(), body, x, self._planes(),
                            num_layers=cfg.num_decoder_layers, policy=cfg.remat_policy)
        return self.output_dropout(self.decoder_norm(x), deterministic=not enable_dropout)

    def init_cache(self, encoded: Encoded, max_length: int, num_decodes: int = 1) -> DecodeCache:
        """Returns an empty cache: room for `max_length` tokens, and the encoder's keys and values.

        Only the example with segment number 1 of each row is attended to: decode unpacked rows.

        Args:
            encoded: the encoder's output, one example a row.
            max_length: most tokens to be decoded.
            num_decodes: rows to decode for each example (beams or samples).
        """
        cfg = self.config
        dtype = cfg.policy.compute_dtype
        batch = encoded.hidden.shape[0]
        shape = (batch * num_decodes, cfg.kv_heads, max_length, cfg.head_dim)
        rope = positions.rope(encoded.angles)

        def body(layer: DecoderLayer, carry: None, _: Any) -> tuple[None, LayerCache]:
            own = KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
            return carry, LayerCache(own, layer.encode_context(encoded.hidden, rope))

        _, layers = apply_layers(self._layers(), body, None, num_layers=cfg.num_decoder_layers)
        ones = jnp.ones((batch, 1), jnp.int32)
        bias = masks.to_bias(masks.same_segment(ones, encoded.segment_ids), logits_dtype(cfg))
        return DecodeCache(jnp.zeros((), jnp.int32), layers, bias)

    def prefill(self, sequence: TargetSequence, max_length: int, num_decodes: int = 1,
                last_predicts: bool = True) -> DecodeCache:
        """Returns the cache of a decoder-only model that has read its prefix.

        Args:
            sequence: BOS and the inputs, from `prefix.align_right`; with rotary angles if any.
            max_length: most tokens to be decoded.
            num_decodes: rows to decode for each example (beams or samples).
            last_predicts: whether the last slot predicts the first token; else BOS follows it.
        """
        cfg = self.config
        dtype, segments = cfg.policy.compute_dtype, sequence.segment_ids
        batch, length = segments.shape
        kept = length - last_predicts
        shape = (batch * num_decodes, cfg.kv_heads, max_length, cfg.head_dim)
        rope = positions.rope(sequence.angles)
        bias = masks.to_bias(masks.same_segment(segments, segments), logits_dtype(cfg))
        relative = None if self.relpos_bias is None else self.relpos_bias(length, length)

        def body(layer: DecoderLayer, x: jax.Array, _: Any) -> tuple[jax.Array, LayerCache]:
            x, read = layer.prefill(x, rope, bias, relative)
            own = KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
            # The last slot is run again, with what it predicts: see `DecodeCache.first`.
            return x, LayerCache(own, jax.tree.map(lambda array: array[:, :, :kept], read))

        x = constrain(sequence.embeddings, RESIDUAL)
        _, layers = apply_layers(self._layers(), body, x, num_layers=cfg.num_decoder_layers)
        seen = masks.to_bias(segments[:, None, :kept] > 0, logits_dtype(cfg))
        return DecodeCache(jnp.zeros((), jnp.int32), layers, seen,
                           sequence.embeddings[:, -1:] if last_predicts else None)

    def step(self, x: Float[Array, "R 1 D"], angles: Float[Array, "1 1 P"] | None,
             cache: DecodeCache, pattern_width: int = 0,
             visible: Bool[Array, "R T"] | None = None
             ) -> tuple[Float[Array, "R 1 D"], DecodeCache]:
        """Returns the hidden state of one more token, after the final norm, and the cache.

        Args:
            x: its input.
            angles: its rotary angles.
            cache: of the step before.
            pattern_width: columns of the grid whose patterns narrow the attention; 0: none do.
            visible: inputs that others may see; None: all.
        """
        cfg = self.config
        rope = positions.rope(angles)
        before, bias = 0, cache.cross_bias
        if cfg.decoder_only:
            before = bias.shape[-1]
            seen = jnp.broadcast_to(jnp.arange(cache.max_length) <= cache.index,
                                    (bias.shape[0], 1, cache.max_length))
            bias = jnp.concatenate([bias, masks.to_bias(seen, bias.dtype)], axis=-1)
        if cache.first is not None:
            last = jnp.repeat(cache.first, cache.num_decodes, axis=0)
            x = jnp.where(cache.index == 0, last, x)
        relative = None if self.relpos_bias is None else self.relpos_bias.at(
            before + cache.index, before + cache.max_length)

        def body(layer: DecoderLayer, x: jax.Array, own: tuple[LayerCache, Any]
                 ) -> tuple[jax.Array, KeysValues]:
            layer_cache, plane = own
            pattern = None if visible is None else patterns.visible_at(visible, cache.index)
            if pattern_width:
                own_plane = patterns.in_pattern(plane, cache.index, jnp.arange(cache.max_length),
                                                jnp.full(cache.max_length, pattern_width))[None]
                pattern = own_plane if pattern is None else own_plane & pattern
            return layer.step(x, layer_cache, cache.index, rope, bias, relative, pattern)

        planes = self._planes()
        if cfg.scan_layers:
            each: Any = (cache.layers, planes)
        else:
            each = tuple(zip(cache.layers, planes or (None,) * len(cache.layers), strict=True))
        x, new = apply_layers(self._layers(), body, x, each, num_layers=cfg.num_decoder_layers)
        return self.decoder_norm(x), cache.advance(new)

    def _layers(self) -> Any:
        return self.decoder if self.config.scan_layers else self.layers

    def _planes(self) -> Any:
        """The pattern each layer follows, None where the config has no patterns."""
        if not any(target.pattern_width for target in self.config.targets):
            return None
        planes = patterns.layer_planes(self.config.num_decoder_layers)
        return jnp.asarray(planes) if self.config.scan_layers else planes
