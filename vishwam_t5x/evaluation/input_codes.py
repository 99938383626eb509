"""Pictures and recordings that a model reads as codes: as what its codec codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Shaped

from vishwam_t5x.core.batch import SignalSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import pictures, recordings
from vishwam_t5x.data.spectrogram import LogMelConfig, SegmentConfig
from vishwam_t5x.models.inputs.codes import CodeInput
from vishwam_t5x.objectives.model_example import as_signal

Encode = Callable[[Shaped[np.ndarray, "b ..."]], Int[np.ndarray, "b n"]]
"""Pictures, uint8, or spectrograms -> codes from 0."""


@dataclasses.dataclass(frozen=True)
class CodedInput:
    """How a file becomes what a codec codes.

    Attributes:
        signal: what that is.
        log_mel: how the codec's spectrograms are made; None: recordings cannot be read.
        encode: the codec, where it is not the model's own.
        resize: of `pictures.PictureConfig`.
    """

    signal: SignalSpec
    log_mel: LogMelConfig | None = None
    encode: Encode | None = None
    resize: Literal["exact", "fast"] = "exact"

    def picture(self, data: bytes) -> Shaped[np.ndarray, "height width channels"]:
        """Returns the pixels of a picture file, fitted and centred on black, as tasks fit them.

        Raises:
            UserError: it cannot be decoded.
        """
        height, width, channels = self.signal.shape
        config = pictures.PictureConfig(height, width, resize=self.resize)
        return as_signal(pictures.read_picture(data, channels, config).pixels, self.signal, "image")

    def spectrogram(self, waveform: np.ndarray, rate: int) -> Shaped[np.ndarray, "frames mels"]:
        """Returns the spectrogram of a recording, filled up with silence.

        Raises:
            UserError: it is too long, or cannot be used.
        """
        if self.log_mel is None:
            raise UserError("recordings cannot be read: infer.infer.sound is not bound")
        frames = self.signal.shape[0]
        config = recordings.RecordingConfig(
            self.log_mel, SegmentConfig((frames - 1) * self.log_mel.hop, 0))
        found = recordings.spectrograms(waveform, rate, config)
        return as_signal(found.segments[0], self.signal, "audio")


def coded_inputs(config: Any, bound: Mapping[str, Any], log_mel: LogMelConfig | None,
                 resize: Literal["exact", "fast"] = "exact") -> dict[str, CodedInput]:
    """Returns how the files are read of those input modalities that have a codec to code them.

    Args:
        config: of the model.
        bound: codecs that go before the model's own, by modality: what has `encode` and `signal`,
            as `rendering.CodecFile`; others are for drawing alone.
        log_mel: how spectrograms of the codec of sound are made.
        resize: how pictures are read, see `pictures.PictureConfig`.

    Raises:
        UserError: a codec makes other codes than the model reads.
    """
    found: dict[str, CodedInput] = {}
    for module in config.inputs:
        if not isinstance(module, CodeInput):
            continue
        name, given = module.modality, bound.get(module.modality)
        encode = getattr(given, "encode", None)
        codec = config.codecs.get(name)
        if encode is None and codec is None:
            continue
        signal = given.signal if encode is not None else codec.signal
        if signal.num_codes != math.prod(module.grid):
            raise UserError(f"the codec of {name} makes more or fewer codes than the model reads",
                            got=f"{signal.grid} and {module.grid}",
                            fix="the config of the codec that made the codes of the training data")
        mels = signal.shape[1] if len(signal.shape) == 2 else None
        if log_mel is not None and mels is not None and log_mel.num_mels != mels:
            raise UserError("SoundConfig.log_mel makes other spectrograms than the codec codes",
                            got=f"{log_mel.num_mels} mel bins, not {mels}",
                            fix="the LogMelConfig of the codec's training data")
        found[name] = CodedInput(signal, log_mel, encode, resize)
    return found
