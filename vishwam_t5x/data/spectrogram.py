"""Waveforms to log-mel spectrograms, in NumPy; `data.waveform` goes the other way."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float

from vishwam_t5x.core.errors import UserError

# Slaney's mel scale (Auditory Toolbox, 1998): linear to 1 kHz, then logarithmic.
_HERTZ_PER_MEL = 200.0 / 3.0
_BREAK_HERTZ = 1000.0
_BREAK_MEL = _BREAK_HERTZ / _HERTZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27.0


@dataclasses.dataclass(frozen=True)
class LogMelConfig:
    """How a waveform becomes a log-mel spectrogram.

    The defaults are those of Unified-IO 2 (Lu et al. 2023, arXiv:2312.17172) at 16 kHz.

    Attributes:
        sample_rate: samples per second of the waveform, in hertz.
        fft_size: length of the Hann window and of the Fourier transform, in samples.
        hop: samples between the centres of two frames.
        num_mels: mel filters, the second dimension of the spectrogram.
        min_hertz: lower edge of the lowest filter, in hertz.
        max_hertz: upper edge of the highest filter, in hertz; at most half the sample rate.
        floor: powers below it are raised to it before the logarithm.
        ceiling: powers above it are lowered to it before the logarithm.
        shift: added to the natural logarithm of the power.
        scale: what that sum is divided by; 1 and shift 0 leave the logarithm as it is.
        silent_is_zero: the logarithm of a power of exactly 0, as in frames of padding, is 0 instead
            of log(floor), as Unified-IO 2 has it; shift and scale go on top.
    """

    sample_rate: int = 16000
    fft_size: int = 1024
    hop: int = 256
    num_mels: int = 128
    min_hertz: float = 0.0
    max_hertz: float = 8000.0
    floor: float = 1e-5
    ceiling: float = 1e5
    shift: float = 0.0
    scale: float = 1.0
    silent_is_zero: bool = False

    def __post_init__(self) -> None:
        for name in ("sample_rate", "fft_size", "hop", "num_mels", "scale", "floor"):
            if getattr(self, name) <= 0:
                raise UserError(f"LogMelConfig.{name} must be positive", got=getattr(self, name))
        if not 0 <= self.min_hertz < self.max_hertz <= self.sample_rate / 2:
            raise UserError("the mel filters must lie between 0 and half the sample rate",
                            got=f"{self.min_hertz} to {self.max_hertz} Hz at {self.sample_rate} Hz",
                            fix=f"set max_hertz to at most {self.sample_rate / 2}")
        if self.ceiling <= self.floor:
            raise UserError("LogMelConfig.ceiling must lie above floor", got=self.ceiling)

    def num_frames(self, num_samples: int) -> int:
        """Returns the frames of `num_samples` samples: one at sample 0, one every hop after."""
        return 1 + num_samples // self.hop


UNIFIED_IO2_INPUT = LogMelConfig(shift=4.26, scale=9.14, silent_is_zero=True)
"""Spectrograms as Unified-IO 2's audio encoder reads them."""

UNIFIED_IO2_TARGET = LogMelConfig(shift=5.0945, scale=3.8312, silent_is_zero=True)
"""Spectrograms as Unified-IO 2's audio codec codes them."""


def hertz_to_mel(hertz: np.ndarray | float) -> np.ndarray:
    """Slaney's mel scale: 3 mel per 200 Hz up to 1 kHz, 27 mel per factor of 6.4 above."""
    hertz = np.asarray(hertz, np.float64)
    high = _BREAK_MEL + np.log(np.maximum(hertz, _BREAK_HERTZ) / _BREAK_HERTZ) / _LOG_STEP
    return np.where(hertz < _BREAK_HERTZ, hertz / _HERTZ_PER_MEL, high)


