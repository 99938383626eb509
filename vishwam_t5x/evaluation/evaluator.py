"""Predictions and metrics of a task's split: what the model writes, judged by the task itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.records import META_PREFIX, DamagedRecord, TaskRecords
from vishwam_t5x.evaluation.generator import Generator, Request
from vishwam_t5x.evaluation.loss_evaluator import without_augmentation
from vishwam_t5x.evaluation.predictions import Prediction
from vishwam_t5x.evaluation.task_metrics import ModelOutputs, TaskMetrics
from vishwam_t5x.objectives.features import feature_roles
from vishwam_t5x.objectives.vocabulary import CODE_OFFSET, EOS_ID

PRETOKENIZED = META_PREFIX + "targets_pretokenized"
"""Feature that, where a task has it, is the reference instead of the detokenised target."""

DecodeText = Callable[[np.ndarray], str]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example and everything known of it, for looking at.

    Attributes:
        clean: the clean example.
        prediction: what was written, as it is recorded.
        target: the postprocessed reference.
        output: the postprocessed prediction.
    """

    clean: Mapping[str, Any]
    prediction: Prediction
    target: Any
    output: Any


@dataclasses.dataclass
class TaskResult:
    """What became of a task's split.

    Attributes:
        task: its name.
        metrics: by name, with `num_examples` and, if there were any, `num_damaged`.
        predictions: in the order of the records.
        samples: the first few, complete.
    """

    task: str
    metrics: dict[str, Any]
    predictions: list[Prediction] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Answer:
    """What was written for one record, by modality."""

    inputs: str
    input_slots: dict[str, int]
    targets: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    target_score: float = float("nan")


