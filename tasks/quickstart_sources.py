"""The quickstart's raw data: real input that is already on the machine, split by example.

Digits: 1,797 handwritten digits bundled with scikit-learn (UCI "Optical Recognition of Handwritten
Digits", Alpaydin & Kaynak 1998). Text: the English reference that CPython ships as
`pydoc_data.topics`; its words depend on the Python version. Tones: DTMF key tones (ITU-T Q.23),
synthesised with noise. Everything is a pure function of this file; nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from jaxtyping import Float, Int

from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.data.spectrogram import LogMelConfig, log_mel_spectrogram

SPLITS = ("train", "validation", "test")
TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1
SEED = 20240

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION = "the digit {}"
IMAGE_QUESTIONS = ("what digit is this?", "which digit is in the picture?",
                   "read the handwritten digit", "name this digit")
QUESTIONS_AROUND = ("the picture <image_input> shows which digit?",
                    "<image_input> what digit is this?", "read the digit in <image_input>")
AUDIO_QUESTIONS = ("which key was pressed?", "what digit is this tone?",
                   "name the digit you hear", "listen and write the digit")
DRAWING_REQUESTS = ("draw the digit {}", "a picture of the digit {}", "write a {} by hand",
                    "show a handwritten {}")

NUM_TONES = {"train": 4000, "validation": 500, "test": 500}
SAMPLE_RATE = 8000
TONE_SAMPLES = 1920
"""0.24 s: 16 frames, two rows of 8 x 8 patches."""
LOG_MEL = LogMelConfig(sample_rate=SAMPLE_RATE, fft_size=256, hop=128, num_mels=48,
                       min_hertz=300.0, max_hertz=3400.0, shift=4.9, scale=2.4)
_LOW_HERTZ = (697.0, 770.0, 852.0, 941.0)
_HIGH_HERTZ = (1209.0, 1336.0, 1477.0)

_PASSAGE_CHARACTERS = 600
"""A passage is a run of paragraphs of at least this many characters, about 200 tokens."""


def log_mel() -> LogMelConfig:
    """Returns how recordings become the spectrograms of these tasks; for `vishwam infer`."""
    return LOG_MEL


def check_split(split: str) -> str:
    """Returns `split`.

    Raises:
        UserError: it is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise UserError("the quickstart has no such split", got=split,
                        fix=did_you_mean(split, SPLITS) or "one of: " + ", ".join(SPLITS))
    return split


def caption(digit: int) -> str:
    """Returns e.g. "the digit seven"."""
    return CAPTION.format(DIGIT_NAMES[digit])


def choose(options: tuple[str, ...], split: str, example: int, purpose: str) -> str:
    """Returns one of `options`, always the same for the same example and purpose."""
    rng = example_generator(SEED, example, f"quickstart/{purpose}/{split}")
    return options[int(rng.integers(len(options)))]


@functools.lru_cache(maxsize=1)
def _all_digits() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the quickstart's digits come with scikit-learn, which is not installed",
                        fix='pip install "vishwam_t5x[seqio]"') from error
    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)[..., None]
    labels = bunch.target.astype(np.int32)
    # Ordered by a hash of the pixels, so that no library's random numbers decide the split.
    hashes = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    members: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in range(10):
        order = np.flatnonzero(labels == digit)
        order = order[np.argsort(hashes[order], kind="stable")]
        first = round(TRAIN_SHARE * len(order))
        second = first + round(VALIDATION_SHARE * len(order))
        for split, part in zip(SPLITS, np.split(order, [first, second]), strict=True):
            members[split].append(part)
    return images, labels, {split: np.sort(np.concatenate(parts))
                            for split, parts in members.items()}


def digits(split: str) -> tuple[Float[np.ndarray, "examples 8 8 1"], Int[np.ndarray, "examples"]]:
    """Returns the handwritten digits of a split: pixels float32 in [0, 1], and what they are.

    80/10/10 of every digit; the three splits share no image.

    Raises:
        UserError: unknown split, or scikit-learn is not installed.
    """
    images, labels, members = _all_digits()
    chosen = members[check_split(split)]
    return images[chosen], labels[chosen]


