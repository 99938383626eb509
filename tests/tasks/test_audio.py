"""Log-mel spectrograms against those of Unified-IO 2's own code (16 kHz, 1024/256, 128 mels)."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.tf.audio import (
    LogMelConfig,
    hertz_to_mel,
    log_mel_spectrogram,
    mel_filters,
    mel_spectrogram,
    mel_to_hertz,
)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "audio" / "unified_io2_mel.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def test_filters_are_those_of_unified_io_2(golden):
    np.testing.assert_allclose(mel_filters(LogMelConfig())[golden["filter_rows"]],
                               golden["filters"], atol=1e-8)


def test_log_mel_is_that_of_unified_io_2(golden):
    ours = log_mel_spectrogram(golden["waveform"], LogMelConfig())
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[:len(golden["log_mel"])], golden["log_mel"], atol=2e-6)


def test_mel_scale_is_continuous_monotone_and_inverted():
    hertz = np.linspace(0.0, 8000.0, 1001)
    mel = hertz_to_mel(hertz)
    assert np.all(np.diff(mel) > 0)
    np.testing.assert_allclose(mel_to_hertz(mel), hertz, atol=1e-9)
    assert hertz_to_mel(1000.0) == pytest.approx(15.0)


def test_shift_and_scale_are_applied():
    waveform = np.sin(np.arange(2000))
    plain = log_mel_spectrogram(waveform, LogMelConfig(8000, 256, 128, 40, 0.0, 4000.0))
    moved = log_mel_spectrogram(
        waveform, LogMelConfig(8000, 256, 128, 40, 0.0, 4000.0, shift=3.0, scale=2.0))
    np.testing.assert_allclose(moved, (plain + 3.0) / 2.0, rtol=1e-5)
    assert len(plain) == LogMelConfig(8000, 256, 128, 40, 0.0, 4000.0).num_frames(2000)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="half the sample rate"):
        LogMelConfig(sample_rate=8000)
    with pytest.raises(UserError, match="contain no Fourier bin"):
        mel_filters(LogMelConfig(8000, 64, 32, 128, 0.0, 4000.0))
    with pytest.raises(UserError, match="mono"):
        mel_spectrogram(np.zeros((4000, 2)), LogMelConfig())
    with pytest.raises(UserError, match="must be positive"):
        LogMelConfig(hop=0)
