"""A file of inputs: JSON lines of text and paths of pictures and recordings, as clean examples."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from vishwam_t5x.core import storage
from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.data import pictures, recordings
from vishwam_t5x.data.sound_files import decode_sound
from vishwam_t5x.evaluation import options as option_texts
from vishwam_t5x.evaluation.input_codes import CodedInput
from vishwam_t5x.evaluation.options import OptionReader
from vishwam_t5x.objectives.masking import FrameSpec, PatchSpec
from vishwam_t5x.objectives.vocabulary import EOS_ID

FIELDS = ("text", "image", "frames", "audio")
TARGET = "target"
"""Field of the text that is scored, or that what is written begins with."""
OPTIONS = "options"
"""Field of a list of texts, of which the best is to be chosen."""
Hear = Callable[[Float[np.ndarray, "samples"], int, int], recordings.Spectrograms]
"""(waveform in [-1, 1], samples per second, multiple of frames wanted) -> log-mel spectrograms."""
ReadBytes = Callable[[storage.PathLike], bytes]
Decoded = TypeVar("Decoded")
_logger = logging.getLogger(__name__)


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
        fields: what it said: texts and paths, of "frames" a list of paths.
        example: the model example: 'inputs/…', and 'targets/text/targets' where the line has a
            target.
        options: of its "options"; () where it has none.
        option_ids: the ids of each, with its end.
    """

    number: int
    fields: dict[str, Any]
    example: dict[str, np.ndarray]
    options: tuple[str, ...] = ()
    option_ids: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class InputReader:
    """Turns lines into what the encoder reads.

    Attributes:
        objective: puts the prefix token in front and cuts patches.
        target: the modality that is to be written.
        encode: text -> ids, without an end token.
        spec: the longest inputs.
        grids: (rows, columns) of patches the model knows, by continuous modality.
        hear: makes spectrograms of recordings; None: they cannot be read.
        needs_target: whether a line without a "target" cannot be used.
        reads_target: whether a target is read where there is one, as a prompt say.
        ends: which of 'inputs' and 'targets' get an end token, as SeqIO's tasks append it, where
            the objective adds none.
        chosen: features with which the tasks choose patches ('image_input_patches', …): padding of
            those inputs, and silence, is then not given to the encoder.
        coded: how files become what is coded, of inputs that are read as codes; the others of
            those cannot be read.
        read_bytes: returns the content of a picture or a recording.
        resize: how pictures are read, see `pictures.PictureConfig`.
    """

    objective: Any
    target: str
    encode: Callable[[str], np.ndarray]
    spec: BatchSpec
    grids: Mapping[str, tuple[int, int]]
    hear: Hear | None = None
    needs_target: bool = False
    reads_target: bool = False
    ends: Sequence[str] = ("inputs", "targets")
    chosen: Collection[str] = ()
    coded: Mapping[str, CodedInput] = dataclasses.field(default_factory=dict)
    read_bytes: ReadBytes = storage.read_bytes
    resize: Literal["exact", "fast"] = "exact"

    def __post_init__(self) -> None:
        if getattr(self.objective, "codecs", None):
            # Lines have no pictures to be written: codes stand in for them.
            object.__setattr__(self, "objective", dataclasses.replace(self.objective, codecs=None))

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
            fields, options = _fields(text)
            folder = storage.parent(storage.expanded(path))
            return InputLine(number, fields, self.example(fields, folder), options,
                             self.option_ids(options))
        except UserError as error:
            got = "" if error.got is None else f" ({error.got})"
            return BadLine(number, f"{error.problem}{got}")

    def example(self, fields: Mapping[str, Any], folder: str) -> dict[str, np.ndarray]:
        """Returns the model example of one line's fields, whose paths are relative to `folder`.

        Raises:
            UserError: it cannot be used.
        """
        clean: dict[str, np.ndarray] = {}
        signals: dict[str, np.ndarray] = {}
        for name, value in fields.items():
            if name == TARGET:
                continue
            modality = "image_history" if name == "frames" else name
            if modality not in self.objective.input_modalities:
                raise UserError(f"the model reads no {name}")
            if name == "text":
                clean["text_inputs"] = self._ids(value, "inputs")
            elif name in getattr(self.objective, "code_inputs", ()):
                signals[name] = self._signal(name, storage.join(folder, value))
                # Codes are made of it later, of many at once: as many stand in for them.
                clean[f"{name}_input_codes"] = np.zeros(self.coded[name].signal.num_codes, np.int32)
            elif name == "image":
                picture = read_picture(storage.join(folder, value), self.objective.image,
                                       self.grids["image"], self.read_bytes, self.resize)
                clean["image_inputs"] = pictures.scaled(picture.pixels)
                clean |= self._choose("image", _patches_inside, [picture], self.objective.image)
            elif name == "frames":
                clean |= self._frames([storage.join(folder, path) for path in value])
            else:
                clean |= self._audio(storage.join(folder, value))
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
        return {**{key: value for key, value in example.items() if key.startswith(kept)},
                **{f"inputs/{name}/signal": signal[None] for name, signal in signals.items()}}

    def option_ids(self, options: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Returns the ids of options, with their ends.

        Raises:
            UserError: nothing is to be chosen among them.
        """
        if options and self.needs_target:
            raise UserError(f'"{OPTIONS}" are chosen among, but the "{TARGET}" is to be scored')
        return OptionReader(self.encode, self.ends).ids(options)

    def _ids(self, text: str, side: str) -> np.ndarray:
        ids = np.asarray(self.encode(text), np.int32)
        if side in self.ends and not getattr(self.objective, "adds_ends", True):
            ids = np.append(ids, np.int32(EOS_ID))
        return ids

    def _signal(self, name: str, path: str) -> np.ndarray:
        """What is coded of a picture or a recording."""
        if name not in self.coded:
            raise UserError(f"the model reads codes of the {name}, and no codec makes them: bind "
                            + {"image": "infer.infer.decode_image", "audio": "SoundConfig.decode"
                               }.get(name, "one") + " to a rendering.CodecFile")
        if name == "audio":
            return self.coded[name].spectrogram(*read_sound(path, self.read_bytes))
        return _decoded(path, self.coded[name].picture, self.read_bytes)

    def _choose(self, modality: str, choose: Callable[..., np.ndarray], *given: Any
                ) -> dict[str, np.ndarray]:
        """The feature of patches chosen by a function, where the tasks have it."""
        name = f"{modality}_input_patches"
        return {name: choose(*given)} if name in self.chosen else {}

    def _frames(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        spec: FrameSpec = self.objective.histories["image_history"]
        spec.slots(len(paths))  # before files are read: there may be too many
        frames = [read_picture(path, spec.patch, spec.grid, self.read_bytes, self.resize)
                  for path in paths]
        return {"image_history_inputs": np.stack([pictures.scaled(each.pixels) for each in frames]),
                **self._choose("image_history", _patches_inside, frames, spec.patch)}

    def _audio(self, path: str) -> dict[str, np.ndarray]:
        """The last segment of a recording, and those before it if there are any."""
        if self.hear is None:
            raise UserError("recordings cannot be read: infer.infer.log_mel is not bound")
        waveform, rate = read_sound(path, self.read_bytes)
        spec: PatchSpec = self.objective.audio
        found = self.hear(waveform, rate, spec.height)
        if found.lost_samples:
            _logger.warning("%s: %d samples at its end are in no segment", path,
                            found.lost_samples)
        segments = found.segments
        spectrogram, before = segments[-1], segments[:-1]
        if len(before) and "audio_history" not in self.objective.input_modalities:
            raise UserError("the recording is too long for a model without audio_history",
                            got=f"{len(segments)} segments")
        rows, columns = spec.grid(spectrogram.shape)
        most, mels = self.grids["audio"]
        if columns != mels:
            raise UserError("the spectrogram has another number of mel bins than the model's",
                            got=f"{columns * spec.width}, not {mels * spec.width}")
        if rows > most:
            raise UserError("the recording is too long",
                            got=f"{rows * spec.height} frames, at most {most * spec.height}")
        heard = recordings.patches_heard
        out = {"audio_inputs": spectrogram,
               **self._choose("audio", heard, found.heard[-1:], spec.height)}
        if len(before):
            out |= {"audio_history_inputs": before,
                    **self._choose("audio_history", heard, found.heard[:-1], spec.height)}
        return out

    def _check_lengths(self, clean: Mapping[str, np.ndarray], example: Mapping[str, np.ndarray]
                       ) -> None:
        total = 0
        for modality, most in self.spec.input_capacities.items():
            length = len(example.get(f"inputs/{modality}/input",
                                     example.get(f"inputs/{modality}/tokens", ())))
            if modality in self.spec.histories:
                length *= self.spec.histories[modality].latents
            if modality == "text" and (given := len(clean.get("text_inputs", ()))) > length:
                most, length = length, given  # T5X's objectives cut what is too long
            total += length
            if length > most:
                unit = "tokens, with prefix and end" if modality == "text" else (
                    "slots" if modality in self.spec.histories
                    or modality not in self.spec.patch_dims else "patches")
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


def _fields(text: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a line, and its options apart."""
    try:
        fields = json.loads(text.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError("not JSON", got=str(error)) from error
    if not isinstance(fields, dict) or not set(fields) - {TARGET, OPTIONS}:
        raise UserError('not an object with one of "text", "image", "frames", "audio"')
    options = option_texts.checked(fields.pop(OPTIONS)) if OPTIONS in fields else ()
    for name, value in fields.items():
        if name not in (known := (*FIELDS, TARGET, OPTIONS)):
            raise UserError(f"unknown field {name!r}",
                            got=did_you_mean(name, known) or "fields: " + ", ".join(known))
        if name == "frames":
            if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
                raise UserError("the frames are not a list of paths", got=repr(value))
            if not value:
                raise UserError("the video has no frames")
        elif not isinstance(value, str):
            raise UserError(f"the {name} is not a string", got=repr(value))
    return fields, options


def _patches_inside(found: Sequence[pictures.Picture], spec: PatchSpec) -> np.ndarray:
    """Numbers of the patches that are picture, counted on from one to the next."""
    inside = np.stack([pictures.patches_inside(each.inside, spec.height) for each in found])
    if not inside.any(axis=1).all():
        raise UserError("an image is too narrow: it covers no patch")
    return np.flatnonzero(inside).astype(np.int32)


def read_picture(path: storage.PathLike, spec: PatchSpec, grid: tuple[int, int],
                 read_bytes: ReadBytes = storage.read_bytes,
                 resize: Literal["exact", "fast"] = "exact") -> pictures.Picture:
    """Reads a picture as a model with this grid of patches knows pictures.

    As tasks read it (`data.pictures`): grey, transparent and 16-bit ones are converted; it keeps
    its aspect ratio, is resized to fit and centred on black.

    Args:
        path: any format that Pillow reads by itself.
        spec: patch size and channels (1 or 3).
        grid: (rows, columns) of patches.
        read_bytes: how the file is read.
        resize: see `pictures.PictureConfig`.

    Returns:
        Its pixels, uint8, and where among them the picture is.

    Raises:
        UserError: there is no such picture, or it cannot be decoded.
    """
    config = pictures.PictureConfig(grid[0] * spec.height, grid[1] * spec.width, resize=resize)
    return _decoded(path, lambda data: pictures.read_picture(data, spec.channels, config),
                    read_bytes)


def _decoded(path: storage.PathLike, decode: Callable[[bytes], Decoded], read_bytes: ReadBytes
             ) -> Decoded:
    """What is made of a picture's file; mistakes name it."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError("the image cannot be read", got=f"{path}: {error}") from error
    try:
        return decode(data)
    except UserError as error:
        got = path if error.got is None else f"{path}: {error.got}"
        raise UserError(error.problem, got=got) from error


def read_sound(path: storage.PathLike, read_bytes: ReadBytes = storage.read_bytes
              ) -> tuple[Float[np.ndarray, "samples"], int]:
    """Reads a recording: `data.sound_files.decode_sound`, which says what it refuses.

    Returns:
        The waveform, float64, and the samples per second.

    Raises:
        UserError: there is no such file, or what `decode_sound` says.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError("the recording cannot be read", got=f"{path}: {error}") from error
    try:
        return decode_sound(data)
    except UserError as error:
        got = path if error.got is None else f"{path}: {error.got}"
        raise UserError(error.problem, got=got) from error
