"""Image preprocessing in tf.data: files to pixels of one size."""

from __future__ import annotations

import tensorflow as tf

from vishwam_t5x.core.errors import UserError


def read_files(dataset: tf.data.Dataset, feature: str) -> tf.data.Dataset:
    """Replaces the path in `feature` (scalar string) by the content of that file.

    A file that is missing raises `tf.errors.NotFoundError`, with its name, when it is reached.
    """
    return dataset.map(lambda example: {**example, feature: tf.io.read_file(example[feature])},
                       num_parallel_calls=tf.data.AUTOTUNE)


def decode_image(dataset: tf.data.Dataset, feature: str, height: int, width: int,
                 channels: int = 3) -> tf.data.Dataset:
    """Turns encoded JPEG, PNG, BMP or GIF (first frame) into pixels of one size.

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

    def decode(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        pixels = tf.io.decode_image(example[feature], channels=channels, dtype=tf.float32,
                                    expand_animations=False)
        pixels = tf.image.resize_with_pad(pixels, height, width, antialias=True)
        # Antialiasing may overshoot by a rounding error.
        pixels = tf.clip_by_value(pixels, 0.0, 1.0)
        return {**example, feature: tf.ensure_shape(pixels, (height, width, channels))}

    return dataset.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
