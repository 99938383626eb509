"""JPEG files read and resized in less than half the time: pixels near the exact way's, not equal.

Decoded by libjpeg-turbo (simplejpeg), straight to a half, quarter or eighth where that is still
large enough, and resized by OpenCV, linearly and without antialiasing. Only what is plain is read
here: whole RGB or grey JPEG files of 8 bits, held upright.
"""

from __future__ import annotations

import functools
import io
import logging
import struct
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, LookupError,
           ArithmeticError, struct.error)
"""What Pillow's readers raise for damaged files, besides DecompressionBombError; which depends on
the format."""

_logger = logging.getLogger(__name__)
_ORIENTATION = 274  # the EXIF entry that says how a camera was held
_SHRINK = (8, 4, 2, 1)  # what libjpeg-turbo is quick at
_STEEPEST = 2.0  # times smaller; beyond it lines would break up without antialiasing


class Codecs(NamedTuple):
    """The two packages."""

    jpeg: ModuleType
    cv2: ModuleType


@functools.cache
def codecs() -> Codecs | None:
    """Returns the packages that this way needs; None, said once, where they are not installed."""
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        _logger.warning("PictureConfig.resize = 'fast' needs %s: pictures are read exactly, more "
                        "slowly; pip install 'vishwam_t5x[images]'", error.name)
        return None
    cv2.setNumThreads(1)  # a picture is small, and its neighbours are read beside it
    return Codecs(simplejpeg, cv2)


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a file that can be read here, by its header; None of others."""
    from PIL import Image

    if not data.startswith(b"\xff\xd8") or codecs() is None:
        return None
    try:
        with Image.open(io.BytesIO(data)) as file:
            plain = file.format == "JPEG" and file.mode in ("RGB", "L") and is_upright(file)
            return (file.height, file.width) if plain else None
    except (*DAMAGED, Image.DecompressionBombError):
        return None  # the exact way says what it is


def is_upright(file: Any) -> bool:
    """Whether an image of Pillow's needs no turning for how the camera was held."""
    return file.getexif().get(_ORIENTATION) not in range(2, 9)


def read(data: bytes, channels: int, size: tuple[int, int], box: tuple[float, float, float, float],
         shown: tuple[int, int]) -> UInt8[np.ndarray, "rows columns channels"] | None:
    """Returns a part of a picture, resized; None if the file is damaged or shrinks too much.

    Args:
        data: a file of which `plain_size` returned a size.
        channels: 3 for RGB, 1 for grey.
        size: that size, (height, width).
        box: the part, (top, left, bottom, right) in pixels.
        shown: (rows, columns) of the result.
    """
    found = codecs()
    assert found is not None, "plain_size has asked"
    steps = (box[2] - box[0]) / shown[0], (box[3] - box[1]) / shown[1]
    shrink = next(shrink for shrink in _SHRINK if shrink <= max(min(steps), 1))
    if max(steps) > _STEEPEST * shrink:
        return None
    try:
        pixels = found.jpeg.decode_jpeg(
            data, colorspace="RGB" if channels == 3 else "GRAY",
            min_height=-(-size[0] // shrink), min_width=-(-size[1] // shrink))
    except ValueError:  # strict: a file that libjpeg only warns of is left to the exact way
        return None
    cv2 = found.cv2
    if np.allclose(box, (0, 0, *size)):
        if pixels.shape[:2] != shown:
            pixels = cv2.resize(pixels, shown[::-1], interpolation=cv2.INTER_LINEAR)
        return pixels.reshape(*shown, channels)
    down, across = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
    tall, wide = steps[0] * down, steps[1] * across
    # Pixel i covers i to i + 1; OpenCV counts from the middle of the first.
    back = np.asarray([[wide, 0, box[1] * across + (wide - 1) / 2],
                       [0, tall, box[0] * down + (tall - 1) / 2]])
    pixels = cv2.warpAffine(pixels, back, shown[::-1], borderMode=cv2.BORDER_REPLICATE,
                            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return pixels.reshape(*shown, channels)
