"""Log-mel spectrograms against those of Unified-IO 2's own code (16 kHz, 1024/256, 128 mels)."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.spectrogram import (
    UNIFIED_IO2_INPUT,
    UNIFIED_IO2_TARGET,
    LogMelConfig,
    SegmentConfig,
    hertz_to_mel,
    log_mel_spectrogram,
    mel_filters,
    mel_powers,
    mel_spectrogram,
    mel_to_hertz,
    normalised,
    segments,
)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "audio"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "unified_io2_mel.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def recording():
    """4.08 s, with every fourth frame of its mel powers and every eighth of the others."""
    with np.load(GOLDEN / "unified_io2_segments.npz") as file:
        return dict(file)


def test_filters_are_those_of_unified_io_2(golden):
    np.testing.assert_allclose(mel_filters(LogMelConfig())[golden["filter_rows"]],
                               golden["filters"], atol=1e-8)


def test_log_mel_is_that_of_unified_io_2(golden):
    ours = log_mel_spectrogram(golden["waveform"], LogMelConfig())
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[:len(golden["log_mel"])], golden["log_mel"], atol=2e-6)


def test_a_whole_piece_is_that_of_unified_io_2(recording):
    waveform = recording["waveform"]
    mel = mel_spectrogram(waveform, LogMelConfig())
    assert mel.shape == (256, 128)
    np.testing.assert_allclose(mel[::4], recording["mel"], rtol=1e-6, atol=1e-9)
    for config, name in ((LogMelConfig(silent_is_zero=True), "log_mel_T"),
                         (UNIFIED_IO2_INPUT, "vit_norm"), (UNIFIED_IO2_TARGET, "vqgan_norm")):
        ours = log_mel_spectrogram(waveform, config)
        np.testing.assert_allclose(ours[::8], recording[name], atol=2e-6)
    assert np.any(recording["log_mel_T"] == 0)  # silence, the case that differs


@pytest.mark.parametrize("samples, name", [(50000, "segs_3p125s"), (100000, "segs_6p25s")])
def test_pieces_are_those_of_unified_io_2(recording, samples, name):
    twice = np.concatenate([recording["waveform"], recording["waveform"]])
    cut = segments(twice[:samples])
    assert cut.lost_samples == 0
    mels = [mel_spectrogram(piece, LogMelConfig()).T[:, ::8] for piece in cut.waveforms]
    assert len(mels) == len(recording[name])
    np.testing.assert_allclose(mels, recording[name], rtol=1e-5, atol=1e-7)


def test_what_is_left_of_a_recording_becomes_a_piece_or_is_counted():
    config = SegmentConfig(samples=10, least_rest=4)
    for length, pieces, lost in ((1, 1, 0), (10, 1, 0), (14, 1, 4), (15, 2, 0), (34, 3, 4)):
        cut = segments(np.arange(1.0, length + 1), config)
        assert cut.waveforms.shape == (pieces, 10) and cut.lost_samples == lost
        kept = cut.waveforms.reshape(-1)
        np.testing.assert_array_equal(kept[:length - lost], np.arange(1.0, length - lost + 1))
        assert not kept[length - lost:].any()
    assert segments(np.ones(11), SegmentConfig(10, 0)).lost_samples == 0


def test_normalising_is_inverted():
    mel = np.geomspace(1e-4, 1e4, 50).astype(np.float32)
    back = mel_powers(normalised(mel, UNIFIED_IO2_TARGET), UNIFIED_IO2_TARGET)
    np.testing.assert_allclose(back, mel, rtol=1e-5)


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
    with pytest.raises(UserError, match="less than a piece"):
        SegmentConfig(10, 10)
    with pytest.raises(UserError, match="mono and have samples"):
        segments(np.zeros(0))
