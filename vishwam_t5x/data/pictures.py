"""Pictures of any kind as RGB pixels of one size: read, converted, resized, padded or cropped.

The geometry is Unified-IO 2's (Lu et al. 2023, arXiv:2312.17172): the aspect ratio is kept; for
evaluation the whole picture is centred on black, for training its scale and place are drawn.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.data import fast_pictures

MAX_PIXELS = 100_000_000
"""Of a picture that is read: a small file may claim to be much larger than memory."""
_FILTERS = ("bilinear", "bicubic", "lanczos", "box")
"""Ways to resize, one of which is drawn for training."""


def decode_picture(data: bytes, channels: int = 3) -> UInt8[np.ndarray, "height width channels"]:
    """Returns the pixels of a picture file, of an animation the first frame.

    Grey and palette pictures become RGB, transparent ones are laid on white, 16-bit ones keep their
    upper 8 bits, and a camera's note of how it was held (EXIF) is followed.

    Args:
        data: content of a file of any format that Pillow reads by itself.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: it cannot be read whole, is too large, or is PostScript, which is never run.
    """
    return _array(_opened(data, channels))


def _array(image: Any) -> UInt8[np.ndarray, "height width channels"]:
    return np.asarray(image, np.uint8).reshape(image.height, image.width, len(image.getbands()))


def _opened(data: bytes, channels: int) -> Any:
    """`decode_picture`, as Pillow's image."""
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise UserError("a picture has 1 or 3 channels", got=channels)
    if not data:
        raise UserError("the image is an empty file")
    try:
        with Image.open(io.BytesIO(data)) as file:
            if file.format == "EPS":  # a program: Pillow would let Ghostscript run it
                raise UserError("the image is a PostScript program, not a picture")
            if file.width * file.height > MAX_PIXELS:
                raise UserError("the image is too large",
                                got=f"{file.width} x {file.height}, at most {MAX_PIXELS} pixels")
            file.load()
            # Both ways to change it would copy what needs no change.
            upright = fast_pictures.is_upright(file)
            image = _flat(file if upright else ImageOps.exif_transpose(file))
            mode = "L" if channels == 1 else "RGB"
            return image if image.mode == mode else image.convert(mode)
    except UserError:
        raise
    except (*fast_pictures.DAMAGED, Image.DecompressionBombError) as error:
        why = "the format is not known" if isinstance(error, Image.UnidentifiedImageError) else (
            str(error))
        raise UserError("the image cannot be read", got=why) from error


