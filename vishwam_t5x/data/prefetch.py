"""Batches made ahead in the background and put on the devices of this host.

Each host builds only the rows its own devices hold; which those are is read from the shardings, so
any mesh and any number of hosts see the same global batches in the same order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from vishwam_t5x.core.batch import BatchSpec, DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.packing import HostBatch
from vishwam_t5x.data.records import DamagedRecord


class BatchBuilder(Protocol):
    """Builds some rows of the batch at a position; `packing.PackedBatches` is one."""

    spec: BatchSpec

    def batch(self, position: DataPosition, rows: Sequence[int]) -> HostBatch | None: ...

    def check_damage(self) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What a batch holds, counted on the host, over the whole global batch unless said otherwise.

    Attributes:
        num_examples: examples in the batch.
        example_ids: their numbers, ascending.
        input_tokens: filled encoder slots, all modalities.
        target_tokens: filled decoder slots.
        packing: share of the volume of the rows used that is filled, the larger of encoder and
            decoder.
        wait_seconds: how long the consumer waited for this batch.
        skipped: damaged records among the rows of this host.
    """

    num_examples: int
    example_ids: tuple[int, ...]
    input_tokens: int
    target_tokens: int
    packing: float
    wait_seconds: float = 0.0
    skipped: tuple[DamagedRecord, ...] = ()

    @property
    def bad_records(self) -> int:
        """How many records of this host were damaged."""
        return len(self.skipped)


@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """A global batch on the devices.

    Attributes:
        arrays: as `BatchSpec.arrays`, sharded.
        start: where in the data the batch begins.
        end: where the next one begins: what a checkpoint must remember.
        info: what it holds.
    """

    arrays: dict[str, jax.Array]
    start: DataPosition
    end: DataPosition
    info: BatchInfo

    @property
    def example_ids(self) -> tuple[int, ...]:
        return self.info.example_ids

    @property
    def work(self) -> BatchInfo:
        return self.info


class Prefetcher:
    """Iterates over batches; a thread stays up to `depth` batches ahead.

    The order is that of the positions, whatever the timing. An error in the thread is raised, as it
    is, by the `next` that would have returned the batch it hit. Use as a context manager, or call
    `close`.
    """

    def __init__(self, batches: BatchBuilder,
                 shardings: jax.sharding.NamedSharding | Mapping[str, jax.sharding.NamedSharding],
                 start: DataPosition | None = None, depth: int = 2) -> None:
        """Args:
            batches: builds rows; closed together with this object.
            shardings: of every array of the batch, or one for all; only the first dimension (rows)
                may be split.
            start: where to begin; None: at the beginning.
            depth: batches kept ready, at least 1.

        Raises:
            UserError: `depth` is less than 1.
        """
        if depth < 1:
            raise UserError("the prefetch depth must be at least 1 batch", got=depth)
        self._batches, self._depth = batches, depth
        specs = batches.spec.arrays()
        self._shardings = (dict(shardings) if isinstance(shardings, Mapping)
                           else dict.fromkeys(specs, shardings))
        assert self._shardings.keys() == specs.keys(), (
            set(self._shardings) ^ set(specs), "shardings and arrays differ")
        self._rows = local_rows(next(iter(self._shardings.values())), batches.spec.batch_size)
        for key, sharding in self._shardings.items():
            assert local_rows(sharding, batches.spec.batch_size) == self._rows, key
            assert all(axes is None for axes in sharding.spec[1:]), (key, sharding.spec)
        self._change = threading.Condition()
        self._ready: collections.deque[DeviceBatch] = collections.deque()
        self._error: BaseException | None = None
        self._ended = self._stop = False
        self._thread: threading.Thread | None = None
        self._start(start or DataPosition())

    def __iter__(self) -> Prefetcher:
        return self

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __next__(self) -> DeviceBatch:
        """Returns the next batch.

        Raises:
            StopIteration: the data is finite and at its end.
            Exception: whatever making this batch raised.
        """
        begin = time.perf_counter()
        with self._change:
            self._change.wait_for(
                lambda: self._ready or self._error or self._ended or self._stop)
            assert not self._stop, "closed"
            if not self._ready:
                if self._error is not None:
                    raise self._error
                raise StopIteration
            batch = self._ready.popleft()
            self._change.notify_all()
        waited = time.perf_counter() - begin
        return dataclasses.replace(
            batch, info=dataclasses.replace(batch.info, wait_seconds=waited))

    def seek(self, position: DataPosition) -> None:
        """Goes on from `position`; batches made ahead are thrown away."""
        self._join()
        self._start(position)

    def check_damage(self) -> None:
        """Stops all processes together if too many records are damaged; all must call it together.

        Raises:
            UserError: the same on every process.
        """
        self._batches.check_damage()

    def close(self) -> None:
        """Ends the thread and the builder; may be called twice."""
        self._join()
        self._batches.close()

    def _start(self, position: DataPosition) -> None:
        self._ready.clear()
        self._error, self._ended, self._stop = None, False, False
        self._thread = threading.Thread(target=self._run, args=(position,), daemon=True,
                                        name="vishwam-prefetch")
        self._thread.start()

    def _join(self) -> None:
        if self._thread is None:
            return
        with self._change:
            self._stop = True
            self._change.notify_all()
        self._thread.join()
        self._thread = None

    def _run(self, position: DataPosition) -> None:
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._stop or len(self._ready) < self._depth)
                    if self._stop:
                        return
                batch = self._make(position)
                with self._change:
                    if batch is None:
                        self._ended = True
                    else:
                        self._ready.append(batch)
                    self._change.notify_all()
                if batch is None:
                    return
                position = batch.end
        except BaseException as error:  # noqa: BLE001 - raised again, in the consumer
            with self._change:
                self._error = error
                self._change.notify_all()

    def _make(self, position: DataPosition) -> DeviceBatch | None:
        host = self._batches.batch(position, self._rows)
        if host is None:
            return None
        plan = host.plan
        info = BatchInfo(plan.num_examples, plan.example_ids, plan.input_slots, plan.target_slots,
                         plan.efficiency, skipped=host.bad)
        return DeviceBatch(self._put(host.arrays), plan.start, plan.end, info)

    def _put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        num_rows = self._batches.spec.batch_size
        if len(self._rows) == num_rows and all(
                sharding.is_fully_addressable for sharding in self._shardings.values()):
            return jax.device_put(dict(arrays), self._shardings)
        place = {row: index for index, row in enumerate(self._rows)}

        def of_device(array: np.ndarray, index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, last, _ = index[0].indices(num_rows)
            # Rows of one device are neighbours, and `_rows` is sorted.
            return array[place[first]:place[first] + last - first]

        return {key: jax.make_array_from_callback(
            (num_rows, *array.shape[1:]), self._shardings[key],
            functools.partial(of_device, array)) for key, array in arrays.items()}


def local_rows(sharding: jax.sharding.NamedSharding, num_rows: int) -> list[int]:
    """Returns the rows of a batch that the devices of this process hold, ascending."""
    rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map((num_rows,)).values():
        assert index is not None
        rows.update(range(*index[0].indices(num_rows)))
    return sorted(rows)
