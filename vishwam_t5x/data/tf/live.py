"""A live tf.data stream in the place of a cache: `USE_CACHED_TASKS = False`.

Each Task's dataset is read in its own order, shuffled and repeated by SeqIO; the tasks take turns
as in a cached mixture, and packing and corruption are the same. Resume is approximate: it skips as
many examples as were read, which finds the same place only if tf.data yields the same order again,
and takes the time to read them. Every host reads the whole stream, since all need its lengths.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import records
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import MIN_RECORDS_FOR_FRACTION, Objective
from vishwam_t5x.data.source import Dataset, DatasetConfig, assemble, patch_specs
from vishwam_t5x.data.tf import examples
from vishwam_t5x.objectives.masking import PatchSpec

_ENDLESS = 2**40

_logger = logging.getLogger(__name__)


class LiveTask:
    """The examples of a Task by number, as they come out of tf.data.

    Only numbers not much below the newest are to be had at once; an older one reads the dataset
    again from its beginning.
    """

    def __init__(self, task: seqio.Task, config: DatasetConfig, specs: Mapping[str, PatchSpec]
                 ) -> None:
        self.name = task.name
        self._task, self._config, self._specs = task, config, dict(specs)
        self._kept = examples.CleanFeatures.of_task(task, self._dataset())
        self._iterator: Iterator[Mapping[str, Any]] | None = None
        self._next = 0
        self._waiting: dict[int, dict[str, Any]] = {}
        self._num_read = self._num_bad = 0
        self._lock = threading.Lock()

    @property
    def num_records(self) -> int:
        """A number that no run reaches: the stream repeats."""
        return _ENDLESS

    @property
    def features(self) -> dict[str, records.FeatureInfo]:
        return self._kept.features

    def clean_lengths(self, record: int) -> dict[str, int]:
        """Returns the length of each feature: elements if 1-D, frames, or patches."""
        lengths = {}
        for name, value in self.read(record).items():
            if name.startswith(records.META_PREFIX):
                continue
            if value.ndim == 1 or records.is_history(name):
                lengths[name] = len(value)
                continue
            spec = self._specs.get(records.modality_of(name))
            if spec is None:
                raise UserError(f"task '{self.name}' has a feature '{name}' of pixels, but it is "
                                "not known how to cut it into patches",
                                fix=f"give a PatchSpec for '{records.modality_of(name)}'")
            lengths[name] = spec.num_patches(value.shape)
        return lengths

    def read(self, record: int) -> dict[str, Any]:
        """Returns an example, reading the stream up to it; it stays until `release`."""
        with self._lock:
            if record not in self._waiting:
                self._advance(record)
            return dict(self._waiting[record])

    def release(self, before: int) -> None:
        """Forgets the examples below a number."""
        with self._lock:
            for record in [record for record in self._waiting if record < before]:
                del self._waiting[record]

    def _dataset(self) -> tf.data.Dataset:
        config = self._config
        dataset = examples.read_task(self._task, config.split, config.seed, num_epochs=None,
                                     sequence_length=config.sequence_length)
        if config.shuffle and self._task.shuffle_buffer_size:
            dataset = dataset.shuffle(self._task.shuffle_buffer_size, seed=config.seed)
        return dataset

    def _advance(self, record: int) -> None:
        if self._iterator is None or record < self._next:
            self._iterator, self._next = self._dataset().as_numpy_iterator(), record
            if record:
                _logger.warning("%s: skipping %d examples of a live stream (approximate resume)",
                                self.name, record)
            for _ in range(record):  # not `dataset.skip`: unusable examples have no number
                self._pull()
        while self._next <= record:
            self._waiting[self._next] = self._pull()
            self._next += 1

    def _pull(self) -> dict[str, Any]:
        """Returns the next example that can be used."""
        assert self._iterator is not None
        while True:
            try:
                element = next(self._iterator)
            except StopIteration:
                raise UserError(f"task '{self.name}' has no examples in split "
                                f"'{self._config.split}'",
                                fix="see its source and its preprocessors' filters") from None
            except tf.errors.OpError as error:
                raise UserError(f"task '{self.name}' cannot be preprocessed", got=error.message,
                                fix="mend the task's preprocessors or source") from error
            self._num_read += 1
            example, why = self._kept.convert(element)
            if why is None:
                return example
            self._num_bad += 1
            _logger.warning("%s: an example of the live stream is left out: %s", self.name, why)
            allowed = self._config.max_bad_fraction * max(self._num_read, MIN_RECORDS_FOR_FRACTION)
            if self._num_bad > allowed:
                raise UserError(f"too many unusable examples in task '{self.name}'",
                                got=f"{self._num_bad} of {self._num_read}; the last: {why}",
                                fix="mend the task's preprocessors, or filter them out there")


class LiveMixture:
    """Live tasks mixed by rate."""

    def __init__(self, tasks: Sequence[LiveTask], rates: Sequence[float]) -> None:
        self.tasks = tuple(tasks)
        # Within an endless task the records are numbered as they come, so no shuffle here.
        self._order = Mixture(tasks, rates, shuffle=False)

    @property
    def num_examples(self) -> None:
        """Endless."""

    def locate(self, example: int) -> tuple[int, int]:
        """As `Mixture.locate`."""
        return self._order.locate(example)

    def clean_lengths(self, example: int) -> dict[str, int]:
        """As `Mixture.clean_lengths`, but reads the example."""
        return self._order.clean_lengths(example)

    def read(self, example: int) -> dict[str, Any]:
        """As `Mixture.read`."""
        return self._order.read(example)

    def release(self, before: int) -> None:
        """Forgets the examples below a number."""
        for task, count in zip(self.tasks, self._order.count_before(before), strict=True):
            task.release(count)


def open_live_dataset(config: DatasetConfig, objective: Objective, model: Any = None) -> Dataset:
    """Opens a dataset without a cache.

    Args:
        config: which examples, shapes and order; `use_cached` is False.
        objective: corrupts examples on read.
        model: config of the model, as for `source.batch_spec`.

    Raises:
        UserError: an unknown task, module or split, or features that cannot be used.
    """
    tf.config.set_visible_devices([], "GPU")
    examples.import_task_modules(config.modules)
    rates = examples.task_rates(config.mixture_or_task_name, config.directory)
    _logger.warning(
        "USE_CACHED_TASKS = False: %s is read from a live tf.data stream; its order after a resume "
        "is APPROXIMATE. For exact resume and faster reading use cached tasks.",
        config.mixture_or_task_name)
    specs = patch_specs(objective)
    tasks = [LiveTask(seqio.TaskRegistry.get(name), config, specs) for name in rates]
    return assemble(config, objective, LiveMixture(tasks, list(rates.values())), model)
