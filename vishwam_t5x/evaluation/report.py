"""A page of samples, metrics and loss curves from what an evaluation found."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.evaluation import page
from vishwam_t5x.evaluation.evaluator import Sample, TaskResult

_MOST_FIGURES = 12
_LOSS_METRICS = ("loss", "cross_entropy", "accuracy", "weight_sum", "num_examples", "num_damaged",
                 "num_left_out")


@dataclasses.dataclass(frozen=True)
class PageConfig:
    """What is shown of an evaluation.

    Attributes:
        file: name of the PNG file in MODEL_DIR.
        title: heading; None: the mixture's name.
        tasks: names of the tasks whose samples are shown, in this order; (): all.
        num_samples: samples of pictures and sounds per task; of texts a quarter of them.
    """

    file: str = "what_it_learned.png"
    title: str | None = None
    tasks: Sequence[str] = ()
    num_samples: int = 20

    def __post_init__(self) -> None:
        if not self.file.endswith(".png") or pathlib.Path(self.file).name != self.file:
            raise UserError("the page is a PNG file in MODEL_DIR", got=self.file,
                            fix="e.g. file = 'what_it_learned.png'")
        if self.num_samples < 1:
            raise UserError("PageConfig.num_samples must be at least 1", got=self.num_samples)


def check_tasks(config: PageConfig, evaluated: Sequence[str]) -> None:
    """Raises `UserError` if the page is to show a task that is not evaluated."""
    for name in config.tasks:
        if name not in evaluated:
            raise UserError("the page is to show a task that is not evaluated", got=name,
                            fix=did_you_mean(name, evaluated)
                            or "evaluated: " + ", ".join(evaluated))


def sections(results: Sequence[TaskResult], config: PageConfig,
             training_metrics: storage.PathLike | None) -> list[page.Section]:
    """Returns the page's parts: metrics, samples of each task, loss curves.

    What is shown of a task follows from its samples: pictures it drew, pictures or sounds it was
    given, or the texts it read and wrote.

    Args:
        results: of every task, with samples.
        config: which tasks, how many samples.
        training_metrics: metrics.jsonl of the training run, if there is one.

    Raises:
        UserError: as `check_tasks`.
    """
    by_name = {result.task: result for result in results}
    check_tasks(config, list(by_name))
    parts: list[page.Section] = []
    figures = _figures(results)
    if figures:
        parts.append(page.Figures("Metrics on held-out examples", figures))
    for name in config.tasks or by_name:
        section = _samples(by_name[name], config.num_samples)
        if section is not None:
            parts.append(section)
    if training_metrics is not None and training_metrics.exists():
        lines = page.read_curves(training_metrics)
        if lines:
            parts.append(page.Curves("Training", lines, _levels(results)))
    return parts


def _figures(results: Sequence[TaskResult]) -> dict[str, float]:
    """The tasks' own metrics, then losses beside the unigram models they are held against."""
    own, compared = {}, {}
    for result in results:
        task = _short(result.task, results)
        for name, value in result.metrics.items():
            kind, _, modality = name.partition("/")
            if kind == "unigram":
                of = f" {modality}" if _ambiguous(result) else ""
                compared[f"{task}:{of} loss"] = float(result.metrics[f"cross_entropy/{modality}"])
                compared[f"{task}:{of} unigram"] = float(value)
            elif kind not in _LOSS_METRICS and not isinstance(value, str):
                own[f"{task} {name.replace('_', ' ')}"] = float(value)
    return dict([*own.items(), *compared.items()][:_MOST_FIGURES])


def _ambiguous(result: TaskResult) -> bool:
    """Whether a task writes more than one modality."""
    return sum(name.startswith("unigram/") for name in result.metrics) > 1


def _short(task: str, results: Sequence[TaskResult]) -> str:
    """The name without the beginning that all tasks share."""
    names = [result.task for result in results]
    if len(names) < 2:
        return task
    shared = 0
    while all(len(name) > shared and name[shared] == names[0][shared] for name in names):
        shared += 1
    return task[names[0].rfind("_", 0, shared) + 1:].replace("_", " ")


def _levels(results: Sequence[TaskResult]) -> dict[str, float]:
    levels = {}
    for result in results:
        for name, value in result.metrics.items():
            if name.startswith("unigram/"):
                of = f" ({name.partition('/')[2]})" if _ambiguous(result) else ""
                levels[f"unigram model, {_short(result.task, results)}{of}"] = value
    return levels


def _samples(result: TaskResult, num_samples: int) -> page.Section | None:
    samples = result.samples[:num_samples]
    if not samples:
        return None
    title = result.task.replace("_", " ")
    if all(_is_picture(sample.output) for sample in samples):
        sounds = all("audio" in sample.prediction.written for sample in samples)
        kind, did = ("spectrogram", "sounded") if sounds else ("image", "drew")
        return page.Captioned(
            f"{title}: what it {did}", [_pixels(sample.output, kind) for sample in samples],
            [str(sample.target) if np.ndim(sample.target) == 0 else "" for sample in samples],
            kind=kind, asked=[_words(sample.prediction.inputs) for sample in samples])
    for feature, kind in (("image_inputs", "image"), ("audio_inputs", "spectrogram")):
        if all(feature in sample.clean for sample in samples):
            return page.Captioned(
                title, [_pixels(sample.clean[feature], kind) for sample in samples],
                [str(sample.output) for sample in samples],
                [str(sample.target) for sample in samples], kind)
    texts = [sample for sample in samples if isinstance(sample.prediction.prediction, str)]
    if not texts:
        return None
    return page.Texts(title, [_rows(sample) for sample in texts[:max(1, num_samples // 4)]])


def _rows(sample: Sample) -> list[tuple[str, str]]:
    return [("reads", sample.prediction.inputs), ("writes", str(sample.prediction.prediction)),
            ("target", str(sample.prediction.target))]


def _words(inputs: str) -> str:
    """The request without its prefix tokens, '[Image] [S] draw a seven'."""
    return inputs.rpartition("] ")[2]


def _is_picture(value: Any) -> bool:
    return (isinstance(value, np.ndarray) and value.ndim in (2, 3)
            and (value.dtype == np.uint8 or np.issubdtype(value.dtype, np.floating)))


def _pixels(array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "image" and array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    return array


def write(path: storage.PathLike, title: str, results: Sequence[TaskResult], config: PageConfig,
          training_metrics: storage.PathLike | None, subtitle: str) -> storage.PathLike | None:
    """Writes the page and returns its path; None if there is nothing to show.

    Args:
        path: the PNG file.
        title: heading, where `config` has none.
        results: of every task, with samples.
        config: what to show.
        training_metrics: metrics.jsonl of the training run.
        subtitle: one line under the heading.

    Raises:
        UserError: as `sections`, or matplotlib is not installed.
    """
    parts = sections(results, config, training_metrics)
    if not parts:
        return None
    return page.write_page(path, config.title or title, parts, subtitle)

