"""Metrics and predictions of a checkpoint on held-out examples, task by task.

usage: vishwam evaluate --gin_file=RECIPE [--gin.NAME=VALUE ...]
                        [--checkpoint=latest|STEP|STEP,STEP|all|watch|PATH] [--timeout=SECONDS]
                        [--split=SPLIT] [--tasks=A,B]
                        [--coordinator_address=HOST:PORT --process_count=N --process_index=I]

--checkpoint=C   latest (the default) or a step of MODEL_DIR's checkpoints; or a path: a MODEL_DIR,
                 a checkpoint folder, a flat .npz of '/'-joined parameter names. Several steps, or
                 all, or watch: all, and each new one until the run is finished. Of several, those
                 evaluated already with the same settings are skipped
--timeout=S      watch ends after so many seconds without a new checkpoint; default: it waits
--split=SPLIT    split of the tasks; default: EVAL_SPLIT, which is 'test' unless set
--tasks=A,B      only these tasks of the mixture

On several hosts run the same command on each; they find each other as those of `vishwam train` do.
The recipe is the one you trained with; it includes gin/runs/evaluate.gin. For every task the
teacher-forced loss is taken; for tasks with metric functions the model writes an answer to every
example and the task judges it; for the others the loss stands beside that of a unigram model.
MODEL_DIR/evaluation/STEP/ gets metrics.jsonl and predictions-TASK.jsonl of the last evaluation of
that step, with the PNG and WAV files of what a model with codecs drew and sounded, and
settings.json; a split given by --split has a folder of its own in it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from vishwam_t5x import drawing, evaluation_setup, joining, screen, task_lookup
from vishwam_t5x.core import distributed, storage
from vishwam_t5x.core.errors import EXIT_OK, PeersLost, Preempted, UserError
from vishwam_t5x.data import source
from vishwam_t5x.data.records import TaskCache
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation import checkpoint_stream, predictions, report, restoring
from vishwam_t5x.evaluation.evaluator import Evaluator, TaskResult
from vishwam_t5x.evaluation.generator import DecodingConfig
from vishwam_t5x.evaluation.loss_evaluator import LossEvaluator, SplitSums
from vishwam_t5x.evaluation.metrics.text import unigram_loss
from vishwam_t5x.evaluation.options import OptionReader, OptionScoring
from vishwam_t5x.evaluation.rendering import SoundConfig
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.training import ledger

if TYPE_CHECKING:
    from vishwam_t5x.checkpointing.restore import RestoreReport

FLAGS = ("checkpoint", "split", "tasks", "timeout", *joining.FLAGS)
MIXTURE = "(all tasks)"
_SETTINGS = "settings.json"


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
             options: OptionScoring = OptionScoring(), sound: SoundConfig = SoundConfig(),
             max_examples: int | None = None, baseline_examples: int = 20_000,
             page: report.PageConfig | None = None, poll_seconds: float = 10.0,
             watch_timeout: float | None = None, mesh: mesh_lib.MeshConfig | None = None,
             logical_axis_rules: LogicalAxisRules = LogicalAxisRules(),
             compilation_cache_dir: str | None = None,
             done: Callable[[Evaluation], object] = lambda found: None) -> Evaluation | None:
    """Evaluates a checkpoint, or several, on every task of a mixture; compiles once.

    Args:
        model: what was trained.
        model_dir: of the run; its newest checkpoint is evaluated unless `checkpoint_path` says.
        objective: what it was trained with; augmentation is left out.
        dataset_cfg: mixture, split and shapes of the batches for the loss.
        checkpoint_path: 'latest', a step, a path, or several: `evaluation.checkpoint_stream`.
        output_dir: where files go; None: MODEL_DIR/evaluation.
        split: instead of that of `dataset_cfg`.
        tasks: only these; (): all.
        loss: as in training.
        decoding: how each modality is written; greedily those not named.
        decode_batch_size: examples written together.
        options: how the best of an example's options is found.
        sound: how codes become waveforms.
        max_examples: at most so many of each task, the first ones; None: all.
        baseline_examples: training examples a task's unigram model counts at most; 0 for none.
        page: what to show on a PNG page in MODEL_DIR, when all tasks are evaluated; None: no page.
        poll_seconds: between two looks for new checkpoints.
        watch_timeout: seconds without one after which to wait no longer; None: until the run ends.
        mesh: devices along each axis; None: what suits the devices at hand.
        logical_axis_rules: which dimension is split over which mesh axis.
        compilation_cache_dir: as for `train`.
        done: called with each checkpoint's metrics, once they are written.

    Returns:
        The last of them; None if every one of several was evaluated already.

    Raises:
        UserError: the parts do not fit together, or a task's metric failed.
    """
    codecs = drawing.described(None, sound)

    def set_up() -> _OneCheckpoint:
        ready = evaluation_setup.prepare(model, objective, dataset_cfg, split, decoding,
                                         decode_batch_size, mesh, logical_axis_rules,
                                         compilation_cache_dir, options)
        config = ready.config
        caches = task_lookup.open_tasks(config, ready.objective, tasks)
        shown = None if tasks else page
        if shown is not None:
            report.check_tasks(shown, [task.name for task in caches])
        judges = {task.name: task_lookup.metrics_of(task, config) for task in caches}
        codec = task_lookup.text_codec(caches, config, getattr(objective, "vocabulary", None))
        ready.generator.read_text(codec.encode)
        read_options = task_lookup.option_reader(codec, caches, ready.objective, options)
        losses = LossEvaluator(model, loss, ready.objective, config, ready.devices, ready.rules,
                               max_examples, caches)
        directory = storage.place(output_dir or storage.join(model_dir, "evaluation"))
        return _OneCheckpoint(ready, caches, judges, codec, read_options, losses, loss,
                              max_examples, _Baseline(losses, ready, baseline_examples),
                              baseline_examples, shown, model_dir, directory, sound, codecs,
                              config.split if config.split != dataset_cfg.split else "")

    one = evaluation_setup.on_all("evaluation", set_up)
    evaluation_setup.check_same_data(one.caches)
    last = None
    for place in checkpoint_stream.places(
            checkpoint_path, model_dir, lambda step: one.is_done(step),
            lambda: _is_finished(model_dir), poll_seconds, watch_timeout):
        if (loaded := one.load(place, checkpoint_stream.is_several(checkpoint_path))) is None:
            logging.warning("%s was deleted before it was evaluated: the run keeps only so many",
                            place)
            continue
        last = one.evaluate(*loaded)
        done(last)
    return last


@dataclasses.dataclass
class _OneCheckpoint:
    """Evaluates one checkpoint after the other with what was built, and compiled, for all."""

    ready: evaluation_setup.Prepared
    caches: Sequence[TaskCache]
    judges: Mapping[str, TaskMetrics]
    codec: task_lookup.TextCodec
    read_options: OptionReader | None
    losses: LossEvaluator
    loss: LossConfig
    max_examples: int | None
    baseline: _Baseline
    baseline_examples: int
    page: report.PageConfig | None
    model_dir: str
    directory: pathlib.PurePath
    sound: SoundConfig
    codecs: Mapping[str, Any]
    subfolder: str

    def __post_init__(self) -> None:
        self._bar = evaluation_setup.Progress()
        self._evaluator = Evaluator(self.ready.generator, self.ready.objective, self.codec.decode,
                                    self.ready.config.seed, self._bar, self.read_options)

    def folder(self, name: str) -> pathlib.PurePath:
        """Where the files of a step, or of a file of parameters, go."""
        return self.directory / name / self.subfolder if self.subfolder else self.directory / name

    def is_done(self, step: int) -> bool:
        """Whether a step was evaluated with these settings, and is what it was then."""
        try:
            found = json.loads(storage.read_text(self.folder(str(step)) / _SETTINGS))
            return found == self._settings(restoring.identity(storage.join(
                storage.expanded(self.model_dir), "checkpoints", str(step))))
        except FileNotFoundError:
            return False

    def load(self, place: str, may_be_gone: bool) -> tuple[Any, RestoreReport, str] | None:
        """Restores a checkpoint; None if it `may_be_gone` and is: the same on every process.

        Returns:
            Parameters, what became of them, and in process 0 the checkpoint's identity.
        """
        loaded: list[tuple[Any, RestoreReport, str]] = []
        failure: Exception | None = None
        try:
            params, restored = self.ready.restore(place)
            loaded.append((params, restored, restoring.identity(restored.path)
                           if distributed.is_primary() else ""))
        except (Preempted, PeersLost):
            raise  # the others have been told, or are gone
        except Exception as error:  # noqa: BLE001 - raised again, once the others know
            failure = error
        if not distributed.any_process(failure is not None, "checkpoint not restored"):
            return loaded[0]
        if may_be_gone and checkpoint_stream.is_gone(place):
            return None
        raise failure or UserError("another process cannot read the checkpoint", got=place,
                                   fix="see its own message")

    def evaluate(self, params: Any, restored: RestoreReport, weights: str) -> Evaluation:
        """Evaluates what was restored, of that identity, and writes what was found."""
        distributed.refuse_together("vocabulary", lambda: task_lookup.check_learned(
            self.caches, restored.path))
        results, splits = [], []
        for task in self.caches:
            begin = time.monotonic()
            judge = self.judges[task.name]
            splits.append(self.losses.split_sums(params, task.name))
            result = self._evaluator.evaluate(params, task, judge, self.max_examples,
                                              self.page.num_samples if self.page else 0)
            result.metrics = {**splits[-1].metrics(self.loss), **result.metrics}
            if not judge.has_metrics:
                self._add_baseline(result, splits[-1])
            results.append(result)
            self._bar.close()
            logging.info("%s: %d examples in %.1f s", task.name, splits[-1].num_examples,
                         time.monotonic() - begin)
        if len(results) > 1:
            results.append(TaskResult(MIXTURE, SplitSums.of_all(splits).metrics(self.loss)))
        directory = self.folder(evaluation_setup.checkpoint_name(restored))
        found = Evaluation(restored.step, results, directory)
        config = self.ready.model.config
        drawn = drawing.drawer(config, params, self.ready.devices, config.target_modalities,
                               sound=self.sound)
        distributed.refuse_together("evaluation written",
                                    lambda: self._write(found, weights, drawn))
        return found

    def _add_baseline(self, result: TaskResult, split: SplitSums) -> None:
        """In process 0, which alone writes it."""
        distributed.refuse_together("unigram model", lambda: result.metrics.update(
            self.baseline.of(result.task, split) if distributed.is_primary() else {}),
            evaluation_setup.CACHE_FILLED)

    def _write(self, found: Evaluation, weights: str, drawn: drawing.Drawer) -> None:
        if not distributed.is_primary():
            return
        # Last, and first removed: files of two evaluations must not pass for one.
        storage.remove(found.directory / _SETTINGS)
        _write(found, self.ready.config, self.model_dir, self.page, drawn)
        storage.write_text(found.directory / _SETTINGS,
                           json.dumps(self._settings(weights), indent=1))

    def _settings(self, weights: str) -> dict[str, Any]:
        """What the files depend on; JSON values. Process 0 alone asks: nothing is agreed on here.
        """
        described, code_of = evaluation_setup.described, evaluation_setup.code_of
        metrics = {
            name: [code_of(function) for function in (
                *judge.metric_fns, *filter(None, [judge.postprocess_fn]), *judge.metric_objs)]
            for name, judge in self.judges.items()}
        config = self.ready.config
        return {**self.codecs, "weights": weights, "metrics": metrics,
                "seed": config.seed,
                "baseline_examples": self.baseline_examples, "page": described(self.page),
                "batch_sizes": [config.batch_size, self.ready.generator.batch_size],
                "split": config.split, "tasks": [task.name for task in self.caches],
                "records": [task.manifest.lengths_sha256 for task in self.caches],
                "max_examples": self.max_examples, "lengths": dict(config.task_feature_lengths),
                "loss": described(self.loss), "decoding": self.ready.generator.description,
                "constraints": evaluation_setup.code_of_constraints(self.ready.generator.configs),
                "model": described(self.ready.model.config),
                "objective": described(self.ready.objective)}


def _is_finished(model_dir: str) -> bool:
    """Whether the run has come to its end: no further checkpoint will come."""
    try:
        with storage.as_local(storage.join(model_dir, "ledger.jsonl")) as path:
            sessions = ledger.read(path)
    except FileNotFoundError:
        return False
    return bool(sessions) and sessions[-1].why == "finished"


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
                self._ready.model.config.target(modality).vocab_size)
            for modality, parts in split.sums.items()
            # Of pixels there are no codes to be counted before a model has made them.
            if parts["weight"] > 0 and modality not in self._ready.spec.signals}


def _write(found: Evaluation, config: DatasetConfig, model_dir: str,
           page: report.PageConfig | None, drawn: drawing.Drawer) -> None:
    rows = [predictions.plain({"step": found.step, "split": config.split, "task": result.task,
                               **result.metrics}) for result in found.results]
    predictions.write_lines(found.directory / "metrics.jsonl",
                            [json.dumps(row, ensure_ascii=False) for row in rows])
    for result in found.results:
        if result.predictions:
            path = found.directory / predictions.file_name(result.task)
            predictions.write_lines(path, [line.to_json() for line in drawn.written(
                result.predictions, path, of_tasks=False)])
    if page is not None:
        for result in found.results:
            result.samples = drawn.shown(result.samples)
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
    given = evaluation_setup.overrides(config.flags)
    if "timeout" in config.flags:
        if config.flags.get("checkpoint") != checkpoint_stream.WATCH:
            raise UserError("--timeout goes with --checkpoint=watch")
        given["watch_timeout"] = evaluation_setup.number(config.flags, "timeout")
    joining.join(config)
    with joining.watched():
        last = config.call(evaluate, done=_show, **given)
    if last is None and distributed.is_primary():
        print("nothing was left to evaluate")
    return EXIT_OK


def _show(found: Evaluation) -> None:
    if not distributed.is_primary():
        return
    if found.step is not None:
        print(f"step {found.step}")
    print(found.table())
    print(f"\nmetrics and predictions: {found.directory}", flush=True)
    if found.page is not None:
        print(f"page: {found.page}", flush=True)