def _flat(image: Any) -> Any:
    """Returns an image of 8 bits a channel without transparency."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        # Pillow holds 16-bit pixels in modes of 16 or 32 bits; in its own conversion all of 256
        # and more would be white.
        if image.mode == "F" or (values.size and not 0 <= values.min() <= values.max() < 65536):
            raise UserError("the image has pixels that are not 8 or 16 bits", got=image.mode)
        clear = image.info.get("transparency")  # one grey that is seen through
        return Image.fromarray(np.where(values == clear, 255, values // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


class Picture(NamedTuple):
    """A picture of the model's size.

    Attributes:
        pixels: uint8 [height, width, channels]; 0 outside the picture.
        inside: where the picture is, not padding, [height, width].
    """

    pixels: UInt8[np.ndarray, "height width channels"]
    inside: Bool[np.ndarray, "height width"]


@dataclasses.dataclass(frozen=True)
class PictureConfig:
    """How pictures get the size of the model.

    Attributes:
        height: of the result, in pixels; 384 in Unified-IO 2, 256 for frames and targets.
        width: of the result, in pixels.
        random: draw scale and place, for training; the others are for `random` only.
        least_scale: the picture is at least so many times as large as the result;
        most_scale: and at most so many times.
        fit_probability: chance that the scale is that of the side which then fits (the longer one
            for its size), so that at scale 1 all is seen; else that of the other.
        least_side: no side becomes shorter than this many pixels.
        resize: how `read_picture` reads JPEG files. 'exact': as other pictures, by Pillow,
            antialiased; 'fast': see `fast_pictures`; the filter is always linear. Scale and place
            are the same.
    """

    height: int = 384
    width: int = 384
    random: bool = False
    least_scale: float = 0.75
    most_scale: float = 4 / 3
    fit_probability: float = 0.5
    least_side: int = 64
    resize: Literal["exact", "fast"] = "exact"

    def __post_init__(self) -> None:
        for name in ("height", "width", "least_side"):
            if getattr(self, name) < 1:
                raise UserError(f"PictureConfig.{name} must be at least 1 pixel",
                                got=getattr(self, name))
        if not 0 < self.least_scale <= self.most_scale:
            raise UserError("PictureConfig.least_scale must be above 0 and not above most_scale",
                            got=f"{self.least_scale} and {self.most_scale}")
        if not 0 <= self.fit_probability <= 1:
            raise UserError("PictureConfig.fit_probability must be in [0, 1]",
                            got=self.fit_probability)
        one_of(self.resize, ("exact", "fast"), "PictureConfig.resize")


def as_done(config: PictureConfig) -> PictureConfig:
    """Returns what `read_picture` does on this machine: 'fast' needs packages that may be missing.
    """
    if config.resize == "fast" and fast_pictures.codecs() is None:
        return dataclasses.replace(config, resize="exact")
    return config


class _Spot(NamedTuple):
    """What part of a picture becomes what part of the result; (vertical, horizontal) each.

    Attributes:
        low: where the part begins, in pixels of the picture.
        high: where it ends.
        shown: pixels of the result that it becomes.
        begin: the first of them.
        method: Pillow's filter.
    """

    low: np.ndarray
    high: np.ndarray
    shown: np.ndarray
    begin: np.ndarray
    method: str


def read_picture(data: bytes, channels: int = 3, config: PictureConfig = PictureConfig(),
                 rng: np.random.Generator | None = None) -> Picture:
    """Returns the picture of a file at the model's size: `decode_picture`, then `place`.

    Args:
        data: content of a file of any format that Pillow reads by itself.
        channels: 3 for RGB, 1 for grey.
        config: the size wanted, whether scale and place are drawn, and `resize`.
        rng: what they are drawn from, for `config.random`.

    Raises:
        UserError: as `decode_picture`.
    """
    if config.resize == "fast" and channels in (1, 3) and (
            size := fast_pictures.plain_size(data)) and size[0] * size[1] <= MAX_PIXELS:
        spot = _spot(*size, config, rng)
        box = (*spot.low.tolist(), *spot.high.tolist())
        pixels = fast_pictures.read(data, channels, size, box, tuple(spot.shown.tolist()))
        if pixels is not None:
            return _on_black(pixels, spot, config)
        return _on_black(_resized(_opened(data, channels), spot), spot, config)
    image = _opened(data, channels)
    spot = _spot(image.height, image.width, config, rng)
    return _on_black(_resized(image, spot), spot, config)


def place(pixels: UInt8[np.ndarray, "h w channels"], config: PictureConfig = PictureConfig(),
          rng: np.random.Generator | None = None) -> Picture:
    """Resizes a picture and puts it into one of the model's size.

    Args:
        pixels: of any size.
        config: the size wanted, and whether scale and place are drawn.
        rng: what they are drawn from, for `config.random`.

    Returns:
        The picture; without `random` all of it, centred.

    Raises:
        UserError: it has no pixels.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    if not height or not width:
        raise UserError("the image has no pixels", got=f"{height} x {width}")
    spot = _spot(height, width, config, rng)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return _on_black(_resized(image, spot), spot, config)


