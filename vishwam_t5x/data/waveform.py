"""Log-mel spectrograms to waveforms, in NumPy: the phase is guessed by Griffin and Lim's rule.

A vocoder (`models.codecs.hifi_gan`) sounds better; this needs no weights.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Complex, Float

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.spectrogram import LogMelConfig, mel_filters, mel_powers, stft, window


@dataclasses.dataclass(frozen=True)
class GriffinLimConfig:
    """How a waveform is found for a spectrogram.

    Attributes:
        iterations: rounds of the phase; at 32 the error falls slowly.
        momentum: how far a round overshoots; 0 is Griffin and Lim's own rule (1984), 0.99 that of
            Perraudin et al. (2013), which needs fewer rounds.
        filter_iterations: rounds in which the powers of the Fourier bins are fitted to those of
            the mel filters.
        seed: of the phases to begin with.
    """

    iterations: int = 60
    momentum: float = 0.99
    filter_iterations: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "filter_iterations"):
            if getattr(self, name) < 0:
                raise UserError(f"GriffinLimConfig.{name} must not be negative",
                                got=getattr(self, name))
        if not 0 <= self.momentum < 1:
            raise UserError("GriffinLimConfig.momentum must be in [0, 1)", got=self.momentum,
                            fix="0.99")


def bin_powers(mel: Float[np.ndarray, "frames num_mels"], config: LogMelConfig,
               iterations: int = 100) -> Float[np.ndarray, "frames bins"]:
    """Returns powers p >= 0 of the Fourier bins with filters · p near the mel powers, float64.

    Begins with the pseudo-inverse of the filters, negative powers raised to a little above zero,
    and goes on with p <- p · (Fᵀ m) / (Fᵀ F p), which never raises |F p - m|² (Lee & Seung 2001).
    Bins that no filter covers get 0.

    Args:
        mel: mel powers, not negative.
        config: of the filters.
        iterations: of the second rule.
    """
    filters = mel_filters(config).astype(np.float64)
    target = mel @ filters
    powers = mel @ np.linalg.pinv(filters).T
    powers = np.maximum(powers, 1e-3 * mel.max(-1, keepdims=True, initial=0.0) + 1e-12)
    powers[:, filters.sum(0) == 0] = 0.0
    for _ in range(iterations):
        powers *= target / np.maximum((powers @ filters.T) @ filters, 1e-30)
    return powers


def istft(frames: Complex[np.ndarray, "frames bins"], config: LogMelConfig, num_samples: int
          ) -> Float[np.ndarray, "samples"]:
    """Returns the waveform whose `stft` is nearest to `frames` in the least squares, float64.

    Windowed frames are added and divided by the sum of the squared windows (Griffin & Lim 1984).
    """
    size, hop, shape = config.fft_size, config.hop, window(config)
    length = size + hop * (len(frames) - 1)
    waves = np.fft.irfft(frames, size, axis=-1) * shape
    total, weight = np.zeros(length), np.zeros(length)
    for index, wave in enumerate(waves):
        total[index * hop:index * hop + size] += wave
        weight[index * hop:index * hop + size] += shape ** 2
    whole = total / np.maximum(weight, 1e-8)
    middle = whole[size // 2:size // 2 + num_samples]
    return np.pad(middle, (0, num_samples - len(middle)))


def griffin_lim(magnitudes: Float[np.ndarray, "frames bins"], config: LogMelConfig,
                settings: GriffinLimConfig = GriffinLimConfig()) -> Float[np.ndarray, "samples"]:
    """Returns a waveform whose Fourier magnitudes are near the given ones, float64.

    Each round takes the transform of the current waveform, moves on from the one before by
    momentum / (1 + momentum) of their difference, keeps its phases and puts the magnitudes back.

    Args:
        magnitudes: of the frames of `spectrogram.stft`.
        config: window and hop.
        settings: rounds.

    Returns:
        `hop` samples from one frame to the next, so that its `stft` has as many frames.

    Raises:
        UserError: too few frames for half a window.
    """
    num_samples = (len(magnitudes) - 1) * config.hop
    if num_samples <= config.fft_size // 2:
        raise UserError("a spectrogram must be longer than half a window",
                        got=f"{len(magnitudes)} frames of {config.hop} samples, window "
                        f"{config.fft_size}")
    generator = np.random.default_rng(settings.seed)
    phases = np.exp(2j * np.pi * generator.random(magnitudes.shape))
    step = settings.momentum / (1 + settings.momentum)
    before = np.zeros_like(phases)
    for _ in range(settings.iterations):
        now = stft(istft(magnitudes * phases, config, num_samples), config)
        ahead = now - step * before
        phases = ahead / np.maximum(np.abs(ahead), 1e-16)
        before = now
    return istft(magnitudes * phases, config, num_samples)


def waveform_of(log_mel: Float[np.ndarray, "frames num_mels"], config: LogMelConfig,
                settings: GriffinLimConfig = GriffinLimConfig()) -> Float[np.ndarray, "samples"]:
    """Returns a waveform with the given log-mel spectrogram, as near as phases can be guessed.

    Args:
        log_mel: as `spectrogram.log_mel_spectrogram` returns it for the same `config`.
        config: how the spectrogram was made.
        settings: rounds.

    Returns:
        float32, `hop` samples from one frame to the next, as loud as the recording; may exceed
        [-1, 1].

    Raises:
        UserError: as `griffin_lim`; or the number of mel bins is another than `config`'s.
    """
    if log_mel.ndim != 2 or log_mel.shape[1] != config.num_mels:
        raise UserError("the spectrogram has another number of mel bins than LogMelConfig.num_mels",
                        got=f"shape {log_mel.shape}, num_mels {config.num_mels}")
    powers = bin_powers(mel_powers(log_mel, config), config, settings.filter_iterations)
    return griffin_lim(np.sqrt(powers), config, settings).astype(np.float32)


def spectral_convergence(waveform: Float[np.ndarray, "samples"],
                         reference: Float[np.ndarray, "samples"], config: LogMelConfig) -> float:
    """Returns ‖|stft(waveform)| - |stft(reference)|‖ / ‖|stft(reference)|‖ over frames and bins.

    0 for equal magnitudes whatever the phases, 1 for silence. The longer one is cut.
    """
    length = min(len(waveform), len(reference))
    ours, theirs = (np.abs(stft(each[:length], config)) for each in (waveform, reference))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
