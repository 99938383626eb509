"""T5X's `train`, `evaluate` and `infer` by its signatures: they say how ours are to be called.

A gin file of T5X's binds them through `import __main__ as train_script`; the verbs call ours.
Parameters that no docstring names take T5X's defaults alone: see `refused.SETTINGS`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from absl import logging

from vishwam_t5x.compat import refused, seqio_names, t5x_utils
from vishwam_t5x.compat.initial_checkpoint import steps_before
from vishwam_t5x.compat.models import BaseTransformerModel
from vishwam_t5x.compat.partitioning import PjitPartitioner
from vishwam_t5x.compat.t5x_utils import CheckpointConfig, DatasetConfig, RestoreCheckpointConfig
from vishwam_t5x.compat.trainer import Trainer
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.source import DatasetConfig as OurDatasetConfig
from vishwam_t5x.infer_eval import InferEval
from vishwam_t5x.training.stability import StabilityConfig

STANDS_FOR = "t5x"
Arguments = dict[str, Any]
_THEIRS = re.compile(r"checkpoint_\d+")


def train(*, model: BaseTransformerModel, train_dataset_cfg: DatasetConfig,
          train_eval_dataset_cfg: DatasetConfig | None,
          infer_eval_dataset_cfg: DatasetConfig | None, checkpoint_cfg: CheckpointConfig,
          partitioner: PjitPartitioner, trainer_cls: type[Trainer], model_dir: str,
          total_steps: int, eval_steps: int, eval_period: int, random_seed: int | None,
          summarize_config_fn: Callable[..., None] | None = None,
          relative_steps: int | None = None, stats_period: int | None = None,
          use_hardware_rng: bool = False,
          inference_evaluator_cls: type[seqio_names.Evaluator] = seqio_names.Evaluator,
          get_dataset_fn: Callable[..., Any] | None = None, concurrent_metrics: bool = True,
          actions: Mapping[str, Sequence[Any]] | None = None,
          train_eval_get_dataset_fn: Callable[..., Any] | None = None,
          run_eval_before_training: bool = False,
          train_state_initializer_cls: type | None = None, use_gda: bool = True,
          use_jax_array: bool = True, use_orbax: bool = True,
          verify_matching_vocabs_fn: Callable[..., Any] | None = None, gc_period: int = 0,
          task_modules: Sequence[str] = ()) -> Arguments:
    """Returns what `vishwam_t5x.train.train` is called with.

    Args:
        model: network, loss, optimizer.
        train_dataset_cfg: what is trained on.
        train_eval_dataset_cfg: what the loss is evaluated on; None: nothing.
        infer_eval_dataset_cfg: what predictions are judged on, as often; None: nothing.
        checkpoint_cfg: what is saved and restored; of an initial checkpoint the parameters alone,
            while T5X restores the optimizer's state too.
        partitioner: where arrays lie.
        trainer_cls: microbatches, learning rate.
        model_dir: where the run is written.
        total_steps: last step, those of the initial checkpoint included.
        eval_steps: batches of an evaluation; of each task so many times the rows of a batch are
            read as examples.
        eval_period: steps between evaluations; 0: none.
        random_seed: of parameters and dropout; None: 0.
        stats_period: steps between records; None: those between evaluations or saves.
        inference_evaluator_cls: how predictions are judged.
        concurrent_metrics: metrics are always fetched beside the next step.
        task_modules: further modules that register tasks; not for gin files.

    Raises:
        UserError: something is not honoured.
    """
    refused.check(f"{STANDS_FOR}.train", locals())
    trainer, seed = trainer_cls(), _seed(random_seed)
    data = train_dataset_cfg.ours(task_modules, seed)
    before = steps_before(checkpoint_cfg.restore, model_dir)
    _check_steps(before, total_steps)
    save = checkpoint_cfg.save or t5x_utils.SaveCheckpointConfig()
    periods = [period for period in (eval_period, save.period) if period]
    evaluated, judged = None, None
    if eval_period and train_eval_dataset_cfg is not None:
        evaluated = train_eval_dataset_cfg.ours(task_modules, seed)
    if eval_period and infer_eval_dataset_cfg is not None:
        judged = _infer_eval(infer_eval_dataset_cfg, model, inference_evaluator_cls(), data,
                             eval_period, task_modules)
    return {
        "model": model.module.ours(), "model_dir": model_dir,
        "objective": t5x_utils.objective(data, model.vocabulary_files()),
        "train_dataset_cfg": data,
        "optimizer": model.optimizer_def.ours(trainer.learning_rate_fn, before),
        "total_steps": total_steps - before, "loss": model.loss(), "mesh": partitioner.mesh(),
        "logical_axis_rules": partitioner.rules(), "checkpoint_cfg": save.ours(),
        "train_eval_dataset_cfg": evaluated, "eval_period": eval_period or total_steps,
        "infer_eval": judged,
        "eval_examples": evaluated and _eval_examples(eval_steps, evaluated),
        "stats_period": stats_period or min(periods, default=100),
        "num_microbatches": trainer.num_microbatches or 1, "random_seed": seed,
        # T5X judges no step; one that is not finite must not count all the same.
        "stability": StabilityConfig(spike_sigmas=None), **_initial(checkpoint_cfg.restore)}


def evaluate(*, model: BaseTransformerModel, dataset_cfg: DatasetConfig,
             restore_checkpoint_cfg: RestoreCheckpointConfig, partitioner: PjitPartitioner,
             output_dir: str,
             inference_evaluator_cls: type[seqio_names.Evaluator] = seqio_names.Evaluator,
             summarize_config_fn: Callable[..., None] | None = None,
             train_state_initializer_cls: type | None = None,
             fallback_init_rng: int | None = None, use_orbax: bool = True,
             task_modules: Sequence[str] = ()) -> Arguments:
    """Returns what `vishwam_t5x.evaluate.evaluate` is called with.

    Args:
        model: network, loss, way to decode.
        dataset_cfg: what is evaluated.
        restore_checkpoint_cfg: of which checkpoint.
        partitioner: where arrays lie.
        output_dir: where metrics and predictions are written.
        inference_evaluator_cls: how predictions are judged.
        task_modules: further modules that register tasks; not for gin files.

    Raises:
        UserError: something is not honoured.
    """
    refused.check(f"{STANDS_FOR}.evaluate", locals())
    run = _run(model, dataset_cfg, restore_checkpoint_cfg, partitioner, output_dir, task_modules)
    if restore_checkpoint_cfg.mode == "all":
        _refuse_all_of_t5x_s(run["checkpoint_path"])
        run |= {"model_dir": run["checkpoint_path"], "checkpoint_path": "all"}
    return {**run, "loss": model.loss(), "output_dir": output_dir,
            "max_examples": inference_evaluator_cls().num_examples}


def infer(*, mode: Literal["predict", "score", "predict_with_aux"], model: BaseTransformerModel,
          dataset_cfg: DatasetConfig, restore_checkpoint_cfg: RestoreCheckpointConfig,
          partitioner: PjitPartitioner, output_dir: str, checkpoint_period: int,
          shard_id: int = 0, num_shards: int = 1, merge_chunked_results: bool = True,
          write_fn: Callable[..., Any] | None = None, checkpoint_ds_iter: bool = True,
          train_state_initializer_cls: type | None = None, fallback_init_rng: int | None = None,
          merge_fn: Callable[..., Any] | None = None,
          summarize_config_fn: Callable[..., None] | None = None,
          verify_matching_vocabs_fn: Callable[..., Any] | None = None,
          output_vocab_feature_name: str = "targets", file_extension: str = "jsonl",
          keep_aux_as_numpy: bool = False, use_orbax: bool = True,
          task_modules: Sequence[str] = ()) -> Arguments:
    """Returns what `vishwam_t5x.infer.infer` is called with.

    Args:
        mode: what is written of each example.
        model: network and way to decode.
        dataset_cfg: what is inferred for.
        restore_checkpoint_cfg: of which checkpoint.
        partitioner: where arrays lie.
        output_dir: where the file is written.
        checkpoint_period: batches written in one piece, and lost at most.
        shard_id: number of this job.
        num_shards: jobs that share the work.
        checkpoint_ds_iter: a restart reads no example twice, whatever this says.
        task_modules: further modules that register tasks; not for gin files.

    Raises:
        UserError: something is not honoured.
    """
    refused.check(f"{STANDS_FOR}.infer", locals())
    if restore_checkpoint_cfg.mode == "all":
        raise UserError("inference takes one checkpoint", got="mode = 'all'",
                        fix="mode = 'specific' or 'latest'")
    name = dataset_cfg.mixture_or_task_name.replace("/", "_")
    return {**_run(model, dataset_cfg, restore_checkpoint_cfg, partitioner, output_dir,
                   task_modules),
            "mode": mode, "shard_id": shard_id, "num_shards": num_shards,
            "chunk_size": max(checkpoint_period, 1) * dataset_cfg.batch_size,
            "output_file": str(storage.join(output_dir, f"{name}-{mode}.jsonl"))}


def _run(model: BaseTransformerModel, dataset_cfg: DatasetConfig,
         restore: RestoreCheckpointConfig, partitioner: PjitPartitioner, output_dir: str,
         task_modules: Sequence[str]) -> Arguments:
    """What evaluation and inference are called with alike."""
    place = restore.place()
    if place is None:
        raise UserError("no checkpoint is named", got=f"path = {restore.path!r}",
                        fix="CHECKPOINT_PATH = the path of one")
    _refuse_parts(restore, "only training can begin with parts of a checkpoint")
    data = dataset_cfg.ours(task_modules)
    decoding = model.predict_batch_with_aux()
    return {"model": model.module.ours(restore.dtype or "float32"), "model_dir": output_dir,
            "objective": t5x_utils.objective(data, model.vocabulary_files()), "dataset_cfg": data,
            "checkpoint_path": place,
            "decoding": {"text": decoding}, "decode_batch_size": data.batch_size,
            "mesh": partitioner.mesh(), "logical_axis_rules": partitioner.rules()}


def _initial(restore: RestoreCheckpointConfig | None) -> Arguments:
    place = restore and restore.place()
    if restore is None or place is None:
        return {}
    if restore.mode == "all":
        raise UserError("a run begins with one checkpoint", got="mode = 'all'",
                        fix="mode = 'specific' or 'latest'")
    if restore.dtype == "bfloat16":
        raise UserError("parameters are trained in float32", got="dtype = 'bfloat16'",
                        fix="RestoreCheckpointConfig.dtype = 'float32'")
    return {"initial_checkpoint_path": place,
            "assignment_map": tuple(map(tuple, restore.assignment_map or ())),
            "fallback_to_scratch": restore.fallback_to_scratch}


def _refuse_all_of_t5x_s(model_dir: str) -> None:
    """Of T5X's own MODEL_DIRs one checkpoint at a time is read."""
    there = set(storage.names(storage.expanded(model_dir)))
    theirs = sorted((name for name in there if _THEIRS.fullmatch(name)),
                    key=lambda name: int(name.rpartition("_")[2]))
    if theirs and "checkpoints" not in there:
        raise UserError("mode = 'all' is not honoured of checkpoints that T5X wrote",
                        got=f"{model_dir} with {', '.join(theirs)}",
                        fix="mode = 'specific' and the path of each; or vishwam convert each of "
                            "them --to another MODEL_DIR, whose checkpoints are all evaluated")


