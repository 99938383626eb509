"""Changes to input images that keep their meaning: each is a callable (image, rng) -> image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Shaped

from vishwam_t5x.core.errors import UserError

ImageAugmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Anything that turns (image [H, W, C], rng) into an image of the same shape and dtype."""


@dataclasses.dataclass(frozen=True)
class RandomShift:
    """Moves the image by up to `pixels` along each axis; what comes in from outside is zero.

    Attributes:
        pixels: largest shift, in pixels; each whole number in [-pixels, pixels] is equally likely.
        probability: chance that an image is moved at all, in [0, 1].
    """

    pixels: int = 1
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, int) or isinstance(self.pixels, bool) or self.pixels < 0:
            raise UserError("an image shift must be a whole number of pixels, 0 or more",
                            got=repr(self.pixels))
        if not 0 <= self.probability <= 1:
            raise UserError("RandomShift.probability must be in [0, 1]", got=self.probability)

    def __call__(self, image: Shaped[np.ndarray, "h w ..."],
                 rng: np.random.Generator) -> Shaped[np.ndarray, "h w ..."]:
        if self.probability < 1 and rng.random() >= self.probability:
            return image
        down, right = rng.integers(-self.pixels, self.pixels + 1, size=2)
        return shift(image, int(down), int(right))


def shift(image: Shaped[np.ndarray, "h w ..."], down: int,
          right: int) -> Shaped[np.ndarray, "h w ..."]:
    """Returns the image moved by (down, right) pixels, zero where nothing moved in."""
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    if abs(down) >= height or abs(right) >= width:
        return out
    out[max(down, 0):height + min(down, 0), max(right, 0):width + min(right, 0)] = (
        image[max(-down, 0):height + min(-down, 0), max(-right, 0):width + min(-right, 0)])
    return out


def augment(image: Shaped[np.ndarray, "h w ..."], steps: Sequence[ImageAugmentation],
            rng: np.random.Generator) -> Shaped[np.ndarray, "h w ..."]:
    """Applies each step in order.

    Raises:
        UserError: a step changed the shape or the dtype (the lengths are planned without it).
    """
    for step in steps:
        changed = step(image, rng)
        if changed.shape != image.shape or changed.dtype != image.dtype:
            raise UserError(
                f"the image augmentation {step!r} changed the shape or dtype",
                got=f"{image.shape} {image.dtype} -> {changed.shape} {changed.dtype}",
                fix="return an image of the same shape and dtype")
        image = changed
    return image