def mel_to_hertz(mel: np.ndarray | float) -> np.ndarray:
    """The inverse of `hertz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    high = _BREAK_HERTZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _HERTZ_PER_MEL, high)


@functools.lru_cache(maxsize=8)
def mel_filters(config: LogMelConfig) -> Float[np.ndarray, "num_mels bins"]:
    """Returns the triangular filters, float32 [num_mels, fft_size // 2 + 1], each of unit area.

    Raises:
        UserError: a filter is narrower than the spacing of the Fourier bins and would be empty.
    """
    edges = mel_to_hertz(np.linspace(hertz_to_mel(config.min_hertz), hertz_to_mel(config.max_hertz),
                                     config.num_mels + 2))
    bins = np.fft.rfftfreq(config.fft_size, 1.0 / config.sample_rate)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - lower) / (centre - lower)
    falling = (upper - bins) / (upper - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (upper - lower))
    empty = np.flatnonzero(filters.sum(1) == 0)
    if empty.size:
        raise UserError(f"{empty.size} of {config.num_mels} mel filters contain no Fourier bin",
                        got=f"fft_size {config.fft_size} at {config.sample_rate} Hz",
                        fix="raise fft_size or lower num_mels")
    filters = filters.astype(np.float32)
    filters.setflags(write=False)
    return filters


def stft(waveform: Float[np.ndarray, "samples"], config: LogMelConfig
         ) -> Complex[np.ndarray, "frames bins"]:
    """Returns the Fourier transform of each windowed frame, complex128.

    Frames are centred on every `hop`-th sample; the waveform is mirrored at both ends.

    Raises:
        UserError: the waveform is not one-dimensional or shorter than half a window.
    """
    waveform = np.asarray(waveform, np.float64)
    half = config.fft_size // 2
    if waveform.ndim != 1 or waveform.shape[0] <= half:
        raise UserError("a waveform must be mono and longer than half a window",
                        got=f"shape {waveform.shape}, window {config.fft_size}",
                        fix="average the channels; pad short recordings with zeros")
    padded = np.pad(waveform, half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, config.fft_size)[::config.hop]
    windows = windows[:config.num_frames(waveform.shape[0])]
    return np.fft.rfft(windows * window(config), axis=-1)


def window(config: LogMelConfig) -> Float[np.ndarray, "fft_size"]:
    """Returns the symmetric Hann window: the periodic one misses Unified-IO 2's mel by 15 %."""
    return np.hanning(config.fft_size)


def mel_spectrogram(waveform: Float[np.ndarray, "samples"], config: LogMelConfig,
                    ) -> Float[np.ndarray, "frames num_mels"]:
    """Returns mel powers, float32 [frames, num_mels].

    Equal to Unified-IO 2's to float32 rounding (tests/data/test_spectrogram.py).

    Args:
        waveform: mono samples, any float dtype, [samples].
        config: window, hop and filters.

    Raises:
        UserError: as `stft`.
    """
    power = np.square(np.abs(stft(waveform, config)))
    return (power @ mel_filters(config).T.astype(np.float64)).astype(np.float32)


def log_mel_spectrogram(waveform: Float[np.ndarray, "samples"], config: LogMelConfig,
                        ) -> Float[np.ndarray, "frames num_mels"]:
    """Returns (log(clip(mel power, floor, ceiling)) + shift) / scale, float32 [frames, num_mels].

    Raises:
        UserError: as `mel_spectrogram`.
    """
    mel = mel_spectrogram(waveform, config)
    return normalised(mel, config)


def normalised(mel: Float[np.ndarray, "*batch num_mels"], config: LogMelConfig
               ) -> Float[np.ndarray, "*batch num_mels"]:
    """Returns the logarithm of mel powers as `config` bounds, moves and scales it, float32."""
    logarithm = np.log(np.clip(mel, config.floor, config.ceiling))
    if config.silent_is_zero:
        logarithm = np.where(mel == 0, np.float32(0), logarithm)
    return ((logarithm + config.shift) / config.scale).astype(np.float32)


def mel_powers(log_mel: Float[np.ndarray, "*batch num_mels"], config: LogMelConfig
               ) -> Float[np.ndarray, "*batch num_mels"]:
    """The inverse of `normalised`, float64: mel powers, within [floor, ceiling].

    With `silent_is_zero` a silent bin cannot be told from one of power 1: it comes back as 1.
    """
    logarithm = np.asarray(log_mel, np.float64) * config.scale - config.shift
    return np.clip(np.exp(logarithm), config.floor, config.ceiling)


@dataclasses.dataclass(frozen=True)
class SegmentConfig:
    """How a recording is cut into pieces of one length.

    Attributes:
        samples: samples of a piece; 65,280, of Unified-IO 2, are 256 frames or 4.08 s.
        least_rest: what is left after the last whole piece becomes a piece of its own, filled up
            with silence, if it has more samples than this; 34,240 in Unified-IO 2 (2.14 s).
            A recording shorter than a piece always becomes one.
    """

    samples: int = 65280
    least_rest: int = 34240

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError("SegmentConfig.samples must be at least 1", got=self.samples)
        if not 0 <= self.least_rest < self.samples:
            raise UserError("SegmentConfig.least_rest must be less than a piece, and not negative",
                            got=self.least_rest, fix="0 to lose nothing")


class Segments(NamedTuple):
    """A recording in pieces.

    Attributes:
        waveforms: [n, samples], n >= 1, in the dtype of the recording.
        lost_samples: samples at its end that are in none of them, at most `least_rest`.
    """

    waveforms: Float[np.ndarray, "n samples"]
    lost_samples: int


def segments(waveform: Float[np.ndarray, "samples"], config: SegmentConfig = SegmentConfig()
             ) -> Segments:
    """Cuts a recording into pieces, the last one filled up with zeros.

    Raises:
        UserError: it is not mono, or has no samples.
    """
    if waveform.ndim != 1 or waveform.shape[0] == 0:
        raise UserError("a recording must be mono and have samples",
                        got=f"shape {waveform.shape}", fix="average the channels")
    whole, rest = divmod(waveform.shape[0], config.samples)
    count = max(whole + (rest > config.least_rest), 1)
    kept = waveform[:count * config.samples]
    filled = np.pad(kept, (0, count * config.samples - len(kept)))
    return Segments(filled.reshape(count, config.samples), waveform.shape[0] - len(kept))
