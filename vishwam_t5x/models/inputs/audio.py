"""Spectrogram patches as encoder input, through an Audio Spectrogram Transformer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen as nn

from vishwam_t5x.models import modalities
from vishwam_t5x.models.inputs.pictures import PictureInputEncoder
from vishwam_t5x.models.layers import Embed
from vishwam_t5x.models.vision_transformer import AudioTransformer

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioInput:
    """Config of spectrograms as encoder input: AST features, projected to the width of the model.

    Attributes:
        transformer: what turns patches into features; a history may share it.
        grid: (time steps, mel bands) of patches in a whole spectrogram.
        modality: name of the modality in batches.
        rope_scale: multiplies row and column numbers before they become rotary angles; Unified-IO 2
            scales spectrograms as it does images.
        mean: subtracted from every number of a patch, in the units of the patches; or one a
            channel.
        std: every number is divided by it after that; or one a channel.
        freeze: no gradient reaches the transformer from here, as in Unified-IO 2.
        max_per_row: spectrograms that a packed row may hold, for each has tokens of its own in the
            transformer. More make the features of the others NaN, which stops a run.
    """

    transformer: AudioTransformer = AudioTransformer()
    grid: tuple[int, int] = (16, 8)
    modality: str = "audio"
    rope_scale: float = 4 / 3
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    freeze: bool = True
    max_per_row: int = 16

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("max_per_row",))
        modalities.check_normalization(self)
        object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def module_name(self) -> str:
        return f"input_{self.modality}_encoder"

    @property
    def table(self) -> None:
        return None

    @property
    def patch_dim(self) -> int:
        return self.transformer.patch_dim

    def check(self, config: EncoderDecoderConfig) -> None:
        modalities.check_grid(self, config.head_dim)

    def dummy(self) -> dict[str, Any]:
        return {"input": jnp.zeros((1, 1, self.patch_dim), jnp.float32)}

    def build(self, config: EncoderDecoderConfig, embedder: Embed | None,
              transformer: nn.Module | None) -> PictureInputEncoder:
        assert embedder is None and transformer is not None
        return PictureInputEncoder(config, self, transformer, name=self.module_name)
