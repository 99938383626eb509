"""Text tokens as decoder output."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
from flax import linen as nn

from vishwam_t5x.models import modalities
from vishwam_t5x.models.layers import Embed
from vishwam_t5x.models.outputs.targets import TargetEncoder
from vishwam_t5x.models.positions import text_angles

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOutput:
    """Config of text as decoder output.

    Attributes:
        vocab_size: rows of the embedding table, in tokens; the text input shares the table.
        modality: name of the modality in batches.
        modality_embedding: add a learned vector to every slot: Unified-IO 2 does, T5 does not.
        logits_via_embedding: predict with the embedding table, scaled by 1/√emb_dim (T5 1.0,
            Unified-IO 2); else with a kernel of its own (T5 1.1).
    """

    vocab_size: int
    modality: str = "text"
    modality_embedding: bool = True
    logits_via_embedding: bool = True

    offset: ClassVar[int] = 0
    adaptor: ClassVar[str] = "none"
    head: ClassVar[str] = "linear"
    dynamic_mask: ClassVar[bool] = False
    reads_task_mask: ClassVar[bool] = False
    pattern_width: ClassVar[int] = 0

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("vocab_size",))

    @property
    def module_name(self) -> str:
        return f"target_encoders_{self.modality}"

    @property
    def table(self) -> modalities.Table:
        return modalities.Table(self.modality, self.vocab_size)

    def check(self, config: EncoderDecoderConfig) -> None:
        """Text goes with any sizes."""

    def decoder_inputs(self, fields: modalities.Fields) -> jax.Array:
        return modalities.require(fields, "inputs", f"targets/{self.modality}")

    def next_inputs(self, tokens: jax.Array, hidden: jax.Array, index: jax.Array) -> jax.Array:
        return tokens

    def angles(self, pos_ids: jax.Array, head_dim: int, theta: float) -> jax.Array:
        return text_angles(pos_ids, head_dim, theta)

    def build(self, config: EncoderDecoderConfig, embedder: Embed) -> nn.Module:
        return TargetEncoder(config, self, embedder, name=self.module_name)
