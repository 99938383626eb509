"""Predictions and metrics of a task's split: what the model writes, judged by the task itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from vishwam_t5x.core.batch import SignalSpec
from vishwam_t5x.core.distributed import refuse_together
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.records import META_PREFIX, DamagedRecord, TaskRecords
from vishwam_t5x.evaluation import options, together
from vishwam_t5x.evaluation.answers import Answer, DecodeText, ids, only, score, write
from vishwam_t5x.evaluation.generator import Generator
from vishwam_t5x.evaluation.loss_evaluator import without_augmentation
from vishwam_t5x.evaluation.predictions import Prediction
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.evaluation.task_metrics import (
    PREDICT,
    PREDICT_WITH_AUX,
    SCORE,
    ModelOutputs,
    TaskMetrics,
)
from vishwam_t5x.evaluation.together import LeftOut
from vishwam_t5x.objectives.features import FeatureRoles, feature_roles
from vishwam_t5x.objectives.model_example import as_signal

PRETOKENIZED = META_PREFIX + "targets_pretokenized"
"""Feature that, where a task has it, is the reference instead of the detokenised target."""

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
        metrics: by name, with `num_examples` and, if there were any, `num_damaged` (records that
            cannot be read) and `num_left_out` (those that are too long, or for which a constraint
            left nothing to write).
        predictions: in the order of the records.
        samples: the first few, complete.
    """

    task: str
    metrics: dict[str, Any]
    predictions: list[Prediction] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Judged:
    """What the metrics get of the examples: postprocessed, and clean for those that read that."""

    targets: list[Any] = dataclasses.field(default_factory=list)
    outputs: list[Any] = dataclasses.field(default_factory=list)
    examples: list[Any] = dataclasses.field(default_factory=list)


