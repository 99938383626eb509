"""Metrics and predictions of a checkpoint on held-out examples, task by task.

usage: vishwam evaluate --gin_file=RECIPE [--gin.NAME=VALUE ...] [--checkpoint=latest|STEP|PATH]
                        [--split=SPLIT] [--tasks=A,B]

--checkpoint=C   latest (the default) or a step of MODEL_DIR's checkpoints; or a path: a MODEL_DIR,
                 a checkpoint folder, a flat .npz of '/'-joined parameter names
--split=SPLIT    split of the tasks; default: EVAL_SPLIT, which is 'test' unless set
--tasks=A,B      only these tasks of the mixture

The recipe is the one you trained with; it includes gin/runs/evaluate.gin. For every task the
teacher-forced loss is taken; for tasks with metric functions the model writes an answer to every
example and the task judges it; for the others the loss stands beside that of a unigram model.
MODEL_DIR/evaluation/STEP/ gets metrics.jsonl and predictions-TASK.jsonl of the last evaluation of
that step; a split given by --split has a folder of its own in it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from vishwam_t5x import evaluation_setup, screen, task_lookup
from vishwam_t5x.core import distributed, storage
from vishwam_t5x.core.errors import EXIT_OK
from vishwam_t5x.data import source
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation import predictions, report
from vishwam_t5x.evaluation.evaluator import Evaluator, TaskResult
from vishwam_t5x.evaluation.generator import DecodingConfig
from vishwam_t5x.evaluation.loss_evaluator import LossEvaluator, SplitSums
from vishwam_t5x.evaluation.metrics.text import unigram_loss
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules

FLAGS = ("checkpoint", "split", "tasks")
MIXTURE = "(all tasks)"


@dataclasses.dataclass
class Evaluation:
    """What an evaluation found and where it was written.

    Attributes:
        step: of the checkpoint; None for a file of parameters.
        results: one a task, and last one of all tasks together.
        directory: where the files are.
        page: the PNG page, if one was wanted.
    """

    step: int | None
    results: list[TaskResult]
    directory: pathlib.PurePath
    page: storage.PathLike | None = None

    def table(self) -> str:
        """Returns the metrics as a table to read; sums of weights are in the file only."""
        return predictions.table([
            {"task": result.task, **{name: value for name, value in result.metrics.items()
                                     if not name.startswith("weight_sum/")}}
            for result in self.results])


def evaluate(model: Any, model_dir: str, objective: Any, dataset_cfg: DatasetConfig,
             checkpoint_path: str | None = None, output_dir: str | None = None,
             split: str | None = None, tasks: Sequence[str] = (),
             loss: LossConfig = LossConfig(),
             decoding: Mapping[str, DecodingConfig] | None = None, decode_batch_size: int = 64,
             max_examples: int | None = None, baseline_examples: int = 20_000,
             page: report.PageConfig | None = None, mesh: mesh_lib.MeshConfig | None = None,
             logical_axis_rules: LogicalAxisRules = LogicalAxisRules(),
             compilation_cache_dir: str | None = None) -> Evaluation:
    """Evaluates a checkpoint on every task of a mixture.

    Args:
        model: what was trained.
        model_dir: of the run; its newest checkpoint is evaluated unless `checkpoint_path` says.
        objective: what it was trained with; augmentation is left out.
        dataset_cfg: mixture, split and shapes of the batches for the loss.
        checkpoint_path: 'latest', a step, or a path; see `evaluation.restoring`.
        output_dir: where files go; None: MODEL_DIR/evaluation.
        split: instead of that of `dataset_cfg`.
        tasks: only these; (): all.
        loss: as in training.
        decoding: how each modality is written; greedily those not named.
        decode_batch_size: examples written together.
        max_examples: at most so many of each task, the first ones; None: all.
        baseline_examples: training examples a task's unigram model counts at most; 0 for none.
        page: what to show on a PNG page in MODEL_DIR, when all tasks are evaluated; None: no page.
        mesh: devices along each axis; None: what suits the devices at hand.
        logical_axis_rules: which dimension is split over which mesh axis.
        compilation_cache_dir: as for `train`.

    Returns:
        The metrics, which have been written.

    Raises:
        UserError: the parts do not fit together, or a task's metric failed.
    """
    ready = evaluation_setup.prepare(model, objective, dataset_cfg, split, decoding,
                                     decode_batch_size, mesh, logical_axis_rules,
                                     compilation_cache_dir)
    config = ready.config
    caches = task_lookup.open_tasks(config, ready.objective, tasks)
    page = None if tasks else page
    if page is not None:
        report.check_tasks(page, [task.name for task in caches])
    judges = {task.name: task_lookup.metrics_of(task, config) for task in caches}
    codec = task_lookup.text_codec(caches, config, getattr(objective, "vocabulary", None))
    params, restored = ready.load(checkpoint_path, model_dir)
    losses = LossEvaluator(model, loss, ready.objective, config, ready.devices, ready.rules,
                           max_examples, caches)
    baseline = _Baseline(losses, ready, baseline_examples)
    bar = evaluation_setup.Progress()
    evaluator = Evaluator(ready.generator, ready.objective, codec.decode, config.seed, bar)

    results, splits = [], []
    for task in caches:
        begin = time.monotonic()
        splits.append(losses.split_sums(params, task.name))
        result = evaluator.evaluate(params, task, judges[task.name], max_examples,
                                    page.num_samples if page else 0)
        result.metrics = {**splits[-1].metrics(loss), **result.metrics}
        if not judges[task.name].has_metrics:
            result.metrics.update(baseline.of(task.name, splits[-1]))
        results.append(result)
        bar.close()
        logging.info("%s: %d examples in %.1f s", task.name, splits[-1].num_examples,
                     time.monotonic() - begin)
    if len(results) > 1:
        results.append(TaskResult(MIXTURE, SplitSums.of_all(splits).metrics(loss)))
    directory = storage.place(output_dir or storage.join(model_dir, "evaluation"))
    directory /= evaluation_setup.checkpoint_name(restored)
    if config.split != dataset_cfg.split:
        directory /= config.split
    found = Evaluation(restored.step, results, directory)
    if distributed.is_primary():
        _write(found, config, model_dir, page)
    return found


class _Baseline:
    """The loss of unigram models of the training split, for targets a task does not judge."""

    def __init__(self, evaluated: LossEvaluator, ready: evaluation_setup.Prepared,
                 max_examples: int) -> None:
        self._evaluated, self._ready, self._max_examples = evaluated, ready, max_examples
        self._config = dataclasses.replace(ready.config, split="train")
        self._training: LossEvaluator | None = None

    def of(self, task: str, split: SplitSums) -> dict[str, float]:
        """Returns {'unigram/<modality>': nats per target token} of the targets that occur."""
        if not self._max_examples:
            return {}
        if source.missing_tasks(self._config):
            logging.info("no unigram model to compare %s with: its split 'train' is not cached",
                         task)
            return {}
        if self._training is None:
            self._training = self._evaluated.with_tasks(
                task_lookup.open_tasks(self._config, self._ready.objective), self._max_examples)
        return {
            f"unigram/{modality}": unigram_loss(
                self._training.target_tokens(task, modality),
                self._evaluated.target_tokens(task, modality),
                self._ready.model.config.target(modality).table.num_embeddings)
            for modality, parts in split.sums.items() if parts["weight"] > 0}


def _write(found: Evaluation, config: DatasetConfig, model_dir: str,
           page: report.PageConfig | None) -> None:
    rows = [predictions.plain({"step": found.step, "split": config.split, "task": result.task,
                               **result.metrics}) for result in found.results]
    predictions.write_lines(found.directory / "metrics.jsonl",
                            [json.dumps(row, ensure_ascii=False) for row in rows])
    for result in found.results:
        if result.predictions:
            predictions.write_lines(found.directory / predictions.file_name(result.task),
                                    [line.to_json() for line in result.predictions])
    if page is not None:
        folder = storage.place(model_dir)
        at = "" if found.step is None else f" at step {found.step}"
        found.page = report.write(
            folder / page.file, f"What {config.mixture_or_task_name} taught",
            [result for result in found.results if result.task != MIXTURE], page,
            folder / "metrics.jsonl", f"split '{config.split}'{at}")


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam evaluate ARGV` and returns the exit code."""
    from vishwam_t5x import gin_config

    config = gin_config.parse(argv, "evaluate", flags=FLAGS)
    screen.show_messages()
    found = config.call(evaluate, **evaluation_setup.overrides(config.flags))
    print(found.table())
    print(f"\nmetrics and predictions: {found.directory}")
    if found.page is not None:
        print(f"page: {found.page}")
    return EXIT_OK

