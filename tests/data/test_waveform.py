"""Waveforms from spectrograms."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.spectrogram import (
    LogMelConfig,
    log_mel_spectrogram,
    mel_filters,
    mel_spectrogram,
    stft,
)
from vishwam_t5x.data.waveform import (
    GriffinLimConfig,
    bin_powers,
    griffin_lim,
    istft,
    spectral_convergence,
    waveform_of,
)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "audio" / "unified_io2_mel.npz"
CONFIG = LogMelConfig()


@pytest.fixture(scope="module")
def recording():
    with np.load(GOLDEN) as file:
        return file["waveform"][:24 * 256]


def test_transform_is_inverted(recording):
    back = istft(stft(recording, CONFIG), CONFIG, len(recording))
    np.testing.assert_allclose(back, recording, atol=1e-12)


def test_bin_powers_fit_the_mel_powers(recording):
    mel = mel_spectrogram(recording, CONFIG)
    powers = bin_powers(mel, CONFIG)
    filters = mel_filters(CONFIG)
    assert powers.min() >= 0 and not powers[:, filters.sum(0) == 0].any()
    assert np.linalg.norm(powers @ filters.T - mel) < 0.01 * np.linalg.norm(mel)
    assert not bin_powers(np.zeros((2, 128)), CONFIG).any()


def test_known_magnitudes_are_found_again_better_with_every_round(recording):
    magnitudes = np.abs(stft(recording, CONFIG))
    errors = [spectral_convergence(
        griffin_lim(magnitudes, CONFIG, GriffinLimConfig(iterations=rounds)), recording, CONFIG)
        for rounds in (0, 8, 60)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    assert errors[2] < 0.2  # 0.14 here; 0.62 of random phases


def test_a_log_mel_spectrogram_sounds_as_the_recording_did(recording):
    log_mel = log_mel_spectrogram(recording, CONFIG)
    waveform = waveform_of(log_mel, CONFIG)
    assert waveform.dtype == np.float32
    assert len(waveform) == (len(log_mel) - 1) * CONFIG.hop
    assert spectral_convergence(waveform, recording, CONFIG) < 0.3  # 0.20 here
    again = np.sqrt(mel_spectrogram(waveform, CONFIG))
    mel = np.sqrt(mel_spectrogram(recording, CONFIG))
    assert np.linalg.norm(again - mel) < 0.2 * np.linalg.norm(mel)  # 0.11 here


def test_a_tone_keeps_its_pitch():
    tone = 0.5 * np.sin(2 * np.pi * 440.0 * np.arange(8192) / 16000)
    waveform = waveform_of(log_mel_spectrogram(tone, CONFIG), CONFIG)
    strongest = np.abs(np.fft.rfft(waveform)).argmax() * 16000 / len(waveform)
    assert abs(strongest - 440.0) < 16000 / 1024  # one Fourier bin


def test_mistakes_are_named():
    with pytest.raises(UserError, match="mel bins"):
        waveform_of(np.zeros((20, 80)), CONFIG)
    with pytest.raises(UserError, match="half a window"):
        griffin_lim(np.zeros((3, 513)), CONFIG)
    with pytest.raises(UserError, match="momentum"):
        GriffinLimConfig(momentum=1.0)
    with pytest.raises(UserError, match="iterations"):
        GriffinLimConfig(iterations=-1)