class Evaluator:
    """Lets a model answer the examples of a task and lets the task judge the answers.

    The encoder gets what it gets in training: prefix token, text, patches; no augmentation. An
    example with several target modalities is written once for each, and the task's postprocessor
    gets {modality: output}.
    """

    def __init__(self, generator: Generator, objective: Any, decode_text: DecodeText,
                 seed: int = 0, progress: Progress | None = None) -> None:
        """Args:
            generator: writes.
            objective: turns clean examples into model examples.
            decode_text: ids -> text.
            seed: of the objective, for self-supervised examples.
            progress: called with (task, examples written so far, examples to write).
        """
        self._generator, self._seed, self._progress = generator, seed, progress
        self._objective = without_augmentation(objective)
        self._decode_text = decode_text

    def evaluate(self, params: Any, task: TaskRecords, metrics: TaskMetrics,
                 max_examples: int | None = None, num_samples: int = 0,
                 write_all: bool = False) -> TaskResult:
        """Writes and judges the first `max_examples` (None: all) of a split.

        Args:
            params: of the model, on the devices.
            task: the split.
            metrics: what the task wants to know, perhaps nothing.
            max_examples: at most so many examples.
            num_samples: how many of the first examples are returned complete.
            write_all: write something for every example even if no metric looks at it.

        Raises:
            UserError: a metric or the postprocessor failed, or every record is damaged.
        """
        limit = task.num_records if max_examples is None else min(max_examples, task.num_records)
        written = limit if metrics.needs_predictions or write_all else min(limit, num_samples)
        answers: dict[int, _Answer] = {}
        damaged: dict[int, DamagedRecord] = {}
        self._write(params, task, range(written), answers, damaged)
        if metrics.needs_scores:
            self._score(params, task, range(limit), answers, damaged)
        for error in damaged.values():
            logging.warning("left out of the evaluation: %s", error)
        if damaged and not answers:
            raise UserError(f"no record of task '{task.name}' can be read",
                            got=str(next(iter(damaged.values()))),
                            fix=f"vishwam cache --task_or_mixture={task.name} --overwrite")
        return self._judge(task, metrics, answers, num_samples, len(damaged))

    # -- writing -------------------------------------------------------------------------------

    def _write(self, params: Any, task: TaskRecords, records: Sequence[int],
               answers: dict[int, _Answer], damaged: dict[int, DamagedRecord]) -> None:
        by_modality: dict[str, list[int]] = {}
        for record in records:
            for modality in self._lengths(task, record).targets:
                by_modality.setdefault(modality, []).append(record)
        total, written = sum(map(len, by_modality.values())), 0
        for modality, wanted in by_modality.items():
            requests = self._requests(task, wanted, answers, damaged)
            for done in self._generator.generate(params, requests, modality):
                answer = answers[done.tag]
                answer.tokens.update(done.tokens)
                answer.scores.update(done.scores)
                written += 1
                if self._progress is not None:
                    self._progress(task.name, written, total)

    def _score(self, params: Any, task: TaskRecords, records: Sequence[int],
               answers: dict[int, _Answer], damaged: dict[int, DamagedRecord]) -> None:
        requests = self._requests(task, records, answers, damaged)
        for record, scores in self._generator.score(params, requests):
            answers[record].target_score = sum(scores.values())

    def _lengths(self, task: TaskRecords, record: int) -> Any:
        return self._objective.lengths(task.clean_lengths(record), seed=self._seed, example=record)

    def _requests(self, task: TaskRecords, records: Sequence[int], answers: dict[int, _Answer],
                  damaged: dict[int, DamagedRecord]) -> Iterator[Request]:
        """Reads records, notes what the encoder will see of each, and hands them on."""
        for record in records:
            if record in damaged:
                continue
            try:
                clean = task.read(record)
            except DamagedRecord as error:
                damaged[record] = error
                continue
            example = self._objective.apply(_for_model(clean), seed=self._seed, example=record)
            request = Request.from_example(example, record)
            tokens = request.inputs.get("inputs/text/tokens", np.zeros((0,), np.int32))
            answers.setdefault(record, _Answer(
                self._decode_text(tokens), request.slots(),
                {m: request.targets[f"targets/{m}/targets"] for m in request.target_slots()}))
            yield request

    # -- judging -------------------------------------------------------------------------------

    def _judge(self, task: TaskRecords, metrics: TaskMetrics, answers: Mapping[int, _Answer],
               num_samples: int, num_damaged: int) -> TaskResult:
        result = TaskResult(task.name, {})
        ordered = [answers[record] for record in sorted(answers)]
        targets, outputs, examples = [], [], []
        for record, answer in zip(sorted(answers), ordered, strict=True):
            # Read again: holding every image of a split until the end would take its size.
            clean = task.read(record)
            reference = self._reference(answer, clean)
            targets.append(metrics.postprocess(reference, clean, is_target=True))
            if answer.tokens:
                prediction = self._decoded(answer.tokens)
                outputs.append(metrics.postprocess(prediction, clean, is_target=False))
                result.predictions.append(Prediction(
                    task.name, record, answer.inputs, answer.input_slots, reference, prediction,
                    sum(answer.scores.values())))
                if len(result.samples) < num_samples:
                    result.samples.append(Sample(clean, result.predictions[-1], targets[-1],
                                                 outputs[-1]))
            if metrics.metric_objs:
                examples.append(clean)
        if metrics.has_metrics:
            found = ModelOutputs()
            if metrics.needs_predictions:
                found = ModelOutputs([_only(_ids(answer.tokens)) for answer in ordered],
                                     [sum(answer.scores.values()) for answer in ordered])
            if metrics.needs_scores:
                found = dataclasses.replace(
                    found, target_scores=[answer.target_score for answer in ordered])
            result.metrics.update(metrics.compute(
                targets, outputs if metrics.needs_predictions else None, found, examples,
                self._target_feature(task)))
            result.metrics["num_examples"] = len(ordered)
        if num_damaged:
            result.metrics["num_damaged"] = num_damaged
        return result

    def _reference(self, answer: _Answer, clean: Mapping[str, Any]) -> Any:
        if PRETOKENIZED in clean:
            value = clean[PRETOKENIZED]
            return value.decode("utf-8") if isinstance(value, bytes) else value
        return self._decoded(answer.targets)

    def _decoded(self, tokens: Mapping[str, np.ndarray]) -> Any:
        """Text, or the codes of a grid; of several modalities a mapping."""
        return _only({modality: self._decode_text(tokens[modality]) if modality == "text" else ids
                      for modality, ids in _ids(tokens).items()})

    def _target_feature(self, task: TaskRecords) -> str:
        roles = feature_roles(task.features, self._objective.input_modalities,
                              self._objective.target_modalities,
                              getattr(self._objective, "ignored_features", ()))
        return next(iter(roles.targets.values()))


def _for_model(clean: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: value for name, value in clean.items() if not name.startswith(META_PREFIX)}


def _ids(tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ids as vocabularies and codebooks number them: text without its end, codes from 0."""
    return {modality: (values[values != EOS_ID] if modality == "text" else values - CODE_OFFSET)
            for modality, values in tokens.items()}


def _only(by_modality: Mapping[str, Any]) -> Any:
    """The value of the one modality, or the mapping of several."""
    return next(iter(by_modality.values())) if len(by_modality) == 1 else dict(by_modality)

