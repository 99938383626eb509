"""Files of pictures and sounds that tests of tasks make."""

from __future__ import annotations

import io
import struct
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


def riff(samples: np.ndarray, rate: int, tag: int | None = None, extensible: bool = False,
         before: bytes = b"") -> bytes:
    """The WAV file of samples [n, channels] as they are: whole numbers or floats.

    Args:
        samples: PCM of 16 or 32 bits, or floats.
        rate: samples per second.
        tag: of their format; None: that of their type.
        extensible: with the longer header.
        before: a chunk that says nothing, before the samples.
    """
    channels, width = samples.shape[1], samples.dtype.itemsize
    tag = tag or (3 if samples.dtype.kind == "f" else 1)
    layout = struct.pack("<HHIIHH", 0xFFFE if extensible else tag, channels, rate,
                         rate * channels * width, channels * width, 8 * width)
    if extensible:
        layout += struct.pack("<HHIH", 22, 8 * width, 0, tag) + bytes(14)
    chunks = [(b"fmt ", layout), (b"LIST", before), (b"data", samples.tobytes())]
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(each)) + each + bytes(len(each) % 2)
                              for name, each in chunks if each or name == b"data")
    return b"RIFF" + struct.pack("<I", len(body)) + body


def hum(seconds: float, rate: int, hertz: float = 300.0) -> np.ndarray:
    """A tone."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def jpeg(pixels: np.ndarray, mode: str = "RGB", turned: int | None = None) -> bytes:
    """The JPEG file of pixels; `turned`: how the camera was held, as EXIF numbers it."""
    out, exif = io.BytesIO(), Image.Exif()
    if turned is not None:
        exif[0x112] = turned
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", quality=95, exif=exif,
                                          subsampling=0)
    return out.getvalue()


def unusual_pictures() -> dict[str, tuple[bytes, list[int]]]:
    """Files that are not plain RGB, each with the mean colour of its upper half, 0 to 255."""
    red = np.full((8, 8, 3), (200, 100, 0), np.uint8)
    upper = np.where(np.arange(8)[:, None, None] < 4, red, 0).astype(np.uint8)
    seen_through, deep = io.BytesIO(), io.BytesIO()
    palette = Image.new("P", (8, 8))
    palette.putpalette([0, 0, 255])
    palette.save(seen_through, "PNG", transparency=0)
    Image.fromarray(np.full((8, 8), 9, np.uint16)).save(deep, "PNG", transparency=9)
    animated = io.BytesIO()
    Image.fromarray(red).save(animated, "GIF", save_all=True,
                              append_images=[Image.new("RGB", (8, 8), "blue")])
    colour, white, grey = [200, 100, 0], [255] * 3, [100] * 3
    return {
        "grey": (png(red[..., 1]), grey),
        "deep grey": (png(np.full((8, 8), 100 * 256 + 9, np.uint16)), grey),
        "deep grey seen through": (deep.getvalue(), white),
        "transparent": (png(np.dstack([red, np.zeros((8, 8), np.uint8)])), white),
        "palette seen through": (seen_through.getvalue(), white),
        "four inks": (jpeg(red, "CMYK"), colour),
        "upside down": (jpeg(upper[::-1], turned=3), colour),
        "on its side": (jpeg(upper.transpose(1, 0, 2), turned=5), colour),
        "animated": (animated.getvalue(), colour),
        "a pixel": (png(red[:1, :1]), colour)}


def unusual_sounds(samples: np.ndarray, rate: int) -> dict[str, bytes]:
    """Files of two channels that are on average one sound, [n] in [-1, 1]."""
    pair = np.stack([samples * 1.5, samples * 0.5], axis=1)
    low = np.rint(pair * 2**23).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3]
    kinds = {"floats": riff(pair.astype("<f4"), rate),
             "16 bits": riff(np.rint(pair * 32767).astype("<i2"), rate)}
    for name, width, content in (("8 bits", 1, np.rint(pair * 128 + 128).astype(np.uint8)),
                                 ("24 bits", 3, low)):
        out = io.BytesIO()
        with wave.open(out, "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(width)
            file.setframerate(rate)
            file.writeframes(content.tobytes())
        kinds[name] = out.getvalue()
    return kinds
