"""Text tokens as encoder input."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.models import modalities
from vishwam_t5x.models.layers import Embed, modality_embedding
from vishwam_t5x.models.positions import text_angles

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextInput(modalities.WithoutTransformer):
    """Config of text tokens as encoder input.

    Attributes:
        vocab_size: rows of the embedding table, in tokens; the text output shares the table.
        modality: name of the modality in batches.
        modality_embedding: add a learned vector to every slot: Unified-IO 2 does, T5 does not.
    """

    vocab_size: int
    modality: str = "text"
    modality_embedding: bool = True

    offset: ClassVar[int] = 0
    placeholders: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("vocab_size",))

    @property
    def module_name(self) -> str:
        return f"input_{self.modality}_encoder"

    @property
    def table(self) -> modalities.Table:
        return modalities.Table(self.modality, self.vocab_size)

    @property
    def patch_dim(self) -> None:
        return None

    def check(self, config: EncoderDecoderConfig) -> None:
        """Text goes with any sizes."""

    def dummy(self) -> dict[str, Any]:
        return {"tokens": jnp.ones((1, 1), jnp.int32)}

    def build(self, config: EncoderDecoderConfig, embedder: Embed | None,
              transformer: nn.Module | None) -> TextInputEncoder:
        assert embedder is not None and transformer is None
        return TextInputEncoder(config, self, embedder, name=self.module_name)


class TextInputEncoder(nn.Module):
    """Token embedding plus, if configured, the modality's own vector; positions are 1-D."""

    config: EncoderDecoderConfig
    input: TextInput
    embedder: Embed

    @nn.compact
    def __call__(self, fields: modalities.Fields) -> InputSequence:
        """Embeds one modality of a batch.

        Args:
            fields: `tokens` [B, N] int32; `mask` (default: tokens > 0), `pos_ids` (default: 0, 1,
                2, …) and `segment_ids` (default: the mask), all [B, N] int32.
        """
        cfg = self.config
        tokens = modalities.require(fields, "tokens", f"inputs/{self.input.modality}")
        mask = fields.get("mask", (tokens > 0).astype(jnp.int32))
        x = self.embedder(tokens)
        if self.input.modality_embedding:
            x = x + modality_embedding(self, cfg.emb_dim, cfg.policy)
        pos_ids = modalities.positions_or_default(fields, tokens.shape)
        angles = None if cfg.rope_theta is None else text_angles(pos_ids, cfg.head_dim,
                                                                 cfg.rope_theta)
        return InputSequence.create(x, angles, mask, fields.get("segment_ids"))
