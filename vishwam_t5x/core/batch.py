"""What a batch is: its arrays and their shapes, and where in the data it begins and ends.

A row holds many examples of several modalities. Each modality keeps its own arrays of a fixed
capacity; `<side>/row/index` says which slot of their concatenation goes to which column of the row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vishwam_t5x.core.errors import UserError

Batch = Mapping[str, Any]
"""Flat dictionary of arrays, keys like 'inputs/text/tokens' and 'targets/image/targets'."""

MAX_CARRIED = 32
"""A batch is done when this many examples have been found that fit in none of its rows."""

MODALITIES = ("text", "image", "audio")
"""What is read and written, in row order."""

HISTORIES = ("image_history", "audio_history")
"""What is read only, frame by frame."""

ROW_ORDER = ("text", "image", "image_history", "audio", "audio_history")
"""The order in which modalities stand in a row, with the histories that are read only."""


def modality_order(names: Any) -> tuple[str, ...]:
    """Returns `names` in row order: that of `ROW_ORDER`, then others by name."""
    rank = {name: index for index, name in enumerate(ROW_ORDER)}
    return tuple(sorted(names, key=lambda name: (rank.get(name, len(rank)), name)))


class FeatureSpec(NamedTuple):
    """Shape (with the batch dimension) and dtype of one array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype


class ModalityLengths(NamedTuple):
    """Slots one example takes, by modality: encoder side and decoder side."""

    inputs: dict[str, int]
    targets: dict[str, int]


class HistorySpec(NamedTuple):
    """What a frame of a history takes: a picture of a video, or a segment of sound.

    Attributes:
        places: patches of a whole frame.
        latents: slots of a row that a frame becomes.
        budget: frames for each row, on average over `budget_rows`; None: as many as fit. The model
            encodes as many and no more (`HistoryInput.frame_budget`).
        budget_rows: rows one after the other that share their budget; see `rows_sharing`.
    """

    places: int
    latents: int
    budget: float | None = None
    budget_rows: int = 8


def rows_sharing(budget_rows: int, batch_size: int) -> int:
    """Returns how many rows of a batch share a budget: all where they are no multiple of those."""
    return batch_size if batch_size % budget_rows else budget_rows


