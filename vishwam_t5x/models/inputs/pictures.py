"""What images and spectrograms share as encoder input: the features of a transformer, projected."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vishwam_t5x.core.errors import one_of
from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.models import modalities
from vishwam_t5x.models.layers import Dense, Embed, MlpAdaptor, modality_embedding
from vishwam_t5x.models.positions import grid_angles
from vishwam_t5x.models.vision_transformer import Transformer

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureInput:
    """Config of what is cut into patches and read by a transformer, projected to the model's width.

    Attributes:
        transformer: what turns patches into features; a history may share it.
        grid: (rows, columns) of patches in a whole image, (time steps, mel bands) in a spectrogram.
        modality: name of the modality in batches.
        rope_scale: multiplies row and column numbers before they become rotary angles; Unified-IO 2
            scales spectrograms as it does images.
        mean: subtracted from every number of a patch, in the units of the patches; or one a
            channel.
        std: every number is divided by it after that; or one a channel.
        freeze: the transformer does not learn from here. Unless another input teaches it, it stays
            bit for bit as it is: no gradient, no update, no weight decay, no optimizer state. The
            projector learns all the same.
        features: 'both': those of two layers side by side (Unified-IO 2), 'last': of the last one.
        projector: 'linear': one matmul to the width of the model, 'mlp': two layers with a GELU
            between (LLaVA-1.5, arXiv 2310.03744).
        placeholder: text token that gives way to the features, see `models.placement`; None: they
            stand behind the text.
        max_per_row: images or spectrograms that a packed row may hold, for each has tokens of its
            own in the transformer. What packs rows keeps to it (`data.source.batch_spec`); more
            would make the features of the others NaN, which stops a run.
    """

    transformer: Transformer
    grid: tuple[int, int]
    modality: str
    rope_scale: float = 4 / 3
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    freeze: bool = False
    features: Literal["both", "last"] = "both"
    projector: Literal["linear", "mlp"] = "linear"
    placeholder: int | None = None
    max_per_row: int = 16

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("max_per_row",))
        one_of(self.features, ("both", "last"), f"{type(self).__name__}.features")
        one_of(self.projector, ("linear", "mlp"), f"{type(self).__name__}.projector")
        modalities.check_normalization(self)
        object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def module_name(self) -> str:
        return f"input_{self.modality}_encoder"

    @property
    def table(self) -> None:
        return None

    @property
    def placeholders(self) -> tuple[int, ...]:
        return () if self.placeholder is None else (self.placeholder,)

    @property
    def num_features(self) -> int:
        """Numbers that the projector reads of each patch."""
        return self.transformer.emb_dim * (2 if self.features == "both" else 1)

    @property
    def patch_dim(self) -> int:
        return self.transformer.patch_dim

    @property
    def teaches_transformer(self) -> bool:
        return not self.freeze

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return ()

    def check(self, config: EncoderDecoderConfig) -> None:
        modalities.check_grid(self, config.head_dim)
        self.transformer.check_grid(self.grid)

    def dummy(self) -> dict[str, Any]:
        return {"input": jnp.zeros((1, 1, self.patch_dim), jnp.float32)}

    def build(self, config: EncoderDecoderConfig, embedder: Embed | None,
              transformer: nn.Module | None) -> PictureInputEncoder:
        assert embedder is None and transformer is not None
        return PictureInputEncoder(config, self, transformer, name=self.module_name)


class PictureInputEncoder(nn.Module):
    """Features of the transformer, projected, plus the modality's own vector."""

    config: EncoderDecoderConfig
    input: PictureInput
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
        found = self.transformer(patches, pos_ids, owners, this.grid, pictures)
        features = found.joined() if this.features == "both" else found.last
        if this.freeze:
            features = jax.lax.stop_gradient(features)
        projection = (functools.partial(MlpAdaptor, axis="image_patch")
                      if this.projector == "mlp" else
                      functools.partial(Dense, kernel_axes=("image_patch", "embed")))
        x = projection(cfg.emb_dim, dtype=policy.compute_dtype, param_dtype=policy.param_dtype,
                       name="projection")(features)
        x = x + modality_embedding(self, cfg.emb_dim, policy)
        angles = None if cfg.rope_theta is None else grid_angles(
            pos_ids, this.grid[1], cfg.head_dim, cfg.rope_theta, this.rope_scale)
        return InputSequence.create(x, angles, mask, segments)
