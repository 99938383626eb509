"""SeqIO output features of clean examples: what a Task declares for text, pixels, codes and audio.

The *name* of a feature says what becomes of it: `text_inputs`, `text_targets`, `image_inputs`,
`image_history_inputs`, `audio_inputs`, `audio_history_inputs`, `image_targets` and
`image_target_codes` are supervised; `text`, `image`, `image_codes` and `audio` are neutral and get
the mixture of denoisers.
"""

from __future__ import annotations

import seqio
import tensorflow as tf

from vishwam_t5x.core.errors import UserError


def text_feature(vocabulary: seqio.Vocabulary) -> seqio.Feature:
    """Token ids, int32 [length]; without EOS and prefix token, which the objective adds."""
    return seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32, rank=1)


def image_feature(dtype: tf.DType = tf.float32) -> seqio.ContinuousFeature:
    """Pixels [height, width, channels]: float32 in [0, 1], or uint8 to keep the cache small.

    Raises:
        UserError: `dtype` is neither.
    """
    if dtype not in (tf.float32, tf.uint8):
        raise UserError("an image feature is float32 in [0, 1] or uint8", got=str(dtype))
    return seqio.ContinuousFeature(dtype=dtype, rank=3)


def audio_feature() -> seqio.ContinuousFeature:
    """A spectrogram, float32 [frames, mel filters]."""
    return seqio.ContinuousFeature(dtype=tf.float32, rank=2)


def frames_feature(dtype: tf.DType = tf.uint8) -> seqio.ContinuousFeature:
    """Frames of a video, or further images, [n, height, width, channels]; n may be 0.

    Raises:
        UserError: `dtype` is neither uint8 nor float32 in [0, 1].
    """
    if dtype not in (tf.float32, tf.uint8):
        raise UserError("a feature of frames is float32 in [0, 1] or uint8", got=str(dtype))
    return seqio.ContinuousFeature(dtype=dtype, rank=4)


def segments_feature() -> seqio.ContinuousFeature:
    """Spectrograms of earlier segments of sound, float32 [n, frames, mel filters]; n may be 0."""
    return seqio.ContinuousFeature(dtype=tf.float32, rank=3)


def codes_feature(num_codes: int) -> seqio.Feature:
    """Codes of a discrete codec, int32 [length], each in [0, num_codes).

    Raises:
        UserError: `num_codes` is not positive.
    """
    if num_codes < 1:
        raise UserError("a codebook has at least one code", got=num_codes)
    return seqio.Feature(seqio.PassThroughVocabulary(num_codes), add_eos=False, dtype=tf.int32,
                         rank=1)
