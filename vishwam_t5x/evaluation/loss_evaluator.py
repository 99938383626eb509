"""The teacher-forced loss of a whole split: exact sums over finite, unshuffled, packed batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from vishwam_t5x.core.batch import Batch, BatchSpec, DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import HostBatch, Objective, PackedBatches
from vishwam_t5x.data.records import TaskRecords
from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.objectives.losses import LossConfig, LossSums
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules

LossSumsFunction = Callable[[Any, Batch], Mapping[str, LossSums]]
"""(parameters, batch) -> sums by target modality, without dropout."""


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

        A normalization of 'sum' is taken as 'token': a sum over the split would grow with it.
        """
        weight_of_all = sum(parts["weight"] for parts in self.sums.values())
        total = 0.0
        for modality, parts in self.sums.items():
            weight = parts["weight"] if config.normalization == "modality" else weight_of_all
            total += (config.modality_weights.get(modality, 1.0) * parts["loss"]
                      / max(weight, 1.0))
        return total


class LossEvaluator:
    """Scores parameters by the loss of every task's split; `training.hooks.Evaluator`.

    Each task is packed by itself, in the order of its records, with the objective's random numbers
    fixed by `seed`: the same parameters always get the same numbers, on any mesh. One function is
    compiled, whatever the number of tasks.
    """

    def __init__(self, loss_sums: LossSumsFunction, tasks: Sequence[TaskRecords],
                 objective: Objective, spec: BatchSpec, loss: LossConfig, mesh: Mesh,
                 rules: LogicalAxisRules | None = None, seed: int = 0,
                 max_examples: int | None = None, max_bad_fraction: float = 0.01) -> None:
        """Args:
            loss_sums: teacher-forced sums of a batch; traced once.
            tasks: the split of each task of a mixture.
            objective: makes model examples; without augmentation, for numbers to compare.
            spec: shapes of the batches.
            loss: how sums become one number.
            mesh: devices.
            rules: logical axis rules; the standard ones by default.
            seed: of the objective's corruption.
            max_examples: at most so many examples of each task, the first ones; None: all.
            max_bad_fraction: share of damaged records beyond which to stop.

        Raises:
            UserError: no tasks, or a limit below 1, or rows that do not divide over the mesh.
        """
        if not tasks:
            raise UserError("there is no task to evaluate")
        if max_examples is not None and max_examples < 1:
            raise UserError("the limit of examples must be at least 1", got=max_examples,
                            fix="leave it out to use all of them")
        self._placement = Placement(mesh, rules, spec.batch_size)
        self._loss = loss
        self._streams = {}
        for task in tasks:
            stream = FirstExamples(Mixture([task], [1.0], shuffle=False, repeat=False),
                                   max_examples)
            if stream.num_examples < task.num_records:
                logging.info("evaluating the first %d of %d examples of %s", stream.num_examples,
                             task.num_records, task.name)
            self._streams[task.name] = PackedBatches(stream, objective, spec, seed,
                                                     max_bad_fraction)
        self._compiled = jax.jit(
            lambda params, batch: {m: {field.name: getattr(part, field.name)
                                       for field in dataclasses.fields(part)}
                                   for m, part in loss_sums(params, batch).items()},
            out_shardings=self._placement.replicated)

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
        splits = {name: self.split_sums(params, name) for name in self._streams}
        everything = SplitSums()
        for split in splits.values():
            everything.add(split.sums)
            everything.num_examples += split.num_examples
            everything.num_damaged += split.num_damaged
        metrics = {"loss": everything.total(self._loss), **everything.per_modality(),
                   "num_examples": float(everything.num_examples)}
        if everything.num_damaged:
            metrics["num_damaged"] = float(everything.num_damaged)
        if len(splits) > 1:
            for task, split in splits.items():
                for name, value in split.per_modality().items():
                    kind, modality = name.split("/")
                    metrics[f"{kind}/{task}/{modality}"] = value
        return metrics

    def by_task(self, params: Any) -> dict[str, dict[str, float]]:
        """Returns for each task its `loss`, the metrics by modality, and `num_examples`."""
        out = {}
        for name in self._streams:
            split = self.split_sums(params, name)
            out[name] = {"loss": split.total(self._loss), **split.per_modality(),
                         "num_examples": float(split.num_examples)}
        return out

    def split_sums(self, params: Any, task: str) -> SplitSums:
        """Returns the sums over one task's split."""
        result, sums = SplitSums(), []
        with self._placement.context():
            for host in self._batches(task):
                # Not waited for: the next batch is read while this one is computed. The one before
                # is, so that a slow device does not gather batches in its queue.
                jax.block_until_ready(sums[-1:])
                sums.append(self._compiled(params, self._placement.put(host.arrays)))
                result.num_examples += host.plan.num_examples - len(host.bad)
                result.num_damaged += len(host.bad)
                for record in host.bad:
                    logging.warning("left out of the evaluation: %s", record)
        for part in jax.device_get(sums):
            result.add(part)
        return result

    def target_tokens(self, task: str, modality: str) -> Iterator[np.ndarray]:
        """Yields the target ids that count in the loss, a 1-D array a batch: for a baseline."""
        for host in self._batches(task):
            targets = host.arrays.get(f"targets/{modality}/targets")
            if targets is not None:
                yield targets[host.arrays[f"targets/{modality}/loss_mask"] > 0]

    def _batches(self, task: str) -> Iterator[HostBatch]:
        batches, position = self._streams[task], DataPosition()
        # All rows on every process: an evaluation reads little, and its counts need no exchange.
        while (host := batches.batch(position)) is not None:
            yield host
            position = host.plan.end
