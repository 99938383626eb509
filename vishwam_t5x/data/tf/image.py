"""Image preprocessing in tf.data: files to pixels of one size.

`decode_picture` gives uint8, which keeps caches small; `decode_image` resizes in TensorFlow, as
Unified-IO 2's evaluation does, for float32 pixels like the original's. Both read what
`data.pictures` reads, and refuse what is broken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.data import conversions, pictures
from vishwam_t5x.data.pictures import PictureConfig as PictureConfig
from vishwam_t5x.data.tf.refusals import ID, map_or_refuse


def decode_image(dataset: tf.data.Dataset, feature: str, height: int, width: int,
                 channels: int = 3) -> tf.data.Dataset:
    """Turns files of pictures of any kind into pixels of one size; broken ones are refused.

    The image keeps its aspect ratio, is resized (bilinear, antialiased) to fit and centred on
    black: nothing is cropped away.

    Args:
        dataset: examples whose `feature` is the content of an image file, scalar string.
        feature: name of the feature to decode in place.
        height: rows of the result, in pixels.
        width: columns of the result, in pixels.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        the dataset with `feature` as float32 [height, width, channels] in [0, 1].

    Raises:
        UserError: the size or the number of channels cannot be.
    """
    if height < 1 or width < 1 or channels not in (1, 3):
        raise UserError("an image has a positive size and 1 or 3 channels",
                        got=f"{height} x {width} x {channels}")
    conversions.note("decode_image", feature, height=height, width=width, channels=channels)

    def decode(data: bytes) -> tuple[np.ndarray]:
        return (pictures.decode_picture(data, channels),)

    def resize(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        pixels = tf.image.convert_image_dtype(example[feature], tf.float32)
        if_refused = tf.zeros((1, 1, channels))  # there is nothing to be resized
        pixels = tf.cond(tf.size(pixels) > 0, lambda: pixels, lambda: if_refused)
        pixels = tf.image.resize_with_pad(pixels, height, width, antialias=True)
        # Antialiasing may overshoot by a rounding error.
        pixels = tf.clip_by_value(pixels, 0.0, 1.0)
        return {**example, feature: tf.ensure_shape(pixels, (height, width, channels))}

    whole = map_or_refuse(dataset, decode, [feature],
                          {feature: tf.TensorSpec((None, None, channels), tf.uint8)})
    return whole.map(resize, num_parallel_calls=tf.data.AUTOTUNE)


def decode_picture(dataset: tf.data.Dataset, feature: str, config: PictureConfig = PictureConfig(),
                   channels: int = 3, seed: int = 0, patches: str | None = None,
                   patch_size: int = 16, sample: int | float | None = None) -> tf.data.Dataset:
    """Turns files of pictures of any kind into pixels of one size; broken ones are refused.

    Args:
        dataset: examples whose `feature` is the content of an image file, scalar string; their
            `meta_id`, with `seed`, decides what is drawn for them.
        feature: becomes uint8 [height, width, channels].
        config: the size, and whether scale and place are drawn.
        channels: 3 (RGB) or 1 (grey).
        seed: of what is drawn.
        patches: name of a feature to add: the numbers of the patches that the encoder is to be
            given, int32 [n]; those of padding are left out. None: it is given all.
        patch_size: side of those patches, in pixels.
        sample: at most so many patches, or this share; see `pictures.sample_patches`.

    Raises:
        UserError: something is drawn, but examples have no `meta_id`; or a sample without a name.
    """
    if sample is not None and patches is None:
        raise UserError("a sample of patches needs a feature for their numbers", got=sample,
                        fix="patches='image_input_patches'")
    if (config.random or sample is not None) and ID not in dataset.element_spec:
        raise UserError("what is drawn for an example needs its name", got=f"no feature '{ID}'",
                        fix=f"let the source give each example a '{ID}'")
    conversions.note("decode_picture", feature, config=pictures.as_done(config), channels=channels,
                     seed=seed, patches=patches, patch_size=patch_size, sample=sample)

    def decode(data: bytes, name: bytes = b"") -> tuple[np.ndarray, ...]:
        rng = example_generator(seed, 0, f"picture/{bytes(name).decode('utf-8', 'replace')}")
        picture = pictures.read_picture(data, channels, config, rng)
        if patches is None:
            return (picture.pixels,)
        inside = pictures.patches_inside(picture.inside, patch_size)
        return picture.pixels, pictures.sample_patches(inside, sample, rng)

    outputs = {feature: tf.TensorSpec((config.height, config.width, channels), tf.uint8)}
    if patches is not None:
        outputs[patches] = tf.TensorSpec((None,), tf.int32)
    names = [feature, ID] if ID in dataset.element_spec else [feature]
    return map_or_refuse(dataset, decode, names, outputs)


def decode_frames(dataset: tf.data.Dataset, feature: str,
                  config: PictureConfig = PictureConfig(height=256, width=256), channels: int = 3,
                  max_frames: int = 8, patches: str | None = None, patch_size: int = 16
                  ) -> tf.data.Dataset:
    """Turns lists of image files into the frames of a video; one without frames is refused.

    Args:
        dataset: examples whose `feature` holds the contents of image files, strings [n].
        feature: becomes uint8 [n, height, width, channels].
        config: the size; nothing is drawn.
        channels: 3 (RGB) or 1 (grey).
        max_frames: a video of more is refused: choose frames before.
        patches: name of a feature to add: the numbers of the patches that are picture, not padding,
            int32 [m], counted on from frame to frame. None: the encoder is given all.
        patch_size: side of those patches, in pixels.

    Raises:
        UserError: `config` draws: the frames of a video must keep together.
    """
    if config.random:
        raise UserError("the frames of a video are not scaled and placed at random")
    conversions.note("decode_frames", feature, config=pictures.as_done(config), channels=channels,
                     max_frames=max_frames, patches=patches, patch_size=patch_size)

    def decode(files: Sequence[bytes]) -> tuple[np.ndarray, ...]:
        if not len(files):
            raise UserError("the video has no frames")
        if len(files) > max_frames:
            raise UserError("the video has too many frames",
                            got=f"{len(files)}, at most {max_frames}")
        frames = [pictures.read_picture(each, channels, config) for each in files]
        pixels = np.stack([frame.pixels for frame in frames])
        if patches is None:
            return (pixels,)
        inside = np.stack([pictures.patches_inside(frame.inside, patch_size) for frame in frames])
        if not (some := inside.any(axis=1)).all():
            raise UserError("a frame is too narrow: it covers no patch",
                            got=f"frame {int(np.argmin(some)) + 1} of {len(frames)}")
        return pixels, np.flatnonzero(inside).astype(np.int32)

    outputs = {feature: tf.TensorSpec((None, config.height, config.width, channels), tf.uint8)}
    if patches is not None:
        outputs[patches] = tf.TensorSpec((None,), tf.int32)
    return map_or_refuse(dataset, decode, [feature], outputs)