def _refuse_parts(restore: RestoreCheckpointConfig, why: str) -> None:
    for name in ("assignment_map", "fallback_to_scratch"):
        if getattr(restore, name):
            raise UserError(f"t5x.utils.RestoreCheckpointConfig.{name} is not honoured: {why}",
                            got=f"{name} = {getattr(restore, name)!r}",
                            fix="vishwam convert writes a checkpoint with other names")


def _check_steps(before: int, total_steps: int) -> None:
    if total_steps < before:
        raise UserError("the initial checkpoint is beyond the last step",
                        got=f"step {before}, TRAIN_STEPS = {total_steps}",
                        fix=f"TRAIN_STEPS counts its steps too: {before} and those to come")
    if before:
        logging.info("the initial checkpoint is of step %d: %d of TRAIN_STEPS are left; steps are "
                     "counted from 0 here, the learning rate from %d", before, total_steps - before,
                     before)


def _eval_examples(eval_steps: int, data: OurDatasetConfig) -> int:
    """T5X counts batches, we count examples."""
    if eval_steps < 1:
        raise UserError("an evaluation takes at least one batch", got=f"eval_steps = {eval_steps}",
                        fix="eval_steps = 20; eval_period = 0 or train_eval_dataset_cfg = None "
                            "for no evaluation")
    examples = eval_steps * data.batch_size
    if data.pack:
        logging.warning("train_eval_dataset_cfg.pack: T5X evaluates %d packed rows (eval_steps "
                        "times the batch size), in which there are more examples than the first "
                        "%d of each task, which are evaluated here; raise eval_steps for more",
                        examples, examples)
    return examples


def _seed(random_seed: int | None) -> int:
    if random_seed is None:
        logging.info("no random_seed is given: it is 0, so that the run can be resumed exactly")
        return 0
    return random_seed


def _infer_eval(config: DatasetConfig, model: BaseTransformerModel,
                evaluator: seqio_names.Evaluator, train_data: OurDatasetConfig, period: int,
                task_modules: Sequence[str]) -> InferEval:
    """Returns what lets tasks judge; rows are as long as those of training where it is not said."""
    if config.task_feature_lengths is None:
        config = dataclasses.replace(config, task_feature_lengths=train_data.task_feature_lengths)
    data = config.ours(task_modules)
    return InferEval(data, period, evaluator.num_examples, (),
                     {"text": model.predict_batch_with_aux()}, data.batch_size)
