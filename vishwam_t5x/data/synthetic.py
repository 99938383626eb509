"""Made-up tasks of any modalities and lengths, for tests, benchmarks and plans; free of TensorFlow.

A record is a pure function of (seed, record), so a synthetic task needs no disk; `write_cache` puts
one there all the same.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vishwam_t5x.core.batch import BatchSpec, ModalityLengths
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data import records, records_writer
from vishwam_t5x.data.assembly import PlacedExample, assemble
from vishwam_t5x.objectives.masking import PatchSpec


@dataclasses.dataclass(frozen=True)
class SyntheticFeature:
    """One feature of a synthetic task.

    Attributes:
        shortest: smallest length of the leading axis, in elements.
        longest: largest length, in elements.
        median: None: lengths are uniform. Otherwise log-normal about this, clipped to the bounds.
        sigma: standard deviation of the logarithm, when log-normal.
        rest: sizes of the axes after the first, e.g. (8, 1) for images 8 wide with one channel.
        multiple_of: lengths are rounded up to a multiple of this (a patch's height).
        dtype: 'int32' (ids in [3, num_ids)), 'float32' in [0, 1), or 'uint8'.
        num_ids: one more than the largest id of an int32 feature.
    """

    shortest: int
    longest: int
    median: float | None = None
    sigma: float = 0.5
    rest: tuple[int, ...] = ()
    multiple_of: int = 1
    dtype: str = "int32"
    num_ids: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.shortest <= self.longest > 0:
            raise UserError("a synthetic feature needs 0 <= shortest <= longest, longest above 0",
                            got=f"{self.shortest}, {self.longest}")
        if self.dtype not in ("int32", "float32", "uint8"):
            raise UserError("a synthetic feature is int32, float32 or uint8", got=self.dtype)

    def sample_lengths(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns int32 [count] lengths of the leading axis."""
        if self.median is None:
            lengths = rng.integers(self.shortest, self.longest, count, endpoint=True)
        else:
            raw = np.exp(rng.normal(np.log(self.median), self.sigma, count))
            lengths = np.clip(np.rint(raw), self.shortest, self.longest)
        return (-(-lengths // self.multiple_of) * self.multiple_of).astype(np.int32)

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Returns [length, *rest] values."""
        shape = (length, *self.rest)
        if self.dtype == "int32":
            return rng.integers(3, self.num_ids, shape, dtype=np.int32)
        if self.dtype == "uint8":
            return rng.integers(0, 256, shape, dtype=np.uint8)
        return rng.random(shape, dtype=np.float32)


class SyntheticTask:
    """A task whose records are computed: fits wherever a `records.TaskCache` does."""

    def __init__(self, name: str, features: Mapping[str, SyntheticFeature], num_records: int,
                 seed: int = 0, patch_specs: Mapping[str, PatchSpec] | None = None) -> None:
        self.name, self.seed = name, seed
        self._features, self._num_records = dict(features), num_records
        self._patch_specs = dict(patch_specs or {})

    @property
    def num_records(self) -> int:
        return self._num_records

    @property
    def features(self) -> dict[str, records.FeatureInfo]:
        return {name: records.FeatureInfo((None, *feature.rest), feature.dtype)
                for name, feature in self._features.items()}

    @functools.cached_property
    def _leading(self) -> dict[str, np.ndarray]:
        return {name: feature.sample_lengths(
            example_generator(self.seed, 0, f"synthetic/{self.name}/{name}"), self._num_records)
            for name, feature in self._features.items()}

    @functools.cached_property
    def length_table(self) -> tuple[tuple[str, ...], np.ndarray]:
        """As `records.TaskCache.length_table`."""
        columns = {}
        for name, feature in self._features.items():
            columns[name] = self._leading[name]
            if feature.rest and not records.is_history(name):
                spec = self._patch_specs[records.modality_of(name)]
                columns[name] = np.asarray([spec.num_patches((int(size), *feature.rest))
                                            for size in self._leading[name]], np.int32)
        return tuple(columns), np.stack(list(columns.values()), axis=1)

    def clean_lengths(self, record: int) -> dict[str, int]:
        """As `records.TaskCache.clean_lengths`."""
        names, table = self.length_table
        return dict(zip(names, table[record].tolist(), strict=True))

    def read(self, record: int) -> dict[str, Any]:
        """As `records.TaskCache.read`."""
        rng = example_generator(self.seed, record + 1, f"synthetic/{self.name}")
        return {name: feature.sample(rng, int(self._leading[name][record]))
                for name, feature in self._features.items()}


def write_cache(task: SyntheticTask, cache_dir: str | os.PathLike, split: str = "train",
                metadata: Mapping[str, Any] | None = None, max_shard_records: int = 1024) -> None:
    """Writes a synthetic task as `vishwam cache` writes a real one."""
    place = cache_directory.task_directory(cache_dir, task.name, split)
    writer = records_writer.TaskCacheWriter(place, task.name, split, task.features, metadata,
                                            max_shard_records=max_shard_records)
    part = writer.part(0)
    if part is not None:
        for record in range(part.num_examples, task.num_records):
            assert part.write(task.read(record)) is None
        part.close()
    writer.finish()


class CopyObjective:
    """Reads `text_inputs`, `image_inputs`, `audio_inputs` as they are; writes `text_targets` and
    `image_target_codes` as they are: the smallest objective, for data without denoising.
    """

    target_modalities = ("text", "image")

    def __init__(self, patch_specs: Mapping[str, PatchSpec] | None = None) -> None:
        self.patch_specs = dict(patch_specs or {})
        self.input_modalities = ("text", *self.patch_specs)

    def lengths(self, clean_lengths: Mapping[str, int], *, seed: int, example: int
                ) -> ModalityLengths:
        """Returns the clean lengths of the features it reads and writes."""
        inputs, targets = {}, {}
        for name, length in clean_lengths.items():
            modality = records.modality_of(name)
            if name.endswith("_inputs"):
                inputs[modality] = length
            elif name.endswith(("text_targets", "_target_codes")):
                targets[modality] = length
        return ModalityLengths(inputs, targets)

    def apply(self, clean: Mapping[str, np.ndarray], *, seed: int, example: int
              ) -> dict[str, np.ndarray]:
        """Returns the model example: tokens, patches and targets."""
        from vishwam_t5x.objectives.masking import patchify

        result = {}
        for name, value in clean.items():
            modality = records.modality_of(name)
            if name == "text_inputs":
                result["inputs/text/tokens"] = value
            elif name.endswith("_inputs"):
                spec = self.patch_specs[modality]
                result[f"inputs/{modality}/input"] = patchify(value, spec).astype(np.float32)
            elif name.endswith(("text_targets", "_target_codes")):
                result[f"targets/{modality}/targets"] = value
        return result


FIVE_KIND_RATES = (2.0, 1.0, 1.0, 1.0, 1.0)
"""Rates that go with `five_kinds`: twice as much text as of each other kind."""


def five_kinds(patch_specs: Mapping[str, PatchSpec], num_records: int = 2000, seed: int = 0,
               num_ids: int = 256, num_codes: int = 16_384,
               sound_patches: tuple[int, int] = (8, 32)) -> list[SyntheticTask]:
    """Returns five tasks in the proportions of Unified-IO 2's inputs, scaled by the patch sizes.

    Text to text, image and text to text, text to image, audio to text, image and text to image:
    with 16 x 16 patches an image of 384 x 384 has 576 slots, its 32 x 32 codes 1,024.

    Args:
        patch_specs: of 'image' and 'audio'.
        num_records: of each task.
        seed: of everything.
        num_ids: of the text.
        num_codes: of images.
        sound_patches: shortest and longest spectrogram in patches of time, of 8 patches each;
            Unified-IO 2's always have 16.
    """
    text = functools.partial(SyntheticFeature, num_ids=num_ids)
    side = 24 * patch_specs["image"].height
    channels = patch_specs["image"].channels
    image = SyntheticFeature(side, side, rest=(24 * patch_specs["image"].width, channels),
                             dtype="float32")
    frames = patch_specs["audio"].height
    shortest, longest = sound_patches
    audio = SyntheticFeature(shortest * frames, longest * frames, multiple_of=frames,
                             rest=(8 * patch_specs["audio"].width,), dtype="float32")
    codes = SyntheticFeature(1024, 1024, num_ids=num_codes)
    kinds: dict[str, dict[str, SyntheticFeature]] = {
        "text": {"text_inputs": text(16, 512, 160, 0.8), "text_targets": text(4, 256, 60, 0.9)},
        "caption": {"image_inputs": image, "text_inputs": text(4, 64, 16),
                    "text_targets": text(4, 128, 24)},
        "draw": {"text_inputs": text(8, 128, 32), "image_target_codes": codes},
        "transcribe": {"audio_inputs": audio, "text_inputs": text(4, 32, 8),
                       "text_targets": text(4, 128, 32)},
        "edit": {"image_inputs": image, "text_inputs": text(4, 64, 16),
                 "image_target_codes": codes},
    }
    return [SyntheticTask(name, features, num_records, seed, patch_specs)
            for name, features in kinds.items()]


def synthetic_batch(spec: BatchSpec, seed: int, num_ids: Mapping[str, int],
                    examples_per_row: int = 4) -> dict[str, np.ndarray]:
    """Returns a full batch of random values with valid rows, segments and positions.

    Args:
        spec: shapes; without packing, one example a row. No signals: targets are ids.
        seed: of the values.
        num_ids: size of the table of each token modality, e.g. {'text': 33280, 'image': 16512}.
        examples_per_row: examples that share each row evenly.
    """
    per_row = examples_per_row if spec.packed else 1
    assert not spec.signals, "pixels and spectrograms as targets are not made up"
    placed = []
    inputs = _even_share(spec.input_capacities, spec.input_length, per_row)
    limits = spec.frame_limits()
    for modality, history in spec.histories.items():
        frames = inputs[modality] // history.latents
        if modality in limits:
            most, rows = limits[modality]
            frames = min(frames, most // (rows * per_row))
        inputs[modality] = frames * history.latents
    lengths = ModalityLengths(
        inputs,
        _even_share(spec.target_capacities, spec.target_length, per_row))
    for row in range(spec.batch_size):
        for number in range(per_row):
            rng = example_generator(seed, row * per_row + number, "synthetic_batch")
            example: dict[str, np.ndarray] = {}
            for modality, size in lengths.inputs.items():
                if modality in spec.histories:
                    history = spec.histories[modality]
                    example[f"inputs/{modality}/input"] = rng.standard_normal(
                        (size // history.latents, history.places, spec.patch_dims[modality]),
                        np.float32)
                elif modality in spec.patch_dims:
                    example[f"inputs/{modality}/input"] = rng.standard_normal(
                        (size, spec.patch_dims[modality]), np.float32)
                else:
                    example[f"inputs/{modality}/tokens"] = rng.integers(
                        3, num_ids[modality], size, dtype=np.int32)
            for modality, size in lengths.targets.items():
                example[f"targets/{modality}/targets"] = rng.integers(
                    3, num_ids[modality], size, dtype=np.int32)
            placed.append(PlacedExample(row, lengths, example))
    return assemble(spec, spec.batch_size, placed)


def _even_share(capacities: Mapping[str, int], row_length: int, parts: int) -> dict[str, int]:
    """Returns slots per example: what `parts` equal examples can use of every capacity and row."""
    total = sum(capacities.values())
    return {name: min(capacity, capacity * row_length // total) // parts
            for name, capacity in capacities.items()}
