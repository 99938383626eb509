"""From a plan to arrays: reads and corrupts the examples of some rows and lays them into slots.

The plan covers the global batch and needs lengths only; a host reads only the examples of the rows
it asks for. The arrays are those of `core.batch.BatchSpec.arrays`.
"""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from vishwam_t5x.core.batch import BatchSpec, DataPosition, ModalityLengths
from vishwam_t5x.core.coordination import exchange
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.data.packing_plan import (
    ExampleStream,
    LengthFunction,
    Packer,
    PackingPlan,
    Placement,
    naming_the_task,
)
from vishwam_t5x.data.records import META_PREFIX, DamagedRecord

MIN_RECORDS_FOR_FRACTION = 1000
"""The share of damaged records is taken of at least so many: one in the first ten is no trend."""


class Objective(LengthFunction, Protocol):
    """What turns a clean example into what the model reads and writes."""

    @property
    def input_modalities(self) -> Sequence[str]: ...

    @property
    def target_modalities(self) -> Sequence[str]: ...

    def apply(self, clean: Mapping[str, np.ndarray], *, seed: int, example: int
              ) -> dict[str, np.ndarray]: ...


class HostBatch(NamedTuple):
    """The rows of a batch that were asked for.

    Attributes:
        arrays: as `BatchSpec.arrays`, but only those rows, in the order asked for.
        plan: of the global batch.
        bad: records of those rows that could not be used; their slots are empty.
    """

    arrays: dict[str, np.ndarray]
    plan: PackingPlan
    bad: tuple[DamagedRecord, ...]


class PackedBatches:
    """Builds any batch of a stream from its position."""

    def __init__(self, examples: ExampleStream, objective: Objective, spec: BatchSpec, seed: int,
                 max_bad_fraction: float = 0.01, read_threads: int = 1) -> None:
        """Args:
            examples: the numbered examples.
            objective: corrupts an example on read; a pure function of (seed, example).
            spec: shapes of the batch; `spec.packed` False puts one example in each row.
            seed: of the objective.
            max_bad_fraction: share of damaged records, among those read so far by all processes
                and at least `MIN_RECORDS_FOR_FRACTION`, beyond which to stop.
            read_threads: records read at a time; more than 1 pays on network file systems.
        """
        self.examples, self.objective, self.spec, self.seed = examples, objective, spec, seed
        self.packer = Packer(examples, objective, spec, seed)
        self.max_bad_fraction = max_bad_fraction
        self.num_read = self.num_bad = 0
        self._last_bad: DamagedRecord | None = None
        self._pool = (concurrent.futures.ThreadPoolExecutor(read_threads, "vishwam-read")
                      if read_threads > 1 else None)

    def batch(self, position: DataPosition, rows: slice | Sequence[int] | None = None
              ) -> HostBatch | None:
        """Returns the batch that begins at `position`; None at the end of a finite stream.

        Args:
            position: where the batch begins.
            rows: which rows to build; None: all.

        Raises:
            UserError: an example fits in no row, or too many records are damaged; of several
                processes, see `check_damage`.
        """
        plan = self.packer.plan(position)
        if plan is None:
            return None
        wanted: Sequence[int] = range(self.spec.batch_size)
        if isinstance(rows, slice):
            wanted = wanted[rows]
        elif rows is not None:
            wanted = rows
        places = [(index, place) for index, row in enumerate(wanted) for place in plan.rows[row]]
        placed, bad = [], []
        read = self._pool.map if self._pool else map
        for (index, place), clean in zip(
                places, read(self._read, [place.example for _, place in places]), strict=True):
            if isinstance(clean, DamagedRecord):
                bad.append(clean)
            else:
                placed.append(PlacedExample(index, place.lengths, self._corrupt(place, clean)))
        self.num_read += len(places)
        self.num_bad += len(bad)
        if bad:
            self._last_bad = bad[-1]
            if jax.process_count() == 1:
                self.check_damage()
        self.examples.release(min((plan.end.next_example, *plan.end.carried)))
        return HostBatch(assemble(self.spec, len(wanted), placed), plan, tuple(bad))

    def check_damage(self) -> None:
        """Stops all processes together if too many records are damaged; all must call it together.

        One process that stopped by itself would leave the others waiting for it in the next step.

        Raises:
            UserError: the same on every process.
        """
        bad = self._last_bad
        counts = [json.loads(text) for text in exchange("damaged records", json.dumps(
            [self.num_read, self.num_bad, bad and [bad.task, str(bad)]]))]
        num_read, num_bad = (sum(count[which] for count in counts) for which in (0, 1))
        if num_bad <= self.max_bad_fraction * max(num_read, MIN_RECORDS_FOR_FRACTION):
            return
        task, last = next(count[2] for count in counts if count[2])
        raise UserError(
            "too many damaged records", got=f"{num_bad} of {num_read} read; the last: {last}",
            fix=f"write the cache again (vishwam cache --task_or_mixture={task} --overwrite), or "
                f"allow more: max_bad_fraction is {self.max_bad_fraction}")

    def close(self) -> None:
        """Ends the reading threads."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _read(self, example: int) -> dict[str, Any] | DamagedRecord:
        try:
            return self.examples.read(example)
        except DamagedRecord as error:
            return error

    def _corrupt(self, place: Placement, clean: Mapping[str, Any]) -> dict[str, np.ndarray]:
        clean = {name: value for name, value in clean.items() if not name.startswith(META_PREFIX)}
        with naming_the_task(self.examples, place.example):
            example = self.objective.apply(clean, seed=self.seed, example=place.example)
        got = example_lengths(example, self.spec)
        planned = ModalityLengths(*({name: size for name, size in side.items() if size}
                                    for side in place.lengths))
        assert got == planned, (
            f"example {place.example}: the objective promised {planned} and gave {got}")
        return example
