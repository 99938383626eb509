"""The teacher-forced loss of a whole split: exact sums over finite, unshuffled, packed batches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from vishwam_t5x.core.batch import Batch, DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import fit, source
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import Objective, PackedBatches
from vishwam_t5x.data.prefetch import Prefetcher
from vishwam_t5x.data.records import TaskRecords
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation.placement import Placement, sum_over_processes
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules

_PER_MODALITY = ("loss", "cross_entropy", "accuracy", "weight_sum")


def without_augmentation(objective: Any) -> Any:
    """Returns the objective for evaluation: as `objective.without_augmentation()` gives it, or as
    it is where it has no such method."""
    plain = getattr(objective, "without_augmentation", None)
    return objective if plain is None else plain()


class FirstExamples:
    """The first examples of a finite stream, for a quicker look at a big split."""

    def __init__(self, examples: Mixture, limit: int | None) -> None:
        """Args:
            examples: a finite mixture.
            limit: at most so many; None: all.
        """
        assert examples.num_examples is not None, "a loss over an endless stream never ends"
        self._examples = examples
        self.tasks = examples.tasks
        self.num_examples: int = examples.num_examples if limit is None else min(
            limit, examples.num_examples)

    def locate(self, example: int) -> tuple[int, int]:
        """As `Mixture.locate`, for the examples there are."""
        if example >= self.num_examples:
            raise IndexError(f"example {example} of the first {self.num_examples}")
        return self._examples.locate(example)

    def clean_lengths(self, example: int) -> dict[str, int]:
        """As `Mixture.clean_lengths`."""
        return self._examples.clean_lengths(example)

    def clean_lengths_many(self, examples: np.ndarray
                           ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """As `Mixture.clean_lengths_many`."""
        return self._examples.clean_lengths_many(examples)

    def read(self, example: int) -> dict[str, Any]:
        """As `Mixture.read`."""
        return self._examples.read(example)

    def release(self, before: int) -> None:
        """As `Mixture.release`."""
        self._examples.release(before)


@dataclasses.dataclass
class SplitSums:
    """Sums over one task's split, in float64 on the host.

    Attributes:
        sums: {modality: {'loss', 'z_loss', 'weight', 'correct'}}.
        num_examples: examples that were read.
        num_damaged: records that could not be.
    """

    sums: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    num_examples: int = 0
    num_damaged: int = 0

    def add(self, other: Mapping[str, Mapping[str, float]]) -> None:
        """Adds the sums of a batch or of another split."""
        for modality, parts in other.items():
            mine = self.sums.setdefault(modality, dict.fromkeys(parts, 0.0))
            for name, value in parts.items():
                mine[name] += float(value)

    @classmethod
    def of_all(cls, splits: Iterable[SplitSums]) -> SplitSums:
        """Returns the sums over several splits."""
        everything = cls()
        for split in splits:
            everything.add(split.sums)
            everything.num_examples += split.num_examples
            everything.num_damaged += split.num_damaged
        return everything

    def per_modality(self) -> dict[str, float]:
        """Returns loss, accuracy, cross_entropy (the loss without z-loss) and weight_sum, each
        '/<modality>', of the modalities that occur; the first three per unit of weight."""
        out = {}
        for modality, parts in self.sums.items():
            if parts["weight"] > 0:
                out[f"loss/{modality}"] = parts["loss"] / parts["weight"]
                out[f"cross_entropy/{modality}"] = (
                    (parts["loss"] - parts["z_loss"]) / parts["weight"])
                out[f"accuracy/{modality}"] = parts["correct"] / parts["weight"]
                out[f"weight_sum/{modality}"] = parts["weight"]
        return out

    def total(self, config: LossConfig) -> float:
        """Returns the loss as training puts it together, over the split as one batch.

        Every normalization but 'modality' and 'sequence' is taken as 'token': a sum over the split
        would grow with it.
        """
        weight_of_all = sum(parts["weight"] for parts in self.sums.values())
        total = 0.0
        for modality, parts in self.sums.items():
            weight = parts["weight"] if config.normalization == "modality" else weight_of_all
            total += (config.modality_weights.get(modality, 1.0) * parts["loss"]
                      / max(weight, 1.0))
        return total

    def metrics(self, config: LossConfig) -> dict[str, float]:
        """Returns `loss`, what `per_modality` gives, `num_examples`, `num_damaged` unless 0."""
        out = {"loss": self.total(config), **self.per_modality(),
               "num_examples": float(self.num_examples)}
        if self.num_damaged:
            out["num_damaged"] = float(self.num_damaged)
        return out


class LossEvaluator:
    """Scores parameters by the loss of every task's split; `training.hooks.Evaluator`.

    Each task is packed by itself, in the order of its records, without augmentation and with the
    objective's random numbers fixed by the dataset's seed: the same parameters always get the same
    numbers, on any mesh. One function is compiled, whatever the number of tasks.
    """

    def __init__(self, model: Any, loss: LossConfig, objective: Objective, config: DatasetConfig,
                 mesh: Mesh, rules: LogicalAxisRules | None = None,
                 max_examples: int | None = None,
                 tasks: Sequence[TaskRecords] | None = None) -> None:
        """Args:
            model: Flax module with `loss_sums(batch, loss)`.
            loss: z-loss, label smoothing, and how sums become one number.
            objective: makes model examples; its augmentation is left out.
            config: which tasks, split, shapes and seed; order and rates do not matter.
            mesh: devices.
            rules: logical axis rules; the standard ones by default.
            max_examples: at most so many examples of each task, the first ones; None: all.
            tasks: the splits to read; None: the caches of `config`, written first if missing.

        Raises:
            UserError: no tasks, a limit below 1, rows that do not divide over the mesh, an example
                that fits in no row, or what `data.source.open_mixture` says.
        """
        if max_examples is not None and max_examples < 1:
            raise UserError("the limit of examples must be at least 1", got=max_examples,
                            fix="leave it out to use all of them")
        objective = without_augmentation(objective)
        if tasks is None:
            tasks = source.open_mixture(config, source.patch_specs(objective), repeat=False).tasks
        spec = source.batch_spec(config, objective, source.features_of(tasks), model.config)
        fit.check_longest(tasks, objective, spec, max_examples)
        fit.check_model(tasks, model.config, getattr(objective, "vocabulary", None))
        self._placement = Placement(mesh, rules, spec.batch_size)
        self._loss, self._objective, self._config, self._spec = loss, objective, config, spec
        self._model_config = model.config
        self._streams = _streams(tasks, max_examples)

        def sums(params: Any, batch: Batch) -> dict[str, dict[str, jax.Array]]:
            found = model.apply({"params": params}, batch, loss, method="loss_sums")
            return {m: {field.name: getattr(part, field.name)
                        for field in dataclasses.fields(part)} for m, part in found.items()}

        self._compiled: Any = jax.jit(sums, out_shardings=self._placement.replicated)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self._streams)

    def with_tasks(self, tasks: Sequence[TaskRecords], max_examples: int | None = None
                   ) -> LossEvaluator:
        """Returns the evaluator of other splits, sharing what is compiled."""
        other = copy.copy(self)
        other._streams = _streams(tasks, max_examples)
        other._spec = source.batch_spec(self._config, self._objective, source.features_of(tasks),
                                        self._model_config)
        return other

    @property
    def num_compiles(self) -> int:
        """How many programs were compiled so far."""
        return self._compiled._cache_size()

    def __call__(self, params: Any) -> dict[str, float]:
        """Returns the metrics of all tasks together and, of several, of each.

        `loss`; `loss/<modality>`, `cross_entropy/<modality>`, `accuracy/<modality>`,
        `weight_sum/<modality>`; `num_examples`, `num_damaged`; with several tasks also
        `loss/<task>/<modality>` and so on. Tasks weigh as much as their splits are long.
        """
        splits = {task: self.split_sums(params, task) for task in self._streams}
        metrics = SplitSums.of_all(splits.values()).metrics(self._loss)
        if len(splits) > 1:
            for task, split in splits.items():
                for name, value in split.per_modality().items():
                    kind, modality = name.split("/")
                    metrics[f"{kind}/{task}/{modality}"] = value
        return metrics

    def metric_names(self) -> tuple[str, ...]:
        """Returns the names that `__call__` can give; a task without a modality lacks its own."""
        modalities = self._spec.target_capacities
        names = ["loss", "num_examples"]
        for kind in _PER_MODALITY:
            names += [f"{kind}/{modality}" for modality in modalities]
            if len(self._streams) > 1:
                names += [f"{kind}/{task}/{modality}" for task in self._streams
                          for modality in modalities]
        return tuple(names)

    def split_sums(self, params: Any, task: str) -> SplitSums:
        """Returns the sums over one task's split; every process must call it together."""
        result, damaged = SplitSums(), 0
        sums: list[dict[str, dict[str, jax.Array]]] = []
        with (self._placement.context(),
              Prefetcher(self._batches(task), self._placement.rows) as batches):
            for batch in batches:
                # Not waited for, so that the device never idles; the one before is, so that a slow
                # device does not gather batches in its queue.
                jax.block_until_ready(sums[-1:])
                sums.append(self._compiled(params, batch.arrays))
                result.num_examples += batch.info.num_examples
                damaged += len(batch.info.skipped)
                for record in batch.info.skipped:
                    logging.warning("left out of the evaluation: %s", record)
            batches.check_damage()
        for part in jax.device_get(sums):
            result.add(part)
        result.num_damaged = sum_over_processes(damaged)
        result.num_examples -= result.num_damaged
        return result

    def target_tokens(self, task: str, modality: str) -> Iterator[np.ndarray]:
        """Yields the target ids that count in the loss, a 1-D array a batch: for a baseline."""
        batches, position = self._batches(task), DataPosition()
        while (host := batches.batch(position)) is not None:
            targets = host.arrays.get(f"targets/{modality}/targets")
            if targets is not None:
                yield targets[host.arrays[f"targets/{modality}/loss_mask"] > 0]
            position = host.plan.end
        batches.close()

    def _batches(self, task: str) -> PackedBatches:
        # New for each pass: it counts damaged records, and whoever reads closes it.
        return PackedBatches(self._streams[task], self._objective, self._spec, self._config.seed,
                             self._config.max_bad_fraction, self._config.read_threads)


def _streams(tasks: Sequence[TaskRecords], max_examples: int | None) -> dict[str, FirstExamples]:
    streams = {}
    for task in tasks:
        stream = FirstExamples(Mixture([task], [1.0], shuffle=False, repeat=False), max_examples)
        if stream.num_examples < task.num_records:
            logging.info("reading the first %d of %d examples of %s", stream.num_examples,
                         task.num_records, task.name)
        streams[task.name] = stream
    if not streams:
        raise UserError("there is no task to evaluate")
    return streams
