"""Sound preprocessing in tf.data: files to spectrograms. The numbers are `data.recordings`'."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import conversions, recordings
from vishwam_t5x.data.recordings import RecordingConfig as RecordingConfig
from vishwam_t5x.data.sound_files import decode_sound
from vishwam_t5x.data.spectrogram import LogMelConfig as LogMelConfig
from vishwam_t5x.data.spectrogram import log_mel_spectrogram as log_mel_spectrogram
from vishwam_t5x.data.spectrogram import mel_filters as mel_filters
from vishwam_t5x.data.spectrogram import mel_spectrogram as mel_spectrogram
from vishwam_t5x.data.tf.refusals import map_or_refuse


def decode_recording(dataset: tf.data.Dataset, feature: str, history: str | None = None,
                     config: RecordingConfig = RecordingConfig(), patches: str | None = None,
                     history_patches: str | None = None, patch_size: int = 16) -> tf.data.Dataset:
    """Turns recordings (`decode_sound`) into spectrograms; what cannot be heard is refused.

    Args:
        dataset: examples whose `feature` is the content of a file, scalar string.
        feature: becomes the spectrogram of the last segment, float32 [frames, num_mels].
        history: name of a feature to add: the segments before it, float32
            [n, frames, num_mels], n from 0 to `max_segments` - 1. None: recordings are one segment.
        config: sample rate, spectrogram and segments.
        patches: name of a feature to add: the numbers of the patches of `feature` that the encoder
            is to be given, int32 [n]; Unified-IO 2 leaves out those of the silence that fills a
            segment up. None: it is given all.
        history_patches: the same of `history`, counted on from segment to segment.
        patch_size: frames, and mel bins, of those patches.

    Returns:
        the dataset, also with `meta_lost_samples`, int32: samples at the end that no segment has.
    """
    if history is None and config.max_segments != 1:
        raise UserError(
            "recordings of several segments need a feature for those before the last",
            got=f"max_segments {config.max_segments}", fix="history='audio_history_inputs'")
    conversions.note("decode_recording", feature, config=config, history=history, patches=patches,
                     history_patches=history_patches, patch_size=patch_size)
    shape = (config.frames, config.log_mel.num_mels)
    outputs = {feature: tf.TensorSpec(shape, tf.float32),
               "meta_lost_samples": tf.TensorSpec((), tf.int32)}
    if history is not None:
        outputs[history] = tf.TensorSpec((None, *shape), tf.float32)
    for name in (patches, history_patches):
        if name is not None:
            outputs[name] = tf.TensorSpec((None,), tf.int32)

    def decode(data: bytes) -> list[np.ndarray | int]:
        found = recordings.spectrograms(*decode_sound(data), config)
        out: list[np.ndarray | int] = [found.segments[-1], found.lost_samples]
        if history is not None:
            out.append(found.segments[:-1])
        if patches is not None:
            out.append(recordings.patches_heard(found.heard[-1:], patch_size))
        if history_patches is not None:
            out.append(recordings.patches_heard(found.heard[:-1], patch_size))
        return out

    return map_or_refuse(dataset, decode, [feature], outputs)
