"""What a mixture is made of, in figures: rates, lengths before and after corruption, packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vishwam_t5x.data.packing_plan import PackingReport, packing_report
from vishwam_t5x.data.source import Dataset

_BAR = 40


@dataclasses.dataclass(frozen=True)
class TaskFigures:
    """One task of a mixture.

    Attributes:
        name: of the task.
        share: of the mixture's examples.
        num_records: in the split; None if a live stream does not say.
        features: name -> 'dtype[shape]'.
        lengths: name -> (smallest, median, 95th percentile, largest): elements, or patches, of the
            sampled examples before corruption, then of each side and modality after it.
    """

    name: str
    share: float
    num_records: int | None
    features: dict[str, str]
    lengths: dict[str, tuple[int, int, int, int]]


@dataclasses.dataclass(frozen=True)
class MixtureFigures:
    """A mixture as an objective and a batch shape see it.

    Attributes:
        tasks: in order.
        num_sampled: examples looked at for the lengths.
        input_lengths: encoder slots of each sampled example.
        target_lengths: decoder slots of each.
        packing: 'packed', 'two per row', 'one per row' -> how full the rows are.
    """

    tasks: tuple[TaskFigures, ...]
    num_sampled: int
    input_lengths: np.ndarray
    target_lengths: np.ndarray
    packing: dict[str, PackingReport]

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as JSON values; lengths summed up."""
        return {
            "tasks": [dataclasses.asdict(task) for task in self.tasks],
            "num_sampled": self.num_sampled,
            "input_lengths": _summary(self.input_lengths),
            "target_lengths": _summary(self.target_lengths),
            "packing": {name: dataclasses.asdict(one) for name, one in self.packing.items()}}


def measure(dataset: Dataset, num_sampled: int = 2048, num_rows: int = 1024) -> MixtureFigures:
    """Looks at the beginning of a dataset's stream; reads lengths only, unless it is live.

    Args:
        dataset: an open dataset.
        num_sampled: examples to take lengths of.
        num_rows: rows to fill for the packing figures (at least two batches).

    Raises:
        UserError: an example fits in no row.
    """
    examples, objective, seed = dataset.examples, dataset.objective, dataset.config.seed
    if examples.num_examples is not None:
        num_sampled = min(num_sampled, examples.num_examples)
    before: list[dict[str, list[int]]] = [{} for _ in examples.tasks]
    after: list[dict[str, list[int]]] = [{} for _ in examples.tasks]
    counts = np.zeros((len(examples.tasks),), np.int64)
    inputs, targets = [], []
    for example in range(num_sampled):
        task, _ = examples.locate(example)
        counts[task] += 1
        clean = examples.clean_lengths(example)
        lengths = objective.lengths(clean, seed=seed, example=example)
        for name, size in clean.items():
            before[task].setdefault(name, []).append(size)
        for side, sizes in zip(("inputs", "targets"), lengths, strict=True):
            for modality, size in sizes.items():
                after[task].setdefault(f"{side}/{modality}", []).append(size)
        inputs.append(sum(lengths.inputs.values()))
        targets.append(sum(lengths.targets.values()))
    num_batches = max(2, num_rows // dataset.spec.batch_size)
    packing = {name: packing_report(examples, objective, dataset.spec, seed, num_batches, limit)
               for name, limit in (("packed", None), ("two per row", 2), ("one per row", 1))}
    tasks = tuple(
        TaskFigures(task.name, float(counts[index] / num_sampled),
                    task.num_records if task.num_records < 2**40 else None,
                    {name: f"{info.dtype}{_shape(info.shape)}"
                     for name, info in task.features.items()},
                    {name: _summary(np.asarray(sizes))
                     for name, sizes in (before[index] | after[index]).items()})
        for index, task in enumerate(examples.tasks))
    return MixtureFigures(tasks, num_sampled, np.asarray(inputs), np.asarray(targets), packing)


def lines(dataset: Dataset, figures: MixtureFigures) -> list[str]:
    """Returns the figures as lines of text."""
    config, spec = dataset.config, dataset.spec
    out = [f"{config.mixture_or_task_name}, split {config.split}, from "
           + (config.directory if config.use_cached else "a live stream"), ""]
    width = max(len(task.name) for task in figures.tasks)
    out.append(f"{'task':{width}}  share   records")
    for task in figures.tasks:
        count = "?" if task.num_records is None else task.num_records
        out.append(f"{task.name:{width}}  {task.share:5.1%}  {count:>8}")
    out += ["", "lengths (smallest, median, 95th percentile, largest) of the first "
                f"{figures.num_sampled} examples; inputs/ and targets/ after corruption"]
    for task in figures.tasks:
        out.append(task.name)
        for name, summary in task.lengths.items():
            out.append(f"  {name:24} {' '.join(f'{value:>6}' for value in summary)}"
                       f"   {task.features.get(name, '')}")
    for title, values, limit in (("encoder", figures.input_lengths, spec.input_length),
                                 ("decoder", figures.target_lengths, spec.target_length)):
        out += ["", f"{title} slots per example (a row has {limit})", *_histogram(values)]
    out += ["", f"packing: rows of {spec.input_length} and {spec.target_length} slots, batches of "
                f"{spec.batch_size}", "             volume bound  encoder  decoder  examples a row"]
    for name, one in figures.packing.items():
        per_row = one.num_examples / max(1, one.rows_used)
        out.append(f"{name:12} {one.efficiency:12.1%} {one.input_fill:8.1%} {one.target_fill:8.1%}"
                   f" {per_row:15.2f}")
    return out


def _histogram(values: Sequence[int] | np.ndarray, num_bins: int = 10) -> list[str]:
    low, high = int(np.min(values)), int(np.max(values))
    edges = np.unique(np.linspace(low, high + 1, num_bins + 1).astype(int))
    counts, _ = np.histogram(values, edges)
    return [f"  {first:>5} to {last - 1:<5} {count:>6} {'#' * round(_BAR * count / counts.max())}"
            for first, last, count in zip(edges, edges[1:], counts, strict=False)]


def _summary(values: np.ndarray) -> tuple[int, int, int, int]:
    return (int(values.min()), int(np.median(values)), int(np.percentile(values, 95)),
            int(values.max()))


def _shape(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("n" if size is None else str(size) for size in shape) + "]"