def _spot(height: int, width: int, config: PictureConfig, rng: np.random.Generator | None
          ) -> _Spot:
    wanted = np.asarray((config.height, config.width))
    ratios = wanted / (height, width)
    if not config.random:
        scale, method = ratios.min(), "bilinear"
    else:
        assert rng is not None, "random pictures need a generator"
        fits = rng.random() < config.fit_probability
        scale = (ratios.min() if fits else ratios.max()) * rng.uniform(
            config.least_scale, config.most_scale)
        scale = max(scale, config.least_side / min(height, width))
        method = _FILTERS[int(rng.integers(len(_FILTERS)))]
    size = np.maximum(np.rint(np.multiply((height, width), scale)).astype(int), 1)
    # A side much longer than the result is cut before it is resized: no memory for what is not
    # seen.
    spare = size - wanted
    room = np.maximum(spare, 0)
    first = rng.integers(0, room + 1) if config.random and rng is not None else room // 2
    shown = np.minimum(size, wanted)
    begin = np.maximum(-spare, 0) // 2
    step = np.asarray((height, width)) / size
    return _Spot(first * step, np.minimum((first + shown) * step, (height, width)), shown, begin,
                 method)


def _resized(image: Any, spot: _Spot) -> UInt8[np.ndarray, "rows columns channels"]:
    """The part of Pillow's image, resized."""
    from PIL import Image

    (top, left), (bottom, right) = spot.low, spot.high
    return _array(image.resize((int(spot.shown[1]), int(spot.shown[0])),
                               Image.Resampling[spot.method.upper()],
                               box=(left, top, right, bottom), reducing_gap=None))


def _on_black(resized: UInt8[np.ndarray, "rows columns channels"], spot: _Spot,
              config: PictureConfig) -> Picture:
    out = np.zeros((config.height, config.width, resized.shape[2]), np.uint8)
    inside = np.zeros((config.height, config.width), bool)
    region = tuple(slice(int(b), int(b + n)) for b, n in zip(spot.begin, spot.shown, strict=True))
    out[region], inside[region] = resized, True
    return Picture(out, inside)


def patches_inside(inside: Bool[np.ndarray, "height width"], patch: int
                   ) -> Bool[np.ndarray, "patches"]:
    """Returns which patches count as picture: those whose pixel at the centre is in it.

    Row-major; the pixel is the one at (patch / 2, patch / 2), which nearest-neighbour resizing
    takes.

    Raises:
        UserError: a side is not a multiple of the patch.
    """
    height, width = inside.shape
    if height % patch or width % patch:
        raise UserError("the sides of an image must be multiples of its patch",
                        got=f"{height} x {width} with patches of {patch}")
    return inside[patch // 2::patch, patch // 2::patch].reshape(-1)


def sample_patches(inside: Bool[np.ndarray, "patches"], most: int | float | None,
                   rng: np.random.Generator) -> Int[np.ndarray, "n"]:
    """Draws which patches the encoder is given; their numbers are the positions they keep.

    Those of the picture come first, in random order, then those of the padding, as many as asked
    for; the result is sorted.

    Args:
        inside: which patches are picture.
        most: how many; a float: this share of all, rounded; None: all that are picture.
        rng: what they are drawn from.

    Raises:
        UserError: `most` is not positive, or a share above 1; or no patch is picture: it is too
            narrow.
    """
    if not inside.any():
        raise UserError("the image is too narrow: it covers no patch",
                        got=f"{len(inside)} patches of padding")
    if most is None:
        return np.flatnonzero(inside).astype(np.int32)
    if most <= 0 or (isinstance(most, float) and most > 1):
        raise UserError("a sample of patches is a positive number of them, or a share up to 1",
                        got=most)
    number = round(most * len(inside)) if isinstance(most, float) else most
    order = rng.permutation(len(inside))
    order = np.concatenate([order[inside[order]], order[~inside[order]]])
    return np.sort(order[:max(number, 1)]).astype(np.int32)


def scaled(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Returns pixels in [0, 1], float32: what a model makes of uint8 patches by itself."""
    return pixels.astype(np.float32) / np.float32(255)
