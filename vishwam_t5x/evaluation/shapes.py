"""Requests as the arrays of a batch, in few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vishwam_t5x.core.batch import BatchSpec, HistorySpec, ModalityLengths
from vishwam_t5x.data.assembly import PlacedExample, assemble
from vishwam_t5x.evaluation.requests import Request

SMALLEST_BUCKET = 16


def bucket(length: int, most: int | None = None) -> int:
    """Returns the size of the array for `length` slots: 16, 32, 64, …, but not above `most`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size if most is None else max(length, min(size, most))


def histories(config: Any) -> dict[str, HistorySpec]:
    """Returns what a frame takes, of each input modality of frames that a model's config has."""
    return {module.modality: HistorySpec(module.grid[0] * module.grid[1],
                                         module.resampler.num_latents)
            for module in config.inputs if hasattr(module, "resampler")}


def without_budgets(model: Any) -> Any:
    """Returns the same model, which encodes every frame that it is given."""
    inputs = model.config.inputs
    if not any(getattr(module, "frame_budget", None) for module in inputs):
        return model
    return model.clone(config=dataclasses.replace(model.config, inputs=tuple(
        dataclasses.replace(module, frame_budget=None)
        if getattr(module, "frame_budget", None) else module for module in inputs)))


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sorts requests by shape and lays those of one shape into arrays.

    Attributes:
        batch_size: requests in a batch.
        largest: most slots of each input modality.
        patch_dims: floats per patch of each continuous one.
        histories: those of frames.
    """

    batch_size: int
    largest: Mapping[str, int]
    patch_dims: Mapping[str, int]
    histories: Mapping[str, HistorySpec] = dataclasses.field(default_factory=dict)

    def grouped(self, requests: Iterable[Request], with_targets: bool) -> Iterator[list[Request]]:
        """Yields up to a batch of requests of one shape; reads no further ahead than it must."""
        waiting: dict[Any, list[Request]] = {}
        for request in requests:
            shape = self.of(request, with_targets), bool(request.options)
            rows = waiting.setdefault(shape, [])
            rows.append(request)
            if len(rows) == self.batch_size:
                yield waiting.pop(shape)
        yield from waiting.values()

    def of(self, request: Request, with_targets: bool) -> Any:
        """Returns the sizes of a request's arrays, inputs and targets, by modality."""
        slots = self._slots(request)
        if request.bare is not None:
            slots["text"] = max(slots["text"], len(request.bare))
        targets = request.target_slots() if with_targets else {}
        return (tuple((m, self._bucket(m, size)) for m, size in slots.items()),
                tuple((m, bucket(size)) for m, size in targets.items()))

    def _slots(self, request: Request) -> dict[str, int]:
        """Slots of each input modality of a request; a frame takes several."""
        return {m: size * (self.histories[m].latents if m in self.histories else 1)
                for m, size in request.slots().items()}

    def _bucket(self, modality: str, size: int) -> int:
        """Slots of the array for `size` slots; of a history 1, 2, 4, 8, … frames."""
        most = self.largest.get(modality)
        if modality not in self.histories:
            return bucket(size, most)
        latents = self.histories[modality].latents
        frames = 1 << (size // latents - 1).bit_length()
        return max(size, min(frames * latents, most or frames * latents))

    def task_mask(self, rows: Sequence[Request], modality: str, length: int) -> np.ndarray:
        """Returns what the tasks of requests hid of a modality, int32 [rows of `arrays`, length]:
        1 for each slot that they did."""
        found = np.zeros((self.batch_size, length), np.int32)
        for index in range(self.batch_size):
            request = rows[min(index, len(rows) - 1)]
            hidden = request.targets.get(f"targets/{modality}/task_mask", ())
            found[index, :len(hidden)] = hidden
        return found if rows[0].bare is None else np.repeat(found, 2, axis=0)

    def arrays(self, rows: Sequence[Request], with_targets: bool,
               targets: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
        """Returns the arrays of requests of one shape; of those with a bare text twice as many
        rows: each as it is, then with that text instead of its own.

        Args:
            rows: the requests.
            with_targets: lay out their targets, too.
            targets: sizes of the targets, instead of those of the shape.
        """
        inputs, shape = map(dict, self.of(rows[0], with_targets))
        targets = dict(shape if targets is None else targets)
        # Empty rows are filled with the last request: one that never ends would hold up all.
        filled = [rows[min(index, len(rows) - 1)] for index in range(self.batch_size)]
        each = [one for request in filled for one in (
            (request,) if request.bare is None else (request, request.without_text()))]
        # A spec has targets; where none are wanted, one slot that is thrown away below.
        spec = BatchSpec(len(each), sum(inputs.values()), sum(targets.values()) or 1,
                         inputs, targets or {"text": 1}, self.patch_dims, packed=False,
                         task_masks=tuple(m for m in targets if any(
                             f"targets/{m}/task_mask" in request.targets for request in each)),
                         histories={m: history for m, history in self.histories.items()
                                    if m in inputs})
        placed = []
        for index, request in enumerate(each):
            lengths = ModalityLengths(self._slots(request),
                                      request.target_slots() if with_targets else {})
            placed.append(PlacedExample(index, lengths, {**request.inputs, **request.targets}))
        arrays = assemble(spec, len(each), placed)
        return {key: value for key, value in arrays.items()
                if with_targets or key.startswith("inputs/")}
