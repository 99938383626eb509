"""Spectrograms, under the name by which tasks know them; all of it is `data.spectrogram`."""

from __future__ import annotations

from vishwam_t5x.data.spectrogram import LogMelConfig as LogMelConfig
from vishwam_t5x.data.spectrogram import log_mel_spectrogram as log_mel_spectrogram
from vishwam_t5x.data.spectrogram import mel_filters as mel_filters
from vishwam_t5x.data.spectrogram import mel_spectrogram as mel_spectrogram
