"""T5X's T5 network (`t5x.examples.t5.network`) as a configuration of our encoder-decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vishwam_t5x.models import config as models
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.precision.policy import Policy

STANDS_FOR = "t5x.examples.t5.network"


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5; the defaults are T5X's.

    Attributes:
        vocab_size: rows of the embedding table.
        dtype: of activations and matmuls.
        emb_dim: width.
        num_heads: heads.
        num_encoder_layers: encoder blocks.
        num_decoder_layers: decoder blocks.
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
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: Sequence[str] = ("relu",)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False

    def ours(self, param_dtype: str = "float32") -> models.EncoderDecoderConfig:
        """Returns the configuration of ours that builds the same network."""
        return encoder_decoder_config(self, param_dtype)


def encoder_decoder_config(config: Any, param_dtype: str, **more: Any
                           ) -> models.EncoderDecoderConfig:
    """Returns the configuration of ours for one of T5X's.

    Args:
        config: T5X's.
        param_dtype: dtype that parameters are kept in.
        **more: fields of ours beyond T5's.
    """
    precision: Any = config.dtype
    if param_dtype != "float32":
        precision = Policy(param_dtype=param_dtype, compute_dtype=config.dtype)
    return models.EncoderDecoderConfig(
        emb_dim=config.emb_dim, num_heads=config.num_heads, head_dim=config.head_dim,
        mlp_dim=config.mlp_dim, num_encoder_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        mlp_activations=tuple(config.mlp_activations), dropout_rate=config.dropout_rate,
        inputs=(models.TextInput(vocab_size=config.vocab_size, modality_embedding=False),),
        targets=(models.TextOutput(vocab_size=config.vocab_size, modality_embedding=False,
                                   logits_via_embedding=config.logits_via_embedding),),
        position=models.RelativePositions(), qk_norm=False, scale_attention_logits=False,
        float32_attention_logits=config.float32_attention_logits, precision=precision, **more)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The network of a config.

    Attributes:
        config: its sizes.
    """

    config: T5Config

    def ours(self, param_dtype: str = "float32") -> EncoderDecoder:
        """Returns the module of ours; its parameters are kept in `param_dtype`."""
        return EncoderDecoder(self.config.ours(param_dtype))
