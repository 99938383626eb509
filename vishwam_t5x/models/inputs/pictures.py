"""What images and spectrograms share as encoder input: the features of a transformer, projected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.models import modalities
from vishwam_t5x.models.layers import Dense, modality_embedding
from vishwam_t5x.models.positions import grid_angles

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig
    from vishwam_t5x.models.inputs.audio import AudioInput
    from vishwam_t5x.models.inputs.image import ImageInput


class PictureInputEncoder(nn.Module):
    """Features of two layers of the transformer, projected, plus the modality's own vector."""

    config: EncoderDecoderConfig
    input: ImageInput | AudioInput
    transformer: nn.Module

    @nn.compact
    def __call__(self, fields: modalities.Fields) -> InputSequence:
        """Embeds one modality of a batch.

        Args:
            fields: `input` [B, N, patch_dim], floating, or uint8 with 255 standing for 1.0;
                `mask` (default: ones), `pos_ids` (row-major index in the grid, default: 0, 1, …)
                and `segment_ids` (default: the mask; ascending along a row), all [B, N] int32.

        Raises:
            UserError: patches of another size than `patch_dim`.
        """
        cfg, policy, this = self.config, self.config.policy, self.input
        patches = modalities.require(fields, "input", f"inputs/{this.modality}")
        modalities.check_patches(this, patches, 3)
        slots = patches.shape[:2]
        mask = fields.get("mask", jnp.ones(slots, jnp.int32))
        segments = fields.get("segment_ids")
        pos_ids = modalities.positions_or_default(fields, slots)
        patches = modalities.normalize(patches, this.mean, this.std, jnp.float32)
        pictures = 1 if segments is None else this.max_per_row
        owners = (mask > 0).astype(jnp.int32) if segments is None else segments * (mask > 0)
        features = self.transformer(patches, pos_ids, owners, this.grid, pictures).joined()
        if this.freeze:
            features = jax.lax.stop_gradient(features)
        x = Dense(cfg.emb_dim, ("image_patch", "embed"), dtype=policy.compute_dtype,
                  param_dtype=policy.param_dtype, name="projection")(features)
        x = x + modality_embedding(self, cfg.emb_dim, policy)
        angles = None if cfg.rope_theta is None else grid_angles(
            pos_ids, this.grid[1], cfg.head_dim, cfg.rope_theta, this.rope_scale)
        return InputSequence.create(x, angles, mask, segments)
