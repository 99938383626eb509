"""Files of pictures and sounds that tests of tasks make."""

from __future__ import annotations

import io
import wave

import numpy as np
from PIL import Image


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    """The PNG file of pixels."""
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(out, "PNG")
    return out.getvalue()


def wav(samples: np.ndarray, rate: int) -> bytes:
    """The WAV file of samples in [-1, 1], 16-bit PCM."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def hum(seconds: float, rate: int, hertz: float = 300.0) -> np.ndarray:
    """A tone."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
