"""T5X's `t5x.examples.decoder_only.network`: a decoder that reads the inputs as a prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vishwam_t5x.compat.t5 import network
from vishwam_t5x.models import config as models
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

STANDS_FOR = "t5x.examples.decoder_only.network"


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a decoder-only model; the defaults are T5X's.

    Attributes:
        vocab_size: rows of the embedding table.
        dtype: of activations and matmuls.
        emb_dim: width.
        num_heads: heads.
        num_layers: blocks.
        head_dim: features of a head.
        mlp_dim: hidden units.
        mlp_activations: whose product is the hidden layer.
        dropout_rate: share of features dropped in training.
        logits_via_embedding: logits by the embedding table.
        float32_attention_logits: attention logits in float32.
    """

    vocab_size: int
    dtype: str = "float32"
    emb_dim: int = 512
    num_heads: int = 8
    num_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: Sequence[str] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False

    num_encoder_layers = 0

    @property
    def num_decoder_layers(self) -> int:
        """All of them."""
        return self.num_layers

    def ours(self, param_dtype: str = "float32") -> models.EncoderDecoderConfig:
        """See `network.T5Config.ours`."""
        return network.encoder_decoder_config(self, param_dtype)


@dataclasses.dataclass(frozen=True)
class DecoderWrapper:
    """The network of a config.

    Attributes:
        config: its sizes.
    """

    config: TransformerConfig

    def ours(self, param_dtype: str = "float32") -> EncoderDecoder:
        """See `network.Transformer.ours`."""
        return EncoderDecoder(self.config.ours(param_dtype))