@functools.lru_cache(maxsize=1)
def _all_passages() -> dict[str, tuple[str, ...]]:
    from pydoc_data import topics

    seen: set[str] = set()
    out: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(topics.topics):
        paragraphs = []
        for raw in topics.topics[name].split("\n\n"):
            paragraph = " ".join(raw.split())
            # Chapters repeat their sections' text: kept once, or test text would occur in train.
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        for passage in _group(paragraphs):
            draw = int.from_bytes(hashlib.sha256(passage.encode()).digest()[:8], "big") / 2.0**64
            split = SPLITS[(draw >= TRAIN_SHARE) + (draw >= TRAIN_SHARE + VALIDATION_SHARE)]
            out[split].append(passage)
    return {split: tuple(passages) for split, passages in out.items()}


def _group(paragraphs: list[str]) -> list[str]:
    passages: list[str] = []
    current: list[str] = []
    for paragraph in paragraphs:
        current.append(paragraph)
        if sum(map(len, current)) >= _PASSAGE_CHARACTERS:
            passages.append(" ".join(current))
            current = []
    if current and passages:
        passages[-1] += " " + " ".join(current)
    elif current:
        passages.append(" ".join(current))
    return passages


def passages(split: str) -> tuple[str, ...]:
    """Returns the passages of reference text of a split, white space made single.

    A passage is a run of paragraphs of one topic; a paragraph that occurs several times in the
    reference is kept where it occurs first, so no paragraph is in two splits.

    Raises:
        UserError: unknown split.
    """
    return _all_passages()[check_split(split)]


def tone(split: str, example: int) -> tuple[Float[np.ndarray, "1920"], int]:
    """Returns a noisy key tone, float64 [1920] at 8 kHz, and its digit.

    Two sines of equal level, of random phase, gain (-20 to 0 dB), length (60 to 200 ms) and onset,
    in white noise whose power lies 0 to 20 dB below the tone's. A pure function of its arguments;
    splits draw from separate streams.

    Raises:
        UserError: unknown split.
    """
    rng = example_generator(SEED, example, f"quickstart/tones/{check_split(split)}")
    digit = example % 10
    row, column = (3, 1) if digit == 0 else divmod(digit - 1, 3)
    length = int(rng.uniform(0.06, 0.2) * SAMPLE_RATE)
    onset = int(rng.integers(0, TONE_SAMPLES - length + 1))
    gain = 10.0 ** (rng.uniform(-20.0, 0.0) / 20.0)
    noise_ratio = 10.0 ** (-rng.uniform(0.0, 20.0) / 20.0)
    phases = rng.uniform(0.0, 2.0 * np.pi, 2)
    time = np.arange(length) / SAMPLE_RATE
    sines = (np.sin(2.0 * np.pi * _LOW_HERTZ[row] * time + phases[0])
             + np.sin(2.0 * np.pi * _HIGH_HERTZ[column] * time + phases[1]))
    # 5 ms ramps: keys do not click.
    edge = np.minimum(np.arange(length), np.arange(length)[::-1])
    sines *= gain / 2.0 * np.minimum(1.0, edge / (0.005 * SAMPLE_RATE))
    waveform = rng.standard_normal(TONE_SAMPLES) * np.sqrt(np.mean(sines**2)) * noise_ratio
    waveform[onset:onset + length] += sines
    return waveform, digit


@functools.lru_cache(maxsize=len(SPLITS))
def tones(split: str) -> tuple[Float[np.ndarray, "examples 16 48"], Int[np.ndarray, "examples"]]:
    """Returns the tones of a split as log-mel spectrograms, float32 [examples, 16, 48], and digits.

    Kept in memory (12 MB for train) and read-only: writing a cache asks for a split twice.

    Raises:
        UserError: unknown split.
    """
    count = NUM_TONES[check_split(split)]
    frames = LOG_MEL.num_frames(TONE_SAMPLES)
    spectrograms = np.empty((count, frames, LOG_MEL.num_mels), np.float32)
    labels = np.empty(count, np.int32)
    for example in range(count):
        waveform, labels[example] = tone(split, example)
        spectrograms[example] = log_mel_spectrogram(waveform, LOG_MEL)
    for array in (spectrograms, labels):
        array.setflags(write=False)
    return spectrograms, labels
