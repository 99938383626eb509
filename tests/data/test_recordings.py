"""Recordings: what is read, resampled and cut into spectrograms, and what is refused."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import recordings
from vishwam_t5x.data.recordings import RecordingConfig, decode_wave, resample, spectrograms
from vishwam_t5x.data.spectrogram import SegmentConfig


def wave_file(samples: np.ndarray, rate: int = 16000, width: int = 2) -> bytes:
    """samples: whole numbers [n] or [n, channels]."""
    samples = samples if samples.ndim == 2 else samples[:, None]
    little = samples.astype("<i4").view(np.uint8).reshape(*samples.shape, 4)
    raw = (samples.astype(np.uint8) if width == 1 else little[..., :width]).tobytes()
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return out.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_pcm_is_read_and_channels_are_averaged(width):
    half = {1: 64, 2: 2**14, 3: 2**22, 4: 2**30}[width]
    offset = 128 if width == 1 else 0
    stereo = np.asarray([[0, 0], [half, 0], [-half, -half]]) + offset
    samples, rate = decode_wave(wave_file(stereo, 11025, width))
    assert rate == 11025
    np.testing.assert_array_equal(samples, [0, 0.25, -0.5])


def test_files_without_sound_are_refused():
    good = wave_file(np.arange(100))
    for bad, why in ((b"", "cannot be read"), (b"RIFFxxxxWAVE", "cannot be read"),
                     (good[:-20], "cut off"), (wave_file(np.zeros((0, 1))), "no samples")):
        with pytest.raises(UserError, match=why):
            decode_wave(bad)


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (16000, 11025)])
def test_a_tone_is_the_same_tone_at_another_rate(rate, wanted):
    def tone(at, count):
        return np.sin(2 * np.pi * 1234.5 * np.arange(count) / at + 0.3)

    out = resample(tone(rate, rate // 4), rate, wanted)
    assert len(out) == -(-(rate // 4) * wanted // rate)
    inside = slice(200, -200)
    np.testing.assert_allclose(out[inside], tone(wanted, len(out))[inside], atol=1e-4)


def test_what_the_lower_rate_cannot_hold_does_not_fold_back():
    high = np.sin(2 * np.pi * 6000 * np.arange(8000) / 16000)
    assert np.abs(resample(high, 16000, 8000)[100:-100]).max() < 1e-4
    constant = resample(np.ones((1000,)), 8000, 6000)
    np.testing.assert_allclose(constant[100:-100], 1, atol=1e-12)


def test_recordings_become_segments_of_256_frames():
    noise = np.random.default_rng(0).standard_normal(65280 * 2 + 30000) * 0.1
    found = spectrograms(noise, 16000, RecordingConfig(max_segments=2))
    assert found.segments.shape == (2, 256, 128) and found.lost_samples == 30000
    assert found.segments.dtype == np.float32
    short = spectrograms(noise[:800], 8000)
    assert short.segments.shape == (1, 256, 128) and short.lost_samples == 0


def test_what_cannot_be_heard_whole_is_refused():
    config = RecordingConfig(segment=SegmentConfig(2000, 0), other_rates="refuse")
    for waveform, rate, why in ((np.ones((2001,)), 16000, "too long"),
                                (np.zeros((0,)), 16000, "no samples"),
                                (np.full((9,), np.nan), 16000, "not finite"),
                                (np.ones((100,)), 8000, "another sample rate")):
        with pytest.raises(UserError, match=why):
            spectrograms(waveform, rate, config)
    with pytest.raises(UserError, match="'resample' or 'refuse'"):
        RecordingConfig(other_rates="keep")
    with pytest.raises(UserError, match="positive"):
        recordings.resample(np.ones((5,)), 0, 8000)