class SignalSpec(NamedTuple):
    """A target that a batch holds as it is, of which the model makes codes itself.

    Attributes:
        name: of the array: 'pixels' or 'spectrogram'.
        shape: of one picture, [height, width, channels], or of one spectrogram, [frames, mel bins].
        dtype: by NumPy's name: 'uint8' for pixels, 255 standing for 1.0; 'float32'.
        grid: (rows, columns) of its codes, each of which takes a slot.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: tuple[int, int]

    @property
    def num_codes(self) -> int:
        """Slots that one takes."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """The whole position in the data: it knows neither hosts nor rows.

    Attributes:
        next_example: the first example number never yet looked at.
        carried: numbers of examples below `next_example` that fitted in no row so far, oldest
            first, at most `MAX_CARRIED`.
    """

    next_example: int = 0
    carried: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.next_example >= 0, self.next_example
        assert len(self.carried) <= MAX_CARRIED, len(self.carried)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns {'next_example': int64 [], 'carried': int64 [MAX_CARRIED], padded with -1}."""
        carried = np.full((MAX_CARRIED,), -1, np.int64)
        carried[:len(self.carried)] = self.carried
        return {"next_example": np.asarray(self.next_example, np.int64), "carried": carried}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> DataPosition:
        """The inverse of `to_arrays`."""
        carried = np.asarray(arrays["carried"], np.int64)
        return cls(int(np.asarray(arrays["next_example"])),
                   tuple(int(number) for number in carried if number >= 0))


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The static shapes of a batch.

    Attributes:
        batch_size: rows of the global batch.
        input_length: columns of an encoder row, in slots (tokens or patches).
        target_length: columns of a decoder row, in slots.
        input_capacities: slots each input modality may use in one row.
        target_capacities: slots each target modality may use in one row.
        patch_dims: numbers per patch of each continuous input modality.
        packed: several examples a row (with row indices and segment ids); False: one a row.
        task_masks: target modalities whose slots say whether the task hid them from the encoder.
        histories: input modalities of frames; their capacities count slots, `latents` a frame.
        byte_patches: continuous input modalities whose patches are uint8, 255 standing for 1.0;
            those of the others are float32.
        signals: target modalities of which the batch holds pixels or spectrograms, not codes. The
            slots from k · num_codes on are about number k of a row.
        most_a_row: input modality -> how many examples of a row may have it; of one not named, as
            many as fit.
    """

    batch_size: int
    input_length: int
    target_length: int
    input_capacities: Mapping[str, int]
    target_capacities: Mapping[str, int]
    patch_dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    packed: bool = True
    task_masks: tuple[str, ...] = ()
    histories: Mapping[str, HistorySpec] = dataclasses.field(default_factory=dict)
    byte_patches: tuple[str, ...] = ()
    signals: Mapping[str, SignalSpec] = dataclasses.field(default_factory=dict)
    most_a_row: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "input_length", "target_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive whole number", got=repr(value))
        for side in (self.input_capacities, self.target_capacities):
            for name, value in side.items():
                if not isinstance(value, int) or value < 1:
                    raise UserError(f"the capacity of modality '{name}' must be positive",
                                    got=repr(value), fix="set it in TASK_FEATURE_LENGTHS")
        if not self.target_capacities:
            raise UserError("a batch needs at least one target modality")
        for name, history in self.histories.items():
            if self.input_capacities.get(name, 0) % history.latents:
                raise UserError(f"the capacity of '{name}' must hold whole frames",
                                got=f"{self.input_capacities[name]} slots, {history.latents} a "
                                    "frame", fix=f"set inputs/{name} to a multiple")
        for name, signal in self.signals.items():
            if self.target_capacities.get(name, 0) % signal.num_codes:
                raise UserError(f"the capacity of '{name}' must hold whole grids of codes",
                                got=f"{self.target_capacities[name]} slots, {signal.num_codes} a "
                                    "grid", fix=f"set targets/{name} to a multiple")

    @property
    def rows_together(self) -> int:
        """Rows one after the other that no microbatch may part: they share budgets of frames."""
        return math.lcm(*(rows for _, rows in self.frame_limits().values()))

    def frame_limits(self) -> dict[str, tuple[int, int]]:
        """Returns {history: (frames, rows)}: so many at most in each run of so many rows."""
        return {modality: (max(1, round(history.budget * rows)), rows)
                for modality, history in self.histories.items() if history.budget is not None
                for rows in [rows_sharing(history.budget_rows, self.batch_size)]}

    @classmethod
    def from_feature_lengths(cls, batch_size: int, lengths: Mapping[str, int],
                             input_modalities: tuple[str, ...], target_modalities: tuple[str, ...],
                             patch_dims: Mapping[str, int], packed: bool = True,
                             task_masks: tuple[str, ...] = (),
                             histories: Mapping[str, HistorySpec] | None = None,
                             byte_patches: tuple[str, ...] = (),
                             signals: Mapping[str, SignalSpec] | None = None,
                             most_a_row: Mapping[str, int] | None = None) -> BatchSpec:
        """Builds the shapes from TASK_FEATURE_LENGTHS.

        Args:
            batch_size: rows of the global batch.
            lengths: {'inputs': columns, 'targets': columns, 'inputs/image': capacity, …};
                capacities not named are as long as the row, or as many whole grids as it holds.
            input_modalities: modalities the encoder reads.
            target_modalities: modalities the decoder writes.
            patch_dims: numbers per patch of each continuous input modality.
            packed: several examples a row.
            task_masks: target modalities with a 'task_mask'.
            histories: input modalities of frames.
            byte_patches: continuous input modalities whose patches are uint8.
            signals: target modalities that are given as pixels or spectrograms.
            most_a_row: examples of a row that may have an input modality.

        Raises:
            UserError: a row length is missing, a name is unknown, a capacity exceeds its row.
        """
        signals = dict(signals or {})
        known = {"inputs", "targets"} | {f"inputs/{m}" for m in input_modalities} | {
            f"targets/{m}" for m in target_modalities}
        for name in lengths:
            if name not in known:
                raise UserError("TASK_FEATURE_LENGTHS names a feature the model does not have",
                                got=name, fix="known: " + ", ".join(sorted(known)))
        for side in ("inputs", "targets"):
            if side not in lengths:
                raise UserError(f"TASK_FEATURE_LENGTHS lacks '{side}'", got=dict(lengths),
                                fix="e.g. TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 114}")

        def capacities(side: str, modalities: tuple[str, ...]) -> dict[str, int]:
            out = {}
            for modality in modality_order(modalities):
                most = lengths[side]
                if side == "targets" and modality in signals and most >= (
                        a_grid := signals[modality].num_codes):
                    most -= most % a_grid
                out[modality] = lengths.get(f"{side}/{modality}", most)
                if out[modality] > lengths[side]:
                    raise UserError(
                        f"TASK_FEATURE_LENGTHS['{side}/{modality}'] is longer than the row",
                        got=f"{out[modality]} > {lengths[side]}",
                        fix=f"raise '{side}' or lower '{side}/{modality}'")
            return out

        return cls(batch_size, lengths["inputs"], lengths["targets"],
                   capacities("inputs", input_modalities), capacities("targets", target_modalities),
                   dict(patch_dims), packed, tuple(task_masks), dict(histories or {}),
                   tuple(byte_patches), signals, dict(most_a_row or {}))

    def arrays(self) -> dict[str, FeatureSpec]:
        """Returns the shape and dtype of every array of the batch."""
        rows, ints = self.batch_size, np.dtype(np.int32)
        out: dict[str, FeatureSpec] = {}
        segments = ("segment_ids",) if self.packed else ()
        for modality, slots in self.input_capacities.items():
            prefix = f"inputs/{modality}"
            if modality in self.histories:
                out |= self._frame_arrays(modality, slots)
                continue
            if modality in self.patch_dims:
                out[f"{prefix}/input"] = FeatureSpec(
                    (rows, slots, self.patch_dims[modality]), self._patch_dtype(modality))
            else:
                out[f"{prefix}/tokens"] = FeatureSpec((rows, slots), ints)
            for name in ("mask", "pos_ids", *segments):
                out[f"{prefix}/{name}"] = FeatureSpec((rows, slots), ints)
        for modality, slots in self.target_capacities.items():
            task = ("task_mask",) if modality in self.task_masks else ()
            given = () if modality in self.signals else ("inputs", "targets")
            for name in (*given, "mask", "loss_mask", *task, "pos_ids", *segments):
                out[f"targets/{modality}/{name}"] = FeatureSpec((rows, slots), ints)
        for modality, signal in self.signals.items():
            number = self.target_capacities[modality] // signal.num_codes
            out[f"targets/{modality}/{signal.name}"] = FeatureSpec(
                (rows, number, *signal.shape), np.dtype(signal.dtype))
        if self.packed:
            out["inputs/row/index"] = FeatureSpec((rows, self.input_length), ints)
            out["targets/row/index"] = FeatureSpec((rows, self.target_length), ints)
        return out

    def _frame_arrays(self, modality: str, slots: int) -> dict[str, FeatureSpec]:
        """The arrays of a history: patches by frame, and which frame of which example it is."""
        prefix, ints, history = f"inputs/{modality}", np.dtype(np.int32), self.histories[modality]
        frames = (self.batch_size, slots // history.latents)
        places = (*frames, history.places)
        out = {f"{prefix}/input": FeatureSpec((*places, self.patch_dims[modality]),
                                              self._patch_dtype(modality)),
               f"{prefix}/mask": FeatureSpec(places, ints),
               f"{prefix}/pos_ids": FeatureSpec(places, ints),
               f"{prefix}/frame_ids": FeatureSpec(frames, ints)}
        if self.packed:
            out[f"{prefix}/segment_ids"] = FeatureSpec(frames, ints)
        return out

    def _patch_dtype(self, modality: str) -> np.dtype:
        return np.dtype(np.uint8 if modality in self.byte_patches else np.float32)
