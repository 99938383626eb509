"""Train, resume or fine-tune a model.

usage: vishwam train --gin_file=FILE [--gin.NAME=VALUE ...]
                     [--coordinator_address=HOST:PORT --process_count=N --process_index=I]

The same command starts a run and resumes it: where MODEL_DIR holds checkpoints, training goes on
from the newest good one, with exactly the batches that an uninterrupted run would have seen.

MODEL_DIR gets config.gin, model-info.txt, metrics.jsonl, tensorboard/ and checkpoints/STEP/.
SIGTERM: saves and exits with 75; run the same command to go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from absl import logging

from vishwam_t5x import gin_config, gin_differences, screen
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core import distributed
from vishwam_t5x.core.errors import EXIT_OK, UserError
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.data import fit, source
from vishwam_t5x.objectives.denoisers import Objective
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism import show
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.training import compilation, hooks, same_data, setup
from vishwam_t5x.training.loop import Loop, LoopConfig
from vishwam_t5x.training.optimizers import Optimizer
from vishwam_t5x.training.run_dir import RunDir
from vishwam_t5x.training.signals import StopRequest
from vishwam_t5x.training.stability import CulpritBatches, StabilityConfig
from vishwam_t5x.training.state import StateFactory, TrainState
from vishwam_t5x.training.step import StepConfig
from vishwam_t5x.training.writers import JsonlWriter, TensorBoardWriter, TerminalWriter, Writers

FLAGS = ("coordinator_address", "process_count", "process_index")


class Trainable(Protocol):
    """A model that can be trained: a Flax module with `init`, `loss_sums` and a config."""

    config: Any

    def init(self, rngs: Any) -> Any: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


def train(model: Trainable, model_dir: str, objective: Objective,
          train_dataset_cfg: source.DatasetConfig, optimizer: Optimizer, total_steps: int,
          loss: LossConfig = LossConfig(),
          mesh: mesh_lib.MeshConfig | None = None,
          logical_axis_rules: LogicalAxisRules = LogicalAxisRules(),
          checkpoint_cfg: CheckpointConfig = CheckpointConfig(),
          initial_checkpoint_path: str | None = None,
          assignment_map: Sequence[tuple[str, str | None]] = (),
          fallback_to_scratch: bool = False,
          train_eval_dataset_cfg: source.DatasetConfig | None = None,
          eval_period: int = 1000, eval_examples: int | None = None,
          early_stop: hooks.EarlyStop | None = None,
          stats_period: int = 100, num_microbatches: int = 1,
          stability: StabilityConfig = StabilityConfig(), random_seed: int = 0,
          compilation_cache_dir: str | None = None, use_tensorboard: bool = True,
          profile_steps: int = 0, profile_start: int = 10) -> TrainState:
    """Trains a model from wherever MODEL_DIR is to `total_steps`.

    Args:
        model: what is trained.
        model_dir: where everything of the run is written.
        objective: turns clean examples into inputs and targets.
        train_dataset_cfg: what is trained on.
        optimizer: how parameters move.
        total_steps: length of the run in steps, resumed ones included.
        loss: z-loss, label smoothing, weights.
        mesh: devices along each axis; None: what suits the devices at hand.
        logical_axis_rules: which dimension is split over which mesh axis.
        checkpoint_cfg: when to save, what to keep.
        initial_checkpoint_path: parameters to start from where MODEL_DIR has no checkpoint yet.
        assignment_map: T5X's (pattern, name in the checkpoint) pairs for the initial checkpoint;
            None for the name leaves the parameter out.
        fallback_to_scratch: parameters that it lacks start afresh instead of being an error.
        train_eval_dataset_cfg: what the loss is evaluated on during training; None: nothing.
        eval_period: steps between evaluations.
        eval_examples: examples of each task per evaluation; None: all.
        early_stop: ends the run when evaluation no longer improves.
        stats_period: steps between metric records.
        num_microbatches: parts a batch is cut into to save memory.
        stability: what a bad step is and when to roll back.
        random_seed: of parameters and dropout.
        compilation_cache_dir: compiled programs kept across processes; None: a folder under the
            home directory; '': none.
        use_tensorboard: whether TensorBoard files are written too.
        profile_steps: steps to profile, written to MODEL_DIR/profile; 0 for none.
        profile_start: steps of this process before the profile begins, so that it shows no warm-up.

    Returns:
        The last state, which has been saved.

    Raises:
        UserError: the parts do not fit together.
        Preempted: asked to stop; the state has been saved.
    """
    for name, steps in (("profile_steps", profile_steps), ("profile_start", profile_start)):
        if steps < 0:
            raise UserError(f"train.{name} must be 0 steps or more", got=steps)
    if early_stop is not None and train_eval_dataset_cfg is None:
        raise UserError("early_stop needs an evaluation to watch",
                        fix="bind train.train_eval_dataset_cfg, or leave early_stop out")
    compilation.enable_compilation_cache(compilation_cache_dir)
    run_dir = RunDir.open(model_dir)
    with contextlib.ExitStack() as stack:
        stop = StopRequest().install()
        stack.callback(stop.restore)
        if distributed.is_primary():
            stack.enter_context(run_dir.held())
        saver_ready = setup.in_background(lambda: _checkpoints(run_dir, checkpoint_cfg))
        open_dataset = _dataset_opener(train_dataset_cfg, objective, model)
        devices = mesh_lib.make_mesh(mesh)
        logging.info("mesh: %s", mesh_lib.describe_mesh(devices))
        parts = setup.Parts(
            model, optimizer, devices, logical_axis_rules,
            StepConfig(num_microbatches, loss, stability, random_seed),
            source.batch_spec(train_dataset_cfg, objective))
        setup.check_modalities(model, objective, parts.spec)
        batch_shardings = parts.batch_shardings()
        factory = parts.factory()
        if distributed.is_primary():
            run_dir.write(run_dir.model_info, _model_info(factory, devices, logical_axis_rules))

        saver = saver_ready.result()
        stack.callback(saver.close)
        state_ready = setup.in_background(lambda: setup.first_state(
            factory, random_seed, lambda: saver.restore(factory.abstract),
            _initial_params(factory, initial_checkpoint_path, assignment_map,
                            fallback_to_scratch, random_seed)))
        step_ready = setup.in_background(lambda: parts.compile(factory, batch_shardings))
        state = state_ready.result()
        first_step = int(state.step)
        # A run that ended early stays ended: going on would learn what it was not to learn.
        if early_stop and (ended := early_stop.replay(run_dir.metrics, first_step)):
            logging.info("the run had ended at step %d: %s", first_step, ended)
            return state
        dataset = open_dataset()
        same_data.check(run_dir, dataset.examples, first_step > 0, distributed.is_primary())
        batches = stack.enter_context(dataset.prefetch(batch_shardings, state.data_position))
        writers = _writers(run_dir, first_step, total_steps, use_tensorboard)
        stack.callback(writers.close)
        each_step: list[hooks.Hook] = []
        if train_eval_dataset_cfg is not None:
            each_step.append(hooks.EvaluateHook(
                _evaluator(parts, objective, train_eval_dataset_cfg, eval_examples),
                eval_period, early_stop))
        if profile_steps:
            profile = hooks.ProfileHook(run_dir.profile, first_step + profile_start, profile_steps)
            each_step.append(profile)
            stack.callback(profile.close)
        loop = Loop(
            LoopConfig(total_steps, stats_period, stability), step_ready.result(), batches, saver,
            each_step, writers, CulpritBatches(run_dir.path), parts.throughput(),
            factory.abstract, setup.describe_metrics(optimizer), stop)
        logging.info("training from step %d to %d", first_step, total_steps)
        stop.wait_for_steps()
        return loop.run(state)


def _checkpoints(run_dir: RunDir, config: CheckpointConfig) -> Any:
    # Imported in a thread: orbax takes a second, during which the step is traced.
    from vishwam_t5x.checkpointing.manager import Checkpoints

    return Checkpoints(run_dir.checkpoints, config)


def _dataset_opener(config: source.DatasetConfig, objective: Objective, model: Trainable
                    ) -> Callable[[], source.Dataset]:
    """Begins to open the dataset and returns the function that waits for it.

    Writing a cache may take hours: where it is missing, that begins when the function is called,
    once everything else is known to be right, and in the main thread, where Ctrl-C ends it.
    """
    if config.use_cached and source.missing_tasks(config):
        return lambda: _dataset(config, objective, model)
    return setup.in_background(lambda: _dataset(config, objective, model)).result


def _dataset(config: source.DatasetConfig, objective: Objective, model: Trainable
             ) -> source.Dataset:
    if config.use_cached:
        dataset = source.open_dataset(config, objective)
        fit.check_model(dataset.examples.tasks, model.config,
                        getattr(objective, "vocabulary", None))
        return dataset
    # TensorFlow and SeqIO in the training process: what a live stream costs.
    screen.quiet_tensorflow()
    from vishwam_t5x.data.tf.live import open_live_dataset

    return open_live_dataset(config, objective)


def _initial_params(factory: StateFactory, path: str | None,
                    assignment_map: Sequence[tuple[str, str | None]], fallback_to_scratch: bool,
                    seed: int) -> Callable[[], Any] | None:
    if not path:
        return None

    def load() -> Any:
        from vishwam_t5x.checkpointing.restore import restore_params

        wanted = factory.abstract.params
        partial = fallback_to_scratch or any(name is None for _, name in assignment_map)
        if partial:
            wanted = factory.create(key_for(seed, "params")).params
        params, report = restore_params(path, wanted, assignment_map=tuple(assignment_map),
                                        allow_missing=fallback_to_scratch)
        logging.info("%s", report.table())
        return params

    return load


def _evaluator(parts: setup.Parts, objective: Objective, config: source.DatasetConfig,
               num_examples: int | None) -> hooks.Evaluator:
    from vishwam_t5x.evaluation.loss_evaluator import LossEvaluator

    return LossEvaluator(parts.model, parts.step.loss, objective, config, parts.mesh, parts.rules,
                         num_examples)


def _writers(run_dir: RunDir, first_step: int, total_steps: int, tensorboard: bool) -> Writers:
    if not distributed.is_primary():
        return Writers([])
    kinds: list[Any] = [JsonlWriter(run_dir.metrics, first_step),
                        TerminalWriter(total_steps, first_step)]
    if tensorboard:
        kinds.append(TensorBoardWriter(run_dir.tensorboard, first_step))
    return Writers(kinds)


def _model_info(factory: StateFactory, mesh: jax.sharding.Mesh, rules: LogicalAxisRules) -> str:
    return "\n".join(show.model_info(factory.boxed_params, mesh, rules)) + "\n"


def check_config(run_dir: RunDir, config: gin_config.ParsedConfig) -> None:
    """Compares the configuration with that of the run so far, and saves it.

    Raises:
        UserError: it changes the mathematics of a run that has begun.
    """
    if run_dir.config.exists() and run_dir.checkpoints.exists():
        for change in gin_differences.math_differences(
                run_dir.config.read_text(), config.text(), config.allowed):
            logging.warning("changed since the run began: %s%s", change,
                            f" ({change.reason})" if change.reason else "")
    if distributed.is_primary():
        run_dir.write(run_dir.config, config.text())


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam train ARGV` and returns the exit code."""
    config = gin_config.parse(argv, "train", flags=FLAGS)
    numbers = {name: _whole_number(name, config.flags.get(name)) for name in FLAGS[1:]}
    distributed.initialize(config.flags.get("coordinator_address"), numbers["process_count"],
                           numbers["process_index"])
    screen.show_messages()
    if "model_dir" in (given := config.arguments(train)):
        check_config(RunDir.open(given["model_dir"]), config)
    config.call(train)
    return EXIT_OK


def _whole_number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--{name} must be a whole number", got=repr(text)) from None
