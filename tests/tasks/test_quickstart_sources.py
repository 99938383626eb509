"""The quickstart's raw data: split by example, deterministic, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x_tasks import quickstart_sources as sources

SPLITS = sources.SPLITS
LOW, HIGH = (697, 770, 852, 941), (1209, 1336, 1477)
KEYS = {1: (0, 0), 2: (0, 1), 3: (0, 2), 4: (1, 0), 5: (1, 1), 6: (1, 2), 7: (2, 0), 8: (2, 1),
        9: (2, 2), 0: (3, 1)}


def test_digits_are_all_there_once_and_stratified():
    pixels = [sources.digits(split)[0] for split in SPLITS]
    labels = [sources.digits(split)[1] for split in SPLITS]
    assert [len(part) for part in pixels] == [1438, 179, 180]
    everything = np.concatenate(pixels)
    assert len({image.tobytes() for image in everything}) == 1797
    assert everything.dtype == np.float32 and everything.min() == 0.0 and everything.max() == 1.0
    for digit in range(10):
        counts = [np.sum(part == digit) for part in labels]
        assert abs(counts[0] / sum(counts) - 0.8) < 0.01, (digit, counts)
        assert min(counts) >= 17


def test_every_paragraph_of_the_reference_is_in_exactly_one_split():
    from pydoc_data import topics

    parts = {split: " \n ".join(sources.passages(split)) for split in SPLITS}
    paragraphs = {" ".join(raw.split()) for text in topics.topics.values()
                  for raw in text.split("\n\n")} - {""}
    assert sum(len(passage) for split in SPLITS for passage in sources.passages(split)) >= sum(
        map(len, paragraphs))
    long = [paragraph for paragraph in paragraphs if len(paragraph) > 80]
    assert len(long) > 500
    for paragraph in long:
        # A paragraph may also stand inside a longer one of the same reference; whole, it is once.
        homes = [split for split in SPLITS if paragraph in parts[split]]
        assert homes, paragraph
    homes_twice = [p for p in long if sum(p in parts[split] for split in SPLITS) > 1]
    assert len(homes_twice) <= len(long) // 200, homes_twice


def test_text_splits_have_their_shares():
    sizes = [sum(map(len, sources.passages(split))) for split in SPLITS]
    shares = np.array(sizes) / sum(sizes)
    np.testing.assert_allclose(shares, (0.8, 0.1, 0.1), atol=0.04)


@pytest.mark.parametrize("digit", range(10))
def test_a_tone_has_the_two_frequencies_of_its_key(digit):
    for example in (digit, digit + 10, digit + 490):
        waveform, label = sources.tone("test", example)
        assert label == digit
        spectrum = np.abs(np.fft.rfft(waveform, 8 * len(waveform)))
        hertz = np.fft.rfftfreq(8 * len(waveform), 1.0 / sources.SAMPLE_RATE)

        def loudest(choices, spectrum=spectrum, hertz=hertz):
            near = [spectrum[np.abs(hertz - choice) < 8].max() for choice in choices]
            return int(np.argmax(near))

        assert (loudest(LOW), loudest(HIGH)) == KEYS[digit]


def test_tones_are_a_function_of_split_and_number_alone():
    assert np.array_equal(sources.tone("train", 3)[0], sources.tone("train", 3)[0])
    assert not np.array_equal(sources.tone("train", 3)[0], sources.tone("test", 3)[0])
    assert not np.array_equal(sources.tone("train", 3)[0], sources.tone("train", 13)[0])


def test_tone_noise_stays_within_0_to_20_decibels():
    ratios = []
    for example in range(300):
        waveform, _ = sources.tone("train", example)
        spectrum = np.abs(np.fft.rfft(waveform)) ** 2
        hertz = np.fft.rfftfreq(len(waveform), 1.0 / sources.SAMPLE_RATE)
        noise = np.mean(spectrum[(hertz > 2500) & (hertz < 3900)]) / len(waveform)
        total = np.mean(waveform**2)
        # Power of the tone over the whole clip; it lasts a quarter to five sixths of it.
        ratios.append(10 * np.log10((total - noise) / noise))
    low, high = 10 * np.log10(480 / 1920), 10 * np.log10(1600 / 1920)
    assert low - 1.5 < min(ratios) and max(ratios) < 20 + high + 1.5
    assert max(ratios) - min(ratios) > 18


def test_spectrograms_fit_the_patches():
    spectrograms, labels = sources.tones("test")
    assert spectrograms.shape == (500, 16, 48) and spectrograms.dtype == np.float32
    assert np.array_equal(np.bincount(labels), np.full(10, 50))
    assert abs(spectrograms.mean()) < 0.2 and 0.8 < spectrograms.std() < 1.2


def test_choices_are_stable_and_varied():
    chosen = [sources.choose(sources.IMAGE_QUESTIONS, "train", i, "question") for i in range(60)]
    again = [sources.choose(sources.IMAGE_QUESTIONS, "train", i, "question") for i in range(60)]
    assert chosen == again
    assert set(chosen) == set(sources.IMAGE_QUESTIONS)


@pytest.mark.parametrize("source", [sources.digits, sources.passages, sources.tones])
def test_an_unknown_split_is_named(source):
    with pytest.raises(UserError, match="validation"):
        source("validatoin")
