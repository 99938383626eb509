"""Recordings as mono waveforms at one sample rate, and as log-mel spectrograms of one length."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
import wave
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.spectrogram import (
    UNIFIED_IO2_INPUT,
    LogMelConfig,
    SegmentConfig,
    mel_spectrogram,
    normalised,
    segments,
)

_ZERO_CROSSINGS = 32
_KAISER_BETA = 9.0
_MAX_WEIGHTS = 2**24
"""Of the filters from one rate to another: a damaged file may claim any rate."""
_MOST_TIMES, MOST_SAMPLES = 100, 2**28
"""More samples that a recording becomes at another rate, and how many at all: nothing that is heard
has 160 a second, and a small file that claims so must not fill the memory."""
_ROLL_OFF = 0.95
"""Of the lower of the two half rates: where the filter of `resample` has fallen by half."""

_PCM, _FLOATS, _EXTENSIBLE = 1, 3, 0xFFFE
_SAMPLES = {(_PCM, 8): "u1", (_PCM, 16): "<i2", (_PCM, 24): "<i4", (_PCM, 32): "<i4",
            (_FLOATS, 32): "<f4", (_FLOATS, 64): "<f8"}
"""How samples lie in a WAV file, by its format tag and their bits."""
_STREAMED = 0xFFFFFFFF
_LOUDEST = 16.0
"""Of floats, 1.0 being full scale: what is beyond is in other units, or damaged."""


def decode_wave(data: bytes) -> tuple[Float[np.ndarray, "samples"], int]:
    """Reads a WAV file of 8, 16, 24 or 32 bit PCM, or 32 or 64 bit floats; channels are averaged.

    Returns:
        The waveform, float64, whole numbers scaled to [-1, 1], and the samples per second.

    Raises:
        UserError: it is another format, is damaged, has no samples, or floats that are not finite
            or far beyond 1.0; or its header contradicts itself.
    """
    layout, promised, raw = _wave_chunks(data)
    try:
        tag, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", layout)
        if tag == _EXTENSIBLE:  # how programs write more than 16 bits or two channels
            tag, = struct.unpack_from("<H", layout, 24)
    except struct.error as error:
        raise UserError("the recording cannot be read", got="its header is too short") from error
    if rate < 1:
        raise UserError("the recording has no sample rate", got=rate)
    if channels < 1:
        raise UserError("the recording has no channels")
    if (tag, bits) not in _SAMPLES:
        raise UserError("the recording has samples of another kind than PCM of 8, 16, 24 or 32 "
                        "bits or floats of 32 or 64", got=f"format {tag}, {bits} bits")
    width = bits // 8
    if block != width * channels:  # bits of another container: read so, it would be noise
        raise UserError("the recording's header contradicts itself",
                        got=f"{block} bytes a sample for {channels} x {bits} bits")
    if len(raw) != promised or promised % (width * channels):
        raise UserError("the recording is cut off",
                        got=f"{len(raw)} of {promised} bytes, {width * channels} a sample")
    if not raw:
        raise UserError("the recording has no samples")
    if width == 3:  # A zero byte below each makes 32 bits of the same loudness.
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        raw, width = padded.tobytes(), 4
    found = np.frombuffer(raw, _SAMPLES[tag, bits])
    if tag == _FLOATS:
        check_floats(found)
    samples = found.astype(np.float64)
    if tag == _PCM:
        samples = (samples - 128) / 128 if width == 1 else samples / 2.0**(8 * width - 1)
    return samples.reshape(-1, channels).mean(axis=1), rate


def check_floats(samples: Float[np.ndarray, "..."]) -> None:
    """Raises `UserError` if samples are not finite or far beyond 1.0."""
    if not np.isfinite(samples).all():
        raise UserError("the recording has samples that are not finite")
    if (loudest := float(np.abs(samples).max())) > _LOUDEST:
        raise UserError("the recording has samples far beyond 1.0",
                        got=f"{loudest:.4g}, at most {_LOUDEST:g}")


def _wave_chunks(data: bytes) -> tuple[bytes, int, bytes]:
    """Returns the format chunk of a WAV file, how many bytes of samples it promises, and those
    that there are (Microsoft's RIFF: chunks of a name, a size and as many bytes, padded to two)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise UserError("the recording cannot be read",
                        got="not a WAV file" if data else "the file is empty")
    place, layout = 12, None
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        content = data[place + 8:place + 8 + size]
        if name == b"fmt ":
            layout = content
        elif name == b"data" and layout is not None:
            # A program that writes into a pipe knows no size and claims the largest.
            return layout, len(content) if size == _STREAMED else size, content
        elif name == b"data":
            raise UserError("the recording cannot be read", got="no format before its samples")
        place += 8 + size + size % 2
    raise UserError("the recording cannot be read", got="the file ends before its samples")


