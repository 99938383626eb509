"""Image patches as encoder input, through a vision transformer."""

from __future__ import annotations

import dataclasses

from vishwam_t5x.models.inputs.pictures import PictureInput
from vishwam_t5x.models.vision_transformer import ImageTransformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageInput(PictureInput):
    """Images through a ViT; see `PictureInput`."""

    transformer: ImageTransformer = ImageTransformer()
    grid: tuple[int, int] = (24, 24)
    modality: str = "image"
