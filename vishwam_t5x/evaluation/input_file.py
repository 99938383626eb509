"""A file of inputs: JSON lines of text and paths of pictures and recordings, as clean examples."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vishwam_t5x.core import storage
from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.data import recordings
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.vocabulary import EOS_ID

FIELDS = ("text", "image", "audio")
TARGET = "target"
"""Field of the text that is scored, or that what is written begins with."""
Spectrogram = Callable[[Float[np.ndarray, "samples"], int, int], Float[np.ndarray, "frames mels"]]
"""(waveform in [-1, 1], samples per second, multiple of frames wanted) -> log-mel spectrogram."""


class BadLine(Exception):
    """One line of the file cannot be used; the others are.

    Attributes:
        number: of the line, from 1.
        why: what is wrong with it.
    """

    def __init__(self, number: int, why: str) -> None:
        self.number, self.why = number, why
        super().__init__(f"line {number}: {why}")


class InputLine(NamedTuple):
    """A usable line.

    Attributes:
        number: from 1.
        fields: what it said.
        example: the model example: 'inputs/…', and 'targets/text/targets' where the line has a
            target.
    """

    number: int
    fields: dict[str, str]
    example: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class InputReader:
    """Turns lines into what the encoder reads.

    Attributes:
        objective: puts the prefix token in front and cuts patches.
        target: the modality that is to be written.
        encode: text -> ids, without an end token.
        spec: the longest inputs.
        grids: (rows, columns) of patches the model knows, by continuous modality.
        spectrogram: for recordings; None: they cannot be read.
        needs_target: whether a line without a "target" cannot be used.
        reads_target: whether a target is read where there is one, as a prompt say.
        ends: which of 'inputs' and 'targets' get an end token, as SeqIO's tasks append it, where
            the objective adds none.
    """

    objective: Any
    target: str
    encode: Callable[[str], np.ndarray]
    spec: BatchSpec
    grids: Mapping[str, tuple[int, int]]
    spectrogram: Spectrogram | None = None
    needs_target: bool = False
    reads_target: bool = False
    ends: Sequence[str] = ("inputs", "targets")

    def read(self, path: str | os.PathLike) -> Iterator[InputLine | BadLine]:
        """Yields every line that is not blank: as inputs, or what is wrong with it.

        Paths in the file are relative to its folder. The file, and what it names, may be anywhere
        that `core.storage` can read: gs://, s3://, ….

        Raises:
            UserError: the file itself cannot be read.
        """
        for number, text in raw_lines(path):
            if text.strip():
                yield self.line(path, number, text)

    def line(self, path: str | os.PathLike, number: int, text: bytes) -> InputLine | BadLine:
        """Returns what one line of a file means, or what is wrong with it."""
        try:
            fields = _fields(text)
            folder = storage.parent(storage.expanded(path))
            return InputLine(number, fields, self.example(fields, folder))
        except UserError as error:
            got = "" if error.got is None else f" ({error.got})"
            return BadLine(number, f"{error.problem}{got}")

    def example(self, fields: Mapping[str, str], folder: str) -> dict[str, np.ndarray]:
        """Returns the model example of one line's fields, whose paths are relative to `folder`.

        Raises:
            UserError: it cannot be used.
        """
        clean: dict[str, np.ndarray] = {}
        for name, value in fields.items():
            if name == TARGET:
                continue
            if name not in self.objective.input_modalities:
                raise UserError(f"the model reads no {name}")
            if name == "text":
                clean["text_inputs"] = self._ids(value, "inputs")
            elif name == "image":
                clean["image_inputs"] = read_image(
                    storage.join(folder, value), self.objective.image, self.grids["image"])
            else:
                clean["audio_inputs"] = self._audio(storage.join(folder, value))
        target = fields.get(TARGET)
        if target is not None and self.target != "text":
            raise UserError(f"a target is text, but what is to be written is {self.target}")
        if self.needs_target and target is None:
            raise UserError(f'there is no "{TARGET}" to score')
        # The objective wants something to predict; if there is no target, what it makes of it is
        # thrown away.
        wanted = "text_targets" if self.target == "text" else f"{self.target}_target_codes"
        clean[wanted] = (self._ids(target, "targets") if target is not None else
                         np.zeros((0 if self.target == "text" else 1,), np.int32))
        example = self.objective.apply(clean, seed=0, example=0)
        self._check_lengths(clean, example)
        if target is not None and (self.needs_target or self.reads_target):
            self._check_target(clean, example)
        kept = ("inputs/",) if target is None else ("inputs/", "targets/text/")
        return {key: value for key, value in example.items() if key.startswith(kept)}

    def _ids(self, text: str, side: str) -> np.ndarray:
        ids = np.asarray(self.encode(text), np.int32)
        if side in self.ends and not getattr(self.objective, "adds_ends", True):
            ids = np.append(ids, np.int32(EOS_ID))
        return ids

    def _audio(self, path: str) -> np.ndarray:
        if self.spectrogram is None:
            raise UserError("recordings cannot be read: infer.infer.log_mel is not bound")
        waveform, rate = read_wave(path)
        spec: PatchSpec = self.objective.audio
        spectrogram = self.spectrogram(waveform, rate, spec.height)
        rows, columns = spec.grid(spectrogram.shape)
        most, mels = self.grids["audio"]
        if columns != mels:
            raise UserError("the spectrogram has another number of mel bins than the model's",
                            got=f"{columns * spec.width}, not {mels * spec.width}")
        if rows > most:
            raise UserError("the recording is too long",
                            got=f"{rows * spec.height} frames, at most {most * spec.height}")
        return spectrogram

    def _check_lengths(self, clean: Mapping[str, np.ndarray], example: Mapping[str, np.ndarray]
                       ) -> None:
        total = 0
        for modality, most in self.spec.input_capacities.items():
            name = "tokens" if modality == "text" else "input"
            length = len(example.get(f"inputs/{modality}/{name}", ()))
            if modality == "text" and (given := len(clean.get("text_inputs", ()))) > length:
                most, length = length, given  # T5X's objectives cut what is too long
            total += length
            if length > most:
                unit = "tokens, with prefix and end" if modality == "text" else "patches"
                raise UserError(f"the {modality} is too long",
                                got=f"{length} {unit}, at most {most}")
        if total > self.spec.input_length:
            raise UserError("the inputs are too long together",
                            got=f"{total} tokens and patches, at most {self.spec.input_length}")


    def _check_target(self, clean: Mapping[str, np.ndarray], example: Mapping[str, np.ndarray]
                      ) -> None:
        kept, given = len(example["targets/text/targets"]), len(clean["text_targets"])
        most = kept if given > kept else min(
            self.spec.target_length, self.spec.target_capacities.get("text", kept))
        if (length := max(kept, given)) > most:
            raise UserError("the target is too long",
                            got=f"{length} tokens, with the end, at most {most}")


def raw_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, text) of every line of a file, blank ones too.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = io.BytesIO(storage.read_bytes(path)) if storage.is_remote(path) else (
            storage.local(path).open("rb"))
    except storage.StorageError:
        raise
    except OSError as error:
        raise UserError("the file of inputs cannot be read",
                        got=f"{path}: {error.strerror or 'there is none'}",
                        fix='give a file of lines like {"text": "what is this?", '
                            '"image": "a.png"}') from error
    with lines:
        yield from enumerate(lines, 1)


def _fields(text: bytes) -> dict[str, str]:
    try:
        fields = json.loads(text.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError("not JSON", got=str(error)) from error
    if not isinstance(fields, dict) or not set(fields) - {TARGET}:
        raise UserError('not an object with one of "text", "image", "audio"')
    for name, value in fields.items():
        if name not in (known := (*FIELDS, TARGET)):
            raise UserError(f"unknown field {name!r}",
                            got=did_you_mean(name, known) or "fields: " + ", ".join(known))
        if not isinstance(value, str):
            raise UserError(f"the {name} is not a string", got=repr(value))
    return fields


def read_image(path: storage.PathLike, spec: PatchSpec, grid: tuple[int, int]
               ) -> Float[np.ndarray, "height width channels"]:
    """Reads a picture as a model with this grid of patches knows pictures.

    It keeps its aspect ratio, is resized to fit and centred on black, as `data.tf.image` does.

    Args:
        path: any format that Pillow reads.
        spec: patch size and channels (1 or 3).
        grid: (rows, columns) of patches.

    Returns:
        float32 in [0, 1].

    Raises:
        UserError: there is no such picture, or it cannot be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    size = grid[1] * spec.width, grid[0] * spec.height
    try:
        with storage.as_local(path) as place, Image.open(place) as file:
            image = file.convert("L" if spec.channels == 1 else "RGB")
            image = ImageOps.pad(image, size, Image.Resampling.BILINEAR, color=0)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise UserError("the image cannot be read", got=error) from error
    return (np.asarray(image, np.float32) / 255).reshape(size[1], size[0], spec.channels)


def read_wave(path: storage.PathLike) -> tuple[Float[np.ndarray, "samples"], int]:
    """Reads a WAV file of 8, 16, 24 or 32 bit PCM; channels are averaged.

    Returns:
        The waveform, float64 in [-1, 1], and the samples per second.

    Raises:
        UserError: there is no such file, it is another format, or has no samples.
    """
    try:
        data = storage.read_bytes(path)
    except OSError as error:
        raise UserError("the recording cannot be read", got=f"{path}: {error}") from error
    try:
        return recordings.decode_wave(data)
    except UserError as error:
        got = path if error.got is None else f"{path}: {error.got}"
        raise UserError(error.problem, got=got) from error