def encode_wave(waveform: Float[np.ndarray, "samples"], rate: int) -> bytes:
    """Returns a WAV file of a mono waveform, 16 bit PCM; one that exceeds [-1, 1] is made quieter.

    Args:
        waveform: samples, 1.0 the loudest.
        rate: samples per second.
    """
    loudest = max(1.0, float(np.max(np.abs(waveform), initial=0.0)))
    samples = np.rint(np.asarray(waveform, np.float64) / loudest * 32767).astype("<i2")
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return data.getvalue()


def resample(waveform: Float[np.ndarray, "samples"], rate: int, wanted: int
             ) -> Float[np.ndarray, "resampled"]:
    """Returns the waveform at another sample rate, float64, ceil(samples * wanted / rate) long.

    Band-limited interpolation (Smith & Gossett 1984): a sinc of 32 zero crossings a side under a
    Kaiser window, one filter for each of the phases between samples. Frequencies above 0.95 of the
    lower half rate are taken out, so nothing folds back. The ends are held against silence.

    Args:
        waveform: mono.
        rate: its samples per second.
        wanted: those of the result.

    Raises:
        UserError: a rate is not positive, the two have so little in common that their filters would
            fill the memory, the result would (2**28 samples, or 100 times as many as there are), or
            the waveform is not mono or has no samples.
    """
    if rate < 1 or wanted < 1:
        raise UserError("a sample rate must be positive", got=f"{rate} and {wanted} Hz")
    if waveform.ndim != 1 or not len(waveform):
        raise UserError("a recording must be mono and have samples",
                        got=f"shape {waveform.shape}", fix="average the channels")
    if rate == wanted:
        return waveform.astype(np.float64)
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    count = -(-len(waveform) * up // down)
    if up > _MOST_TIMES * down or count > MOST_SAMPLES:
        raise UserError("the recording would become too long at the sample rate wanted",
                        got=f"{len(waveform)} samples at {rate} Hz, {count} at {wanted}")
    filters = _filters(up, down)
    half = filters.shape[1] // 2
    padded = np.pad(waveform.astype(np.float64), (half - 1, half + down + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)
    out = np.empty((count,), np.float64)
    for first in range(min(up, count)):
        # Output n lies at n * down / up samples; those `up` apart have the same phase.
        begin, phase = divmod(first * down, up)
        number = len(range(first, count, up))
        out[first::up] = windows[begin::down][:number] @ filters[phase]
    return out


@functools.lru_cache(maxsize=8)
def _filters(up: int, down: int) -> Float[np.ndarray, "phases taps"]:
    """Weights of the samples around a place `phase / up` after one; each row adds up to 1."""
    cutoff = _ROLL_OFF * min(1.0, up / down)
    half = math.ceil(_ZERO_CROSSINGS / cutoff)
    if 2 * half * up > _MAX_WEIGHTS:
        raise UserError("the sample rate of the recording cannot be brought to that wanted",
                        got=f"{down} to {up}, as they are in their smallest whole numbers")
    offsets = np.arange(1 - half, half + 1) - np.arange(up)[:, None] / up
    ratio = np.clip(1 - np.square(offsets / half), 0, None)
    weights = np.sinc(cutoff * offsets) * np.i0(_KAISER_BETA * np.sqrt(ratio))
    weights *= np.abs(offsets) <= half
    weights /= weights.sum(axis=1, keepdims=True)
    weights.setflags(write=False)
    return weights


@dataclasses.dataclass(frozen=True)
class RecordingConfig:
    """How a recording becomes spectrograms.

    The defaults are those of Unified-IO 2's inputs: segments of 4.08 s at 16 kHz.

    Attributes:
        log_mel: the spectrogram; its sample rate is the one recordings are brought to.
        segment: how long recordings are cut.
        other_rates: 'resample' recordings of another sample rate, or 'refuse' them.
        max_segments: a recording of more is refused; what is heard is never cut off in silence.
    """

    log_mel: LogMelConfig = UNIFIED_IO2_INPUT
    segment: SegmentConfig = SegmentConfig()
    other_rates: str = "resample"
    max_segments: int = 1

    def __post_init__(self) -> None:
        if self.other_rates not in ("resample", "refuse"):
            raise UserError("RecordingConfig.other_rates is 'resample' or 'refuse'",
                            got=repr(self.other_rates))
        if self.max_segments < 1:
            raise UserError("RecordingConfig.max_segments must be at least 1",
                            got=self.max_segments)

    @property
    def frames(self) -> int:
        """Frames of a segment's spectrogram; 256 by default."""
        return self.log_mel.num_frames(self.segment.samples)


class Spectrograms(NamedTuple):
    """A recording as spectrograms.

    Attributes:
        segments: float32 [n, frames, num_mels], n >= 1.
        heard: bool [n, frames, num_mels]: where there is any power, not digital silence such as the
            last segment is filled up with.
        lost_samples: at its end, at most `SegmentConfig.least_rest`, that are in no segment.
    """

    segments: Float[np.ndarray, "n frames num_mels"]
    heard: Bool[np.ndarray, "n frames num_mels"]
    lost_samples: int


def at_rate(waveform: Float[np.ndarray, "samples"], rate: int, config: RecordingConfig
            ) -> Float[np.ndarray, "samples"]:
    """Returns a waveform at the sample rate of `config`, float64.

    Raises:
        UserError: it has another rate and those are refused, has no samples, or has some that
            are not finite.
    """
    wanted = config.log_mel.sample_rate
    if not waveform.size:
        raise UserError("the recording has no samples")
    if not np.isfinite(waveform).all():
        raise UserError("the recording has samples that are not finite")
    if rate != wanted and config.other_rates == "refuse":
        raise UserError("the recording has another sample rate", got=f"{rate} Hz, not {wanted}")
    return resample(waveform, rate, wanted)


def spectrograms(waveform: Float[np.ndarray, "samples"], rate: int,
                 config: RecordingConfig = RecordingConfig()) -> Spectrograms:
    """Cuts a recording into segments and returns the log-mel spectrogram of each.

    Args:
        waveform: mono, in [-1, 1].
        rate: its samples per second.
        config: what to make of it.

    Raises:
        UserError: as `at_rate`; or there are more segments than `max_segments`.
    """
    cut = segments(at_rate(waveform, rate, config), config.segment)
    if len(cut.waveforms) > config.max_segments:
        raise UserError(
            "the recording is too long",
            got=f"{len(waveform) / rate:.2f} s are {len(cut.waveforms)} segments, at most "
                f"{config.max_segments}")
    mel = np.stack([mel_spectrogram(piece, config.log_mel) for piece in cut.waveforms])
    return Spectrograms(normalised(mel, config.log_mel), mel != 0, cut.lost_samples)


def patches_heard(heard: Bool[np.ndarray, "n frames num_mels"], patch: int
                  ) -> Int[np.ndarray, "patches"]:
    """Returns the numbers of the patches that are not silence, int32, ascending.

    As Unified-IO 2 masks them: a patch counts where its bin at (patch / 2, patch / 2), which
    nearest-neighbour resizing takes, has power. Row-major in a segment, time first, and counted on
    from segment to segment.

    Args:
        heard: of `Spectrograms`.
        patch: frames, and mel bins, of a patch.

    Raises:
        UserError: a side is not a multiple of the patch, or no patch of a segment is heard.
    """
    if heard.shape[1] % patch or heard.shape[2] % patch:
        raise UserError("the sides of a spectrogram must be multiples of its patch",
                        got=f"{heard.shape[1]} x {heard.shape[2]} with patches of {patch}")
    centres = heard[:, patch // 2::patch, patch // 2::patch].reshape(len(heard), -1)
    if not (some := centres.any(axis=1)).all():
        raise UserError("the recording is silent",
                        got=f"segment {int(np.argmin(some)) + 1} of {len(heard)}")
    return np.flatnonzero(centres).astype(np.int32)
