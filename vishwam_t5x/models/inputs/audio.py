"""Spectrogram patches as encoder input, through an Audio Spectrogram Transformer."""

from __future__ import annotations

import dataclasses

from vishwam_t5x.models.inputs.pictures import PictureInput
from vishwam_t5x.models.vision_transformer import AudioTransformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioInput(PictureInput):
    """Spectrograms through an AST, which Unified-IO 2 freezes; see `PictureInput`."""

    transformer: AudioTransformer = AudioTransformer()
    grid: tuple[int, int] = (16, 8)
    modality: str = "audio"
    freeze: bool = True
