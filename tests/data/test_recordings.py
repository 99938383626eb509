"""Recordings: what is read, resampled and cut into spectrograms, and what is refused."""

from __future__ import annotations

import contextlib
import io
import wave

import numpy as np
import pytest

import media
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
    for at in range(36):  # whatever byte of the header is damaged
        for byte in (0, 1, 0x7f, 0xff):
            with contextlib.suppress(UserError):
                decode_wave(good[:at] + bytes([byte]) + good[at + 1:])
    wide = bytearray(good)
    wide[34:36] = (64).to_bytes(2, "little")  # bits of a sample, as its header says
    with pytest.raises(UserError, match="another kind than PCM"):
        decode_wave(bytes(wide))


@pytest.mark.parametrize("kind", ["<f4", "<f8"])
def test_floats_are_read_if_they_are_sound(kind):
    stereo = np.asarray([[0, 0], [0.5, 0], [-1.5, -0.5]], kind)
    samples, rate = decode_wave(media.riff(stereo, 44100))
    assert rate == 44100
    np.testing.assert_array_equal(samples, [0, 0.25, -1.0])
    for wrong, why in ((np.nan, "not finite"), (-np.inf, "not finite"), (3e4, "beyond 1.0")):
        stereo[1, 1] = wrong
        with pytest.raises(UserError, match=why):
            decode_wave(media.riff(stereo, 44100))


def test_the_longer_header_of_many_programs_is_read():
    samples = np.asarray([[2**14, -2**14], [2**14, 2**14]], "<i2")
    found, _ = decode_wave(media.riff(samples, 16000, extensible=True, before=b"odd"))
    np.testing.assert_array_equal(found, [0, 0.5])
    wider = bytearray(media.riff(samples, 16000))
    wider[34] = 8  # bits, of samples that lie two bytes apart
    for data, why in ((media.riff(samples, 16000, tag=7), "another kind"),
                      (media.riff(samples, 0), "no sample rate"),
                      (media.riff(samples[:, :0], 16000), "no channels"),
                      (media.riff(samples, 16000)[:-2], "cut off"),
                      (wider, "4 bytes a sample for 2 x 8 bits"),
                      (b"OggS" + bytes(40), "not a WAV")):
        with pytest.raises(UserError) as error:
            decode_wave(data)
        assert why in str(error.value)


def test_a_rate_out_of_a_damaged_header_does_not_fill_the_memory():
    with pytest.raises(UserError, match="cannot be brought"):
        resample(np.ones((100,)), 3_999_999_999, 16000)
    for number, rate in ((20_000, 1), (2**27, 7999)):
        with pytest.raises(UserError, match="too long at the sample rate"):
            resample(np.broadcast_to(np.float64(1), (number,)), rate, 16000)
    assert len(resample(np.ones((10,)), 160, 16000)) == 1000


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


def test_the_silence_that_fills_a_segment_up_has_no_patches():
    noise = np.random.default_rng(0).standard_normal(65280 + 36000) * 0.1
    config = RecordingConfig(max_segments=2)
    found = spectrograms(noise, 16000, config)
    # Frames are 256 samples apart, and a window reaches half its 1,024 to either side.
    assert found.heard[1, :142].all() and not found.heard[1, 143:].any()
    patches = recordings.patches_heard(found.heard, 16)
    np.testing.assert_array_equal(patches, np.arange(128 + 9 * 8), "patch 9 is heard up to 142")
    silent = spectrograms(np.concatenate([np.zeros(65280), noise[:40000]]), 16000, config)
    with pytest.raises(UserError, match=r"silent[\s\S]*segment 1 of 2"):
        recordings.patches_heard(silent.heard, 16)
    with pytest.raises(UserError, match="multiples of its patch"):
        recordings.patches_heard(found.heard, 24)


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
