"""Recordings as files: WAV by ourselves, FLAC, Ogg and MP3 by libsndfile (extra `sounds`)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from jaxtyping import Float

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.recordings import MOST_SAMPLES, check_floats, decode_wave

_BEGINNINGS = ((b"fLaC", "FLAC"), (b"OggS", "Ogg"), (b"ID3", "MP3"))


def decode_sound(data: bytes) -> tuple[Float[np.ndarray, "samples"], int]:
    """Reads a WAV, FLAC, Ogg (Vorbis, Opus) or MP3 file; channels are averaged.

    Returns:
        The waveform, float64, full scale 1.0, and the samples per second.

    Raises:
        UserError: what `decode_wave` says of a WAV file; another format, damaged, cut off, without
            samples, too long for the memory, or the package soundfile is missing.
    """
    if data[:4] == b"RIFF" or not data:
        return decode_wave(data)
    kind = format_of(data)
    if kind is None:
        raise UserError("the recording cannot be read", got="no WAV, FLAC, Ogg or MP3 file")
    soundfile = _library(kind)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, channels, rate = file.frames, file.channels, file.samplerate
            if promised * channels > MOST_SAMPLES:  # A damaged header may claim any length.
                raise UserError("the recording is too long", got=f"{promised} samples")
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise UserError("the recording cannot be read", got=f"{kind}: {error}") from error
    if kind == "FLAC" and len(samples) != promised:  # Others do not say how long they are.
        raise UserError("the recording is cut off", got=f"{len(samples)} of {promised} samples")
    if not len(samples):
        raise UserError("the recording has no samples")
    check_floats(samples)
    return samples.mean(axis=1, dtype=np.float64), rate


def format_of(data: bytes) -> str | None:
    """Returns 'FLAC', 'Ogg' or 'MP3' by how a file begins; None: none of these."""
    for beginning, kind in _BEGINNINGS:
        if data.startswith(beginning):
            return kind
    # An MP3 without tags begins with a frame: eleven ones, and the layer, which is not 0.
    frame = len(data) > 2 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x06
    return "MP3" if frame else None


def _library(kind: str) -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel without libsndfile
        fix = "pip install 'vishwam_t5x[sounds]'"
        raise UserError(f"reading {kind} takes the package soundfile", got=f"{error}; {fix}",
                        fix=fix) from error
    return soundfile
