"""Recordings of other formats than WAV, written and read by libsndfile."""

import contextlib
import io
import sys

import numpy as np
import pytest
import soundfile

import media
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.recordings import decode_wave
from vishwam_t5x.data.sound_files import decode_sound

SOUND = 0.5 * media.hum(1.0, 16000)
PAIR = np.stack([SOUND * 1.5, SOUND * 0.5], axis=1)


def encoded(kind: str, subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, PAIR, 16000, format=kind, subtype=subtype)
    return out.getvalue()


@pytest.mark.parametrize("kind, subtype, near", [
    ("FLAC", "PCM_16", 2.0**-15), ("FLAC", "PCM_24", 2.0**-22), ("OGG", "VORBIS", 0.03),
    ("MP3", None, 0.05)])
def test_formats_give_the_sound_that_wav_gives(kind, subtype, near):
    data = encoded(kind, subtype)
    found, rate = decode_sound(data)
    assert rate == 16000 and len(found) == len(SOUND)
    np.testing.assert_allclose(found, SOUND, atol=near)
    with pytest.raises(UserError, match="cannot be read"):
        decode_wave(data)


def test_what_is_no_sound_is_refused():
    flac = encoded("FLAC")
    for data, why in ((b"", "empty"), (b"a text, say", "no WAV, FLAC, Ogg or MP3"),
                      (b"fLaC" + bytes(40), "FLAC: "), (b"OggS" + bytes(40), "Ogg: "),
                      (flac[:len(flac) // 2], "FLAC: ")):
        with pytest.raises(UserError) as error:
            decode_sound(data)
        assert why in str(error.value), str(error.value)
    longest = bytearray(flac)
    longest[21] |= 0x0f  # the highest of the 36 bits that say how many samples there are
    with pytest.raises(UserError):
        decode_sound(bytes(longest))
    wild = np.random.default_rng(0)
    for _ in range(200):  # damaged anywhere: a sound, or a refusal
        damaged = bytearray(flac)
        for at in wild.integers(0, len(flac), 8):
            damaged[at] = wild.integers(256)
        with contextlib.suppress(UserError):
            assert np.isfinite(decode_sound(bytes(damaged))[0]).all()


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match="package soundfile") as error:
        decode_sound(encoded("FLAC"))
    assert "vishwam_t5x[sounds]" in error.value.fix
    decode_sound(media.riff(PAIR.astype("<f4"), 16000))  # takes none


def test_a_wav_file_out_of_a_pipe_says_no_length():
    whole = media.riff(PAIR.astype("<f4"), 16000)
    at = whole.index(b"data") + 4
    piped = whole[:at] + b"\xff" * 4 + whole[at + 4:]
    np.testing.assert_array_equal(decode_sound(piped)[0], decode_sound(whole)[0])
    with pytest.raises(UserError, match="cut off"):
        decode_sound(piped[:-1])
