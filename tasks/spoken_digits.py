"""Which digit is spoken: recordings `DIGIT_SPEAKER_TAKE.wav` in a folder of yours, as a Task.

`VISHWAM_SPOKEN_DIGITS` names the folder; the Free Spoken Digit Dataset (Jackson et al., CC BY-SA
4.0) has this form. Takes 0 to 4 of every speaker are the test split, 5 and 6 the validation split,
the others are trained on: the speakers are known, their takes are not.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf
from jaxtyping import Float

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.data import conversions, recordings
from vishwam_t5x.data.spectrogram import LogMelConfig, log_mel_spectrogram
from vishwam_t5x.data.tf import refusals
from vishwam_t5x.data.tf.features import audio_feature, text_feature
from vishwam_t5x.evaluation.metrics.text import exact_match
from vishwam_t5x_tasks import quickstart_metrics as metrics
from vishwam_t5x_tasks import quickstart_sources as sources
from vishwam_t5x_tasks.quickstart import VOCABULARY, remembered

NAME = "spoken_digits"
FOLDER_VARIABLE = "VISHWAM_SPOKEN_DIGITS"
SEED = 5
TAKES = {"test": range(5), "validation": range(5, 7)}
QUESTIONS = ("which digit is spoken?", "what digit do you hear?", "write the digit that is said",
             "name the spoken digit")
COPIES = 8
"""Times a recording occurs in the training split: as it is, then at other speeds with noise."""
RECORDING = recordings.RecordingConfig(
    LogMelConfig(sample_rate=8000, fft_size=256, hop=128, num_mels=40, min_hertz=60.0,
                 max_hertz=4000.0, shift=4.0, scale=3.0))
PATCH = (4, 40)
"""A patch is all 40 mel bins of four frames, 64 ms."""
MAX_FRAMES = 128
LEVEL = 0.1
"""Root mean square that recordings are brought to."""
_RATES = (6800, 7200, 7600, 8000, 8400, 8800, 9200)
"""A copy of 8000 samples gets one of these numbers of samples: the voice is faster or slower."""
_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")


class Recording(NamedTuple):
    """A file of the folder, and what its name says."""

    file: str
    digit: int
    speaker: str
    take: int


def log_mel() -> LogMelConfig:
    """Returns how recordings become the spectrograms of this Task; for `vishwam infer`."""
    return RECORDING.log_mel


def folder() -> str:
    """Returns the folder of recordings.

    Raises:
        UserError: the environment names none.
    """
    value = os.environ.get(FOLDER_VARIABLE)
    if not value:
        raise UserError(f"the Task '{NAME}' needs a folder of recordings",
                        got=f"{FOLDER_VARIABLE} is not set",
                        fix=f"{FOLDER_VARIABLE}=FOLDER, with files like 7_maria_12.wav: digit, "
                            "speaker, take")
    return value


def listed(path: str, split: str) -> list[Recording]:
    """Returns the recordings of a split: the first take of every digit and speaker, then the next.

    Raises:
        UserError: the split is unknown, the folder cannot be read, or no file of it is such a
            recording.
    """
    sources.check_split(split)
    try:
        names = sorted(os.listdir(storage.local(path)))
    except OSError as error:
        raise UserError("the folder of recordings cannot be read",
                        got=f"{path}: {error.strerror}", fix=f"mend {FOLDER_VARIABLE}") from error
    found = []
    for name in names:
        if match := _NAME.fullmatch(name):
            found.append(Recording(name, int(match[1]), match[2], int(match[3])))
    chosen = [each for each in found if split == next(
        (name for name, takes in TAKES.items() if each.take in takes), "train")]
    if not chosen:
        raise UserError(f"the folder has no recordings of the {split} split",
                        got=f"{len(found)} recordings among {len(names)} files of {path}",
                        fix="names like 7_maria_12.wav: digit, speaker, take; takes 0 to 4 are "
                            "the test split, 5 and 6 validation")
    return sorted(chosen, key=lambda each: (each.take, each.digit, each.speaker))


def spectrogram(waveform: Float[np.ndarray, "samples"], rate: int, name: str = "", copy: int = 0
                ) -> Float[np.ndarray, "frames 40"]:
    """Returns the log-mel spectrogram of a recording, its frames a multiple of a patch's.

    Args:
        waveform: mono, any level.
        rate: its samples per second; 8,000 are wanted, others are resampled.
        name: of the file: what a copy's changes are drawn from, with its number.
        copy: 0: the recording as it is; others: at another speed, later, and with noise.

    Raises:
        UserError: there is no sound in it, or it is longer than 2 s.
    """
    waveform = recordings.at_rate(waveform, rate, RECORDING)
    level = float(np.sqrt(np.mean(np.square(waveform))))
    if level < 1e-6:
        raise UserError("the recording is silent")
    waveform = waveform * (LEVEL / level)
    if copy:
        rng = example_generator(SEED, copy, f"{NAME}/{name}")
        waveform = recordings.resample(waveform, 8000, int(rng.choice(_RATES)))
        waveform = np.pad(waveform, rng.integers(0, 800, size=2))
        noise = LEVEL * 10.0 ** -rng.uniform(0.75, 2.0)  # 15 to 40 dB below
        waveform = waveform + noise * rng.standard_normal(len(waveform))
    config = RECORDING.log_mel
    frames = max(config.num_frames(len(waveform)), 8)
    frames += -frames % PATCH[0]
    if frames > MAX_FRAMES:
        raise UserError("the recording is too long for a digit",
                        got=f"{len(waveform) / config.sample_rate:.2f} s, at most "
                            f"{MAX_FRAMES * config.hop / config.sample_rate:.2f}")
    missing = (frames - 1) * config.hop + 1 - len(waveform)
    return log_mel_spectrogram(np.pad(waveform, (0, max(missing, 0))), config)[:frames]


def _source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    path = folder()
    chosen = listed(path, split)
    copies = COPIES if split == "train" else 1
    rows = [(each, copy) for copy in range(copies) for each in chosen]
    return tf.data.Dataset.from_tensor_slices({
        "audio_inputs": [os.path.join(path, each.file) for each, _ in rows],
        "text_inputs": [sources.choose(QUESTIONS, split, number, "spoken digit")
                        for number in range(len(rows))],
        "text_targets": [sources.DIGIT_NAMES[each.digit] for each, _ in rows],
        "meta_digit": np.asarray([each.digit for each, _ in rows], np.int32),
        "meta_id": [each.file for each, _ in rows],
        "copy": np.asarray([copy for _, copy in rows], np.int32),
    })


def _hear(dataset: tf.data.Dataset) -> tf.data.Dataset:
    conversions.note("spectrogram", "audio_inputs", config=RECORDING, patch=PATCH, level=LEVEL,
                     seed=SEED, copies=COPIES, lengths=_RATES)

    def hear(data: bytes, name: bytes, copy: np.ndarray) -> tuple[np.ndarray]:
        return (spectrogram(*recordings.decode_wave(data), name.decode(), int(copy)),)

    return refusals.map_or_refuse(
        refusals.read_bytes(dataset, "audio_inputs"), hear, ["audio_inputs", "meta_id", "copy"],
        {"audio_inputs": tf.TensorSpec((None, RECORDING.log_mel.num_mels), tf.float32)})


seqio.TaskRegistry.add(
    NAME,
    source=seqio.FunctionDataSource(_source, splits=sources.SPLITS),
    preprocessors=[_hear, functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)],
    output_features={"audio_inputs": audio_feature(), "text_inputs": text_feature(VOCABULARY),
                     "text_targets": text_feature(VOCABULARY)},
    postprocess_fn=metrics.caption_text,
    metric_fns=[exact_match])


def task_metadata(task_name: str) -> dict[str, Any]:
    """Returns what a cache's manifest records of the Task.

    Raises:
        UserError: it is another Task.
    """
    return remembered(task_name, (NAME,)) | {
        "folder": folder(), "patch_sizes": {"audio": PATCH}}
