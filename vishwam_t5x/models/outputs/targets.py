"""How a target modality enters the decoder; shared by text and by codes of a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vishwam_t5x.models.layers import Embed, modality_embedding

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig
    from vishwam_t5x.models.modalities import TargetConfig


class TargetEncoder(nn.Module):
    """Token embedding plus the modality's own vector, for teacher forcing and for decoding."""

    config: EncoderDecoderConfig
    target: TargetConfig
    embedder: Embed

    @nn.compact
    def __call__(self, inputs: Int[Array, "B M"], pos_ids: Int[Array, "B M"]
                 ) -> tuple[Float[Array, "B M D"], Float[Array, "B M P"]]:
        """Returns embeddings of decoder inputs, and the rotary angles of what they predict.

        Args:
            inputs: ids shifted right, 0 at the start of an example.
            pos_ids: place of the predicted token in its own example.
        """
        cfg = self.config
        x = self.embedder(inputs) + modality_embedding(self, cfg.emb_dim, cfg.policy)
        return x, self.angles(pos_ids)

    def angles(self, pos_ids: Int[Array, "*batch"]) -> Float[Array, "*batch P"]:
        """Returns the rotary angles of positions of this modality."""
        return self.target.angles(pos_ids, self.config.head_dim, self.config.position.theta)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Returns float32 logits over the modality's own table."""
        return self.embedder.logits(hidden)

    def table(self) -> jax.Array:
        """Returns the modality's table [V, D]."""
        return self.embedder.table()
