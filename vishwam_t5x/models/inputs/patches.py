"""Patches of a grid as encoder input: image patches and spectrogram patches."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.models import modalities
from vishwam_t5x.models.layers import Dense, Embed, modality_embedding, named
from vishwam_t5x.models.positions import grid_angles

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchInput(modalities.WithoutTransformer):
    """Config of flattened patches that one matmul projects to the width of the model.

    Attributes:
        modality: name of the modality in batches, e.g. 'image' or 'audio'.
        patch_dim: numbers in one patch, e.g. 16 · 16 · 3.
        grid: (rows, columns) of patches in a whole image, or (time steps, mel bands).
        rope_scale: multiplies row and column numbers before they become rotary angles.
        mean: subtracted from every number of a patch, in the units of the patches; or one a
            channel. A patch of zeros says nothing after a norm that only knows directions, so
            centre what is dark.
        std: every number is divided by it after that; or one a channel.
        learned_positions: adds a learned vector for each place of the grid, as a ViT does, beside
            the rotary positions: on a small grid those tell places apart only by attention.
        placeholder: text token that gives way to the patches, see `models.placement`; None: they
            stand behind the text.
    """

    modality: str
    patch_dim: int
    grid: tuple[int, int]
    rope_scale: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    learned_positions: bool = False
    placeholder: int | None = None

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("patch_dim",))
        modalities.check_normalization(self)
        object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def module_name(self) -> str:
        return f"input_{self.modality}_encoder"

    @property
    def table(self) -> modalities.Table | None:
        return None

    @property
    def placeholders(self) -> tuple[int, ...]:
        return () if self.placeholder is None else (self.placeholder,)

    def check(self, config: EncoderDecoderConfig) -> None:
        modalities.check_grid(self, config.head_dim)

    def dummy(self) -> dict[str, Any]:
        return {"input": jnp.zeros((1, 1, self.patch_dim), jnp.float32)}

    def build(self, config: EncoderDecoderConfig, embedder: Embed | None,
              transformer: nn.Module | None) -> PatchInputEncoder:
        assert embedder is None and transformer is None
        return PatchInputEncoder(config, self, name=self.module_name)


class PatchInputEncoder(nn.Module):
    """Linear patch projection plus the modality's own vector; positions are places in the grid."""

    config: EncoderDecoderConfig
    input: PatchInput

    @nn.compact
    def __call__(self, fields: modalities.Fields) -> InputSequence:
        """Embeds one modality of a batch.

        Args:
            fields: `input` [B, N, patch_dim], floating, or uint8 with 255 standing for 1.0;
                `mask` (default: ones), `pos_ids` (row-major index in the grid, default: 0, 1, …)
                and `segment_ids` (default: the mask), all [B, N] int32.

        Raises:
            UserError: patches of another size than `patch_dim`.
        """
        cfg, policy, where = self.config, self.config.policy, f"inputs/{self.input.modality}"
        patches = modalities.require(fields, "input", where)
        modalities.check_patches(self.input, patches, 3)
        slots = patches.shape[:2]
        mask = fields.get("mask", jnp.ones(slots, jnp.int32))
        patches = modalities.normalize(patches, self.input.mean, self.input.std,
                                       policy.compute_dtype)
        x = Dense(cfg.emb_dim, ("image_patch", "embed"), dtype=policy.compute_dtype,
                  param_dtype=policy.param_dtype, name="projection")(patches)
        x = x + modality_embedding(self, cfg.emb_dim, policy)
        pos_ids = modalities.positions_or_default(fields, slots)
        if self.input.learned_positions:
            x = x + self._positions(pos_ids)
        angles = None if cfg.rope_theta is None else grid_angles(
            pos_ids, self.input.grid[1], cfg.head_dim, cfg.rope_theta, self.input.rope_scale)
        return InputSequence.create(x, angles, mask, fields.get("segment_ids"))

    @nn.nowrap
    def _positions(self, pos_ids: jax.Array) -> jax.Array:
        """Returns the learned vectors [B, N, D] of places in the grid."""
        policy, (height, width) = self.config.policy, self.input.grid
        table = self.param(
            "position_embedding",
            named(nn.initializers.normal(0.02), "image_patch", "embed"),
            (height * width, self.config.emb_dim), policy.param_dtype)
        return jnp.take(table.astype(policy.compute_dtype), pos_ids, axis=0, mode="clip")