class Evaluator:
    """Lets a model answer the examples of a task and lets the task judge the answers.

    The encoder gets what it gets in training: prefix token, text, patches; no augmentation. An
    example with several target modalities is written once for each, and the task's postprocessor
    gets {modality: output}. Where the target is pixels or a spectrogram, it gets that as the codec
    of the model reads it, uint8 [height, width, channels] or float32 [frames, mel bins], and of
    what was written the same; recorded are the codes.
    """

    def __init__(self, generator: Generator, objective: Any, decode_text: DecodeText,
                 seed: int = 0, progress: Progress | None = None,
                 read_options: options.OptionReader | None = None) -> None:
        """Args:
            generator: writes.
            objective: turns clean examples into model examples.
            decode_text: ids -> text.
            seed: of the objective, for self-supervised examples.
            progress: called with (task, examples written so far, examples to write).
            read_options: for examples with `options.FEATURE`, which are then answered by the best
                of their options; None: freely, as others.
        """
        self._read_options = read_options
        self._generator, self._seed, self._progress = generator, seed, progress
        self._objective = without_augmentation(objective)
        self._signals: Mapping[str, SignalSpec] = getattr(objective, "signals", {})
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
            UserError: a metric or the postprocessor failed, or no record can be used.
        """
        limit = task.num_records if max_examples is None else min(max_examples, task.num_records)
        written = limit if metrics.needs_predictions or write_all else min(limit, num_samples)
        answers: dict[int, Answer] = {}
        left_out: dict[int, LeftOut] = {}
        self._write(params, task, range(written), answers, left_out)
        if metrics.needs_scores:
            self._score(params, task, range(limit), answers, left_out)
        for error in left_out.values():
            logging.warning("left out of the evaluation: %s", error)
        answers = {record: answers[record] for record in answers if record not in left_out}
        if left_out and not answers:
            raise _none(task, next(iter(left_out.values())))
        result = self._judge(params, task, metrics, answers, num_samples)
        for name, damaged in (("num_damaged", True), ("num_left_out", False)):
            if count := sum(error.damaged == damaged for error in left_out.values()):
                result.metrics[name] = count
        return result

    def answer(self, params: Any, task: TaskRecords, records: Sequence[int], mode: str,
               stream: int = 0, all_decodes: bool = False
               ) -> tuple[list[Prediction], list[LeftOut]]:
        """Answers some records, judging nothing.

        Args:
            params: of the model, on the devices.
            task: the split.
            records: numbers in it.
            mode: one of `answers.MODES`.
            stream: see `Generator.generate`.
            all_decodes: record everything that was sampled, not the best alone.

        Returns:
            What was made of each record, in their order, and why others were left out.
        """
        found: dict[int, Answer] = {}
        left_out: dict[int, LeftOut] = {}
        if mode == SCORE:
            self._score(params, task, records, found, left_out)
        else:
            self._write(params, task, records, found, left_out, stream, mode == PREDICT_WITH_AUX)
        return [found[record].prediction(task.name, record, mode, self._decode_text, all_decodes)
                for record in sorted(found) if record not in left_out], list(left_out.values())

    # -- writing -------------------------------------------------------------------------------

    def _write(self, params: Any, task: TaskRecords, records: Sequence[int],
               answers: dict[int, Answer], left_out: dict[int, LeftOut], stream: int = 0,
               token_scores: bool = False) -> None:
        by_modality: dict[str, list[int]] = {}
        for record in records:
            for modality in self._lengths(task, record).targets:
                by_modality.setdefault(modality, []).append(record)
        total, written = sum(map(len, by_modality.values())), 0

        def done() -> None:
            nonlocal written
            written += 1
            if self._progress is not None:
                self._progress(task.name, written, total)

        def refused(record: int, why: str) -> None:
            left_out[record] = LeftOut(f"{task.name} record {record}: {why}")

        for modality, wanted in by_modality.items():
            requests = self._requests(task, wanted, answers, left_out, modality)
            write(self._generator, params, requests, modality, answers, refused, stream,
                  token_scores, done)

    def _score(self, params: Any, task: TaskRecords, records: Sequence[int],
               answers: dict[int, Answer], left_out: dict[int, LeftOut]) -> None:
        score(self._generator, params, self._requests(task, records, answers, left_out), answers)

    def _lengths(self, task: TaskRecords, record: int) -> Any:
        return self._objective.lengths(task.clean_lengths(record), seed=self._seed, example=record)

    def _requests(self, task: TaskRecords, records: Sequence[int], answers: dict[int, Answer],
                  left_out: dict[int, LeftOut], modality: str | None = None) -> Iterator[Request]:
        """Reads records, notes what the encoder will see of each, and hands them on."""
        def one(record: int) -> tuple[Request, Any, tuple[str, ...]]:
            try:
                clean = task.read(record)
            except DamagedRecord as error:
                raise LeftOut(str(error), damaged=True) from error
            example = self._objective.apply(_for_model(clean), seed=self._seed, example=record)
            request, choices = Request.from_example(example, record), ()
            if self._read_options is not None and modality == "text":
                choices = _options(task, record, clean)
                request = dataclasses.replace(request, options=self._read_options.ids(choices))
            if (why := self._generator.misfit(request, modality)) is not None:
                raise LeftOut(f"{task.name} record {record}: {why}")
            return request, clean.get(PRETOKENIZED), choices

        wanted = [record for record in records if record not in left_out]
        for record, found in together.read(f"records of {task.name}", wanted, one):
            if isinstance(found, LeftOut):
                left_out[record] = found
                continue
            request, pretokenized, choices = found
            signals = tuple(name for name, spec in self._signals.items()
                            if f"targets/{name}/{spec.name}" in request.targets)
            answers.setdefault(record, Answer.to(request, self._decode_text, pretokenized, choices,
                                                 signals))
            yield request

    # -- judging -------------------------------------------------------------------------------

    def _judge(self, params: Any, task: TaskRecords, metrics: TaskMetrics,
               answers: Mapping[int, Answer], num_samples: int) -> TaskResult:
        result, judged = TaskResult(task.name, {}), _Judged()
        records = sorted(answers)
        ordered = [answers[record] for record in records]
        # All processes draw together; a metric may fail on one alone, for want of a package, say.
        together = f"metrics of {task.name}"
        drawing = any(answer.signals for answer in ordered)
        size = self._generator.batch_size if drawing else max(len(records), 1)
        for first in range(0, len(records), size):
            some = dict(zip(records[first:first + size], ordered[first:first + size], strict=True))
            drawn = self._drawn(params, list(some.values()))
            refuse_together(together, lambda some=some, drawn=drawn: self._postprocess(
                task, metrics, some, drawn, judged, result, num_samples))
        if metrics.has_metrics:
            refuse_together(together, lambda: result.metrics.update(
                self._computed(task, metrics, ordered, judged)))
        return result

    def _drawn(self, params: Any, some: Sequence[Answer]) -> list[dict[str, np.ndarray]]:
        """What was written of each where the target is pixels or a spectrogram, in that form."""
        drawn: list[dict[str, np.ndarray]] = [{} for _ in some]
        for modality, spec in self._signals.items():
            codes = {number: ids(answer.tokens)[modality] for number, answer in enumerate(some)
                     if modality in answer.signals and modality in answer.tokens}
            if codes:
                made = self._generator.drawn(params, modality, np.stack(list(codes.values())))
                for number, one in zip(codes, made, strict=True):
                    drawn[number][modality] = as_signal(one, spec, modality)
        return drawn

    def _postprocess(self, task: TaskRecords, metrics: TaskMetrics, some: Mapping[int, Answer],
                     drawn: Sequence[Mapping[str, np.ndarray]], judged: _Judged,
                     result: TaskResult, num_samples: int) -> None:
        for (record, answer), own in zip(some.items(), drawn, strict=True):
            # Read again: holding every image of a split until the end would take its size.
            clean = task.read(record)
            reference = answer.reference(self._decode_text, self._given(clean, answer.signals))
            judged.targets.append(metrics.postprocess(reference, clean, is_target=True))
            if answer.tokens:
                line = answer.prediction(task.name, record, PREDICT, self._decode_text)
                output = answer.told(self._decode_text, own)
                judged.outputs.append(metrics.postprocess(output, clean, is_target=False))
                result.predictions.append(line)
                if len(result.samples) < num_samples:
                    result.samples.append(Sample(clean, line, judged.targets[-1],
                                                 judged.outputs[-1]))
            if metrics.metric_objs:
                judged.examples.append(clean)

    def _given(self, clean: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, np.ndarray]:
        """The pixels and spectrograms that an example asks for."""
        if not modalities:
            return {}
        names = self._roles(clean).targets
        return {modality: as_signal(clean[names[modality]], self._signals[modality],
                                    names[modality]) for modality in modalities}

    def _computed(self, task: TaskRecords, metrics: TaskMetrics, ordered: Sequence[Answer],
                  judged: _Judged) -> dict[str, Any]:
        found = ModelOutputs()
        if metrics.needs_predictions:
            found = ModelOutputs([only(ids(answer.tokens)) for answer in ordered],
                                 [answer.score for answer in ordered])
        if metrics.needs_scores:
            found = dataclasses.replace(
                found, target_scores=[answer.target_score for answer in ordered])
        values: dict[str, Any] = metrics.compute(
            judged.targets, judged.outputs if metrics.needs_predictions else None, found,
            judged.examples, next(iter(self._roles(task.features).targets.values())))
        return {**values, "num_examples": len(ordered)}

    def _roles(self, names: Iterable[str]) -> FeatureRoles:
        return feature_roles(names, self._objective.input_modalities,
                             self._objective.target_modalities,
                             getattr(self._objective, "ignored_features", ()), self._signals,
                             getattr(self._objective, "code_inputs", ()))


def _options(task: TaskRecords, record: int, clean: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return options.of_example(clean)
    except UserError as error:
        got = "" if error.got is None else f" ({error.got})"
        raise LeftOut(f"{task.name} record {record}: {error.problem}{got}") from error


def _none(task: TaskRecords, error: LeftOut) -> UserError:
    if not error.damaged:
        return UserError(f"no record of task '{task.name}' can be used", got=str(error),
                         fix="raise task_feature_lengths, or DecodingConfig.max_length, or let "
                             "DecodingConfig.allowed allow more")
    return UserError(f"no record of task '{task.name}' can be read", got=str(error),
                     fix=f"vishwam cache --task_or_mixture={task.name} --overwrite")


def _for_model(clean: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: value for name, value in clean.items() if not name.startswith(META_PREFIX)}
