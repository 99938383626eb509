"""Train, resume or fine-tune a model.

usage: vishwam train --gin_file=FILE [--gin.NAME=VALUE ...]
                     [--coordinator_address=HOST:PORT --process_count=N --process_index=I]
                     [--roll_call_seconds=S]

The same command starts a run and resumes it: where MODEL_DIR holds checkpoints, training goes on
from the newest good one, with exactly the batches that an uninterrupted run would have seen.

MODEL_DIR gets config.gin, model-info.txt, metrics.jsonl, ledger.jsonl, tensorboard/ and
checkpoints/STEP/. SIGTERM: saves and exits with 75; run the same command to go on.

On several hosts run the same command on each: Cloud TPU, GKE, Slurm and Open MPI are detected,
elsewhere give the address of process 0, how many processes there are, and each its number. Hosts
that do not come within --roll_call_seconds (300) are named. One that dies, or hangs, makes the
others write what they were doing and exit with 76; run the same command to go on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from absl import logging

from vishwam_t5x import gin_config, gin_differences, joining, screen, task_lookup
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core import distributed, storage
from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import EXIT_OK, UserError
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.data import fit, source
from vishwam_t5x.evaluation.loss_evaluator import LossEvaluator
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.objectives.objective import Objective
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism import show
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.training import beginning, compilation, elastic, hooks, same_data, setup
from vishwam_t5x.training.ledger import Ledger
from vishwam_t5x.training.loop import Loop, LoopConfig
from vishwam_t5x.training.optimizers import Optimizer
from vishwam_t5x.training.run_dir import RunDir
from vishwam_t5x.training.signals import StopRequest
from vishwam_t5x.training.stability import StabilityConfig
from vishwam_t5x.training.state import StateFactory, TrainState
from vishwam_t5x.training.step import StepConfig
from vishwam_t5x.training.watchdog import Watchdog, WatchdogConfig
from vishwam_t5x.training.writers import (
    JsonlWriter,
    TensorBoardWriter,
    TerminalWriter,
    Writers,
)

FLAGS = joining.FLAGS
_CACHE_FILLED = 24 * 3600.0  # seconds that a process waits for the slowest to have its data


class Trainable(Protocol):
    """A model that can be trained: a Flax module with `init`, `loss_sums` and a config."""

    config: Any

    def init(self, rngs: Any) -> Any: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


class InLoop(Protocol):
    """What looks at a model between its steps: `InferEval`, `Reconstructions`."""

    def hook(self, parts: setup.Parts, objective: Any) -> hooks.EvaluateHook: ...


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
          early_stop: hooks.EarlyStop | None = None, infer_eval: InLoop | None = None,
          stats_period: int = 100, num_microbatches: int = 1,
          max_rows_per_device: int | None = None, watchdog: WatchdogConfig = WatchdogConfig(),
          stability: StabilityConfig = StabilityConfig(), random_seed: int = 0,
          compilation_cache_dir: str | None = None, use_tensorboard: bool = True,
          profile_steps: int = 0, profile_start: int = 10,
          check_run: Callable[[RunDir], object] | None = None) -> TrainState:
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
        infer_eval: lets the model answer, and the tasks judge, during training, or shows what a
            codec makes of pictures; None: no.
        stats_period: steps between metric records.
        num_microbatches: parts a batch is cut into to save memory.
        max_rows_per_device: rows that a device may hold at a time: on fewer devices the batch is
            cut into more microbatches; None: num_microbatches says.
        watchdog: how long a step may take and another process be silent.
        stability: what a bad step is and when to roll back.
        random_seed: of parameters and dropout.
        compilation_cache_dir: compiled programs kept across processes; None: a folder under the
            home directory; '': none.
        use_tensorboard: whether TensorBoard files are written too.
        profile_steps: steps to profile, written to MODEL_DIR/profile; 0 for none.
        profile_start: steps of this process before the profile begins, so that it shows no warm-up.
        check_run: called in process 0 once it holds MODEL_DIR, before anything is done there.

    Returns:
        The last state, which has been saved.

    Raises:
        UserError: the parts do not fit together.
        Preempted: asked to stop; the state has been saved.
    """
    _check(profile_steps, profile_start, early_stop, train_eval_dataset_cfg)
    patience = watchdog.phase_seconds or _CACHE_FILLED
    cut_into = elastic.microbatches(num_microbatches, train_dataset_cfg.batch_size,
                                    max_rows_per_device)
    compilation.enable_compilation_cache(compilation_cache_dir)
    run_dir = beginning.opened(model_dir)
    with contextlib.closing(run_dir), contextlib.ExitStack() as stack:
        stop = StopRequest().install()
        stack.callback(stop.restore)
        ledger = Ledger(run_dir.ledger if distributed.is_primary() else None)
        stack.enter_context(Watchdog(watchdog, ledger))
        beginning.hold(stack, run_dir, watchdog.held_seconds, check_run)
        saver_ready = setup.in_background(lambda: _checkpoints(run_dir, checkpoint_cfg))
        filling, open_dataset = _dataset_opener(train_dataset_cfg, objective, model,
                                                lambda: step_ready)
        devices = mesh_lib.make_mesh(mesh)
        logging.info("mesh: %s", mesh_lib.describe_mesh(devices))
        parts = setup.Parts(
            model, optimizer, devices, logical_axis_rules,
            StepConfig(cut_into(devices, logical_axis_rules), loss, stability, random_seed),
            _known_spec(train_dataset_cfg, objective, model))
        setup.check_modalities(model, objective, parts.spec)
        factory, batch_shardings = parts.factory(), parts.batch_shardings()
        _write_model_info(run_dir, factory, devices, logical_axis_rules)
        saver = saver_ready.result()
        stack.callback(saver.close)
        state_ready = setup.in_background(lambda: setup.first_state(
            factory, random_seed, lambda: saver.restore(factory.abstract),
            _initial_params(model, factory, initial_checkpoint_path, assignment_map,
                            fallback_to_scratch, random_seed)))
        # Meanwhile, unless there seems to be no step to take.
        step_ready = setup.in_background(lambda: None if (saver.latest_step() or 0) >= total_steps
                                         else parts.compile(factory, batch_shardings))
        state = state_ready.result()
        first_step = beginning.begin(ledger, run_dir, state, parts)
        if beginning.is_over(run_dir, first_step, total_steps, early_stop):
            return state
        dataset = _opened_by_all(open_dataset, filling, ledger, patience)
        _check_vocabulary(dataset.examples, initial_checkpoint_path if first_step == 0 else None)
        beginning.check_examples(run_dir, dataset.examples, first_step)
        batches = stack.enter_context(dataset.prefetch(batch_shardings, state.data_position))
        writers = _writers(stack, run_dir, first_step, total_steps, use_tensorboard)
        each_step = _evaluations(parts, objective, train_eval_dataset_cfg, eval_examples,
                                 eval_period, early_stop, infer_eval, step_ready)
        if profile_steps:
            each_step.append(_profile(stack, run_dir, first_step + profile_start, profile_steps))
        ledger.enter("compile")
        step_fn = _step_for(dataset.spec, parts, step_ready, factory, batch_shardings)
        distributed.barrier("first step", patience)  # a collective waits far less long
        loop = Loop(
            LoopConfig(total_steps, stats_period, stability), step_fn, batches, saver,
            each_step, writers, beginning.culprits(run_dir), parts.throughput(), factory.abstract,
            setup.describe_metrics(optimizer), stop, ledger)
        logging.info("training from step %d to %d", first_step, total_steps)
        stop.wait_for_steps()
        state = loop.run(state)
        distributed.barrier("end of the run")  # nobody leaves while another may need it
        return state


def _check(profile_steps: int, profile_start: int, early_stop: hooks.EarlyStop | None,
           evaluated: source.DatasetConfig | None) -> None:
    for name, steps in (("profile_steps", profile_steps), ("profile_start", profile_start)):
        if steps < 0:
            raise UserError(f"train.{name} must be 0 steps or more", got=steps)
    if early_stop is not None and evaluated is None:
        raise UserError("early_stop needs an evaluation to watch",
                        fix="bind train.train_eval_dataset_cfg, or leave early_stop out")


def _checkpoints(run_dir: RunDir, config: CheckpointConfig) -> Any:
    # Imported in a thread: orbax takes a second, during which the step is traced.
    from vishwam_t5x.checkpointing.manager import Checkpoints

    return Checkpoints(run_dir.checkpoints, config, before_commit=run_dir.keep)


def _dataset_opener(config: source.DatasetConfig, objective: Objective, model: Trainable,
                    step_ready: Callable[[], concurrent.futures.Future]
                    ) -> tuple[bool, Callable[[], source.Dataset]]:
    """Begins to open the dataset; returns whether a cache is missing, and what waits for it all.

    Writing a cache may take hours: where it is missing, that begins when the function is called,
    once everything else is known to be right, and in the main thread, where Ctrl-C ends it.
    """
    if config.use_cached and not source.missing_tasks(config):
        return False, setup.in_background(lambda: _dataset(config, objective, model)).result

    def with_tensorflow() -> source.Dataset:
        _wait_to_import_tensorflow(step_ready())
        return _dataset(config, objective, model)

    return config.use_cached, with_tensorflow


def _wait_to_import_tensorflow(step_ready: concurrent.futures.Future) -> None:
    # Its import replaces `__import__` for moments (etils' lazy_imports), in which another thread
    # that traces, and so imports parts of jax, gets modules that are none.
    if (error := step_ready.exception()) is not None:
        raise error  # before a cache is written, which may take hours


def _opened_by_all(open_dataset: Callable[[], source.Dataset], filling: bool, ledger: Ledger,
                   seconds: float) -> source.Dataset:
    """Waits for the dataset of every process, and that all have the same examples.

    Args:
        open_dataset: waits for that of this one.
        filling: whether that writes a cache, for which there is no limit.
        ledger: of the run.
        seconds: how long to wait otherwise.

    Raises:
        UserError: on every process, what is the matter on one of them.
    """
    opened: list[source.Dataset] = []
    filling = distributed.any_process(filling, "missing caches")
    with ledger.spend("cache" if filling else ledger.phase):
        distributed.refuse_together("data", lambda: opened.append(open_dataset()),
                                    _CACHE_FILLED if filling else seconds)
    distributed.compare(
        "the data", {"data": json.dumps(same_data.order(opened[0].examples), indent=1)},
        fix="give every host the same cache (a shared cache_dir, or a copy of it)")
    return opened[0]


def _known_spec(config: source.DatasetConfig, objective: Objective, model: Trainable) -> BatchSpec:
    return source.batch_spec(config, objective, _known_features(config), model.config)


def _known_features(config: source.DatasetConfig) -> source.TaskFeatures:
    """What all processes have caches of: those that compile together must compile the same."""
    found = source.cached_features(config)
    return {} if distributed.any_process(not found, "features of the caches") else found


def _step_for(spec: BatchSpec, parts: setup.Parts, ready: concurrent.futures.Future,
              factory: StateFactory, shardings: Mapping[str, Any]) -> Any:
    """The step compiled already, unless none is or the data turned out to be bytes."""
    compiled = ready.result()
    if compiled is None or spec != parts.spec:  # a cache just written, or a live stream
        return dataclasses.replace(parts, spec=spec).compile(factory, shardings)
    return compiled


def _dataset(config: source.DatasetConfig, objective: Objective, model: Trainable
             ) -> source.Dataset:
    if config.use_cached:
        dataset = source.open_dataset(config, objective, model=model.config)
        fit.check_model(dataset.examples.tasks, model.config,
                        getattr(objective, "vocabulary", None))
        return dataset
    # TensorFlow and SeqIO in the training process: what a live stream costs.
    screen.quiet_tensorflow()
    from vishwam_t5x.data.tf.live import open_live_dataset

    return open_live_dataset(config, objective, model.config)


def _initial_params(model: Trainable, factory: StateFactory, path: str | None,
                    assignment_map: Sequence[tuple[str, str | None]], fallback_to_scratch: bool,
                    seed: int) -> Callable[[], Any]:
    def load() -> Any:
        if not path:
            setup.check_given(model, getattr(model.config, "frozen_prefixes", ()))
            return None
        from vishwam_t5x.checkpointing.restore import restore_params

        wanted = factory.abstract.params
        partial = fallback_to_scratch or any(name is None for _, name in assignment_map)
        if partial:
            wanted = factory.create(key_for(seed, "params")).params
        params, report = restore_params(path, wanted, assignment_map=tuple(assignment_map),
                                        allow_missing=fallback_to_scratch)
        logging.info("%s", report.table())
        setup.check_given(model, (*report.missing, *report.dropped))
        return params

    return load


def _check_vocabulary(examples: Any, checkpoint: str | None) -> None:
    if checkpoint:
        distributed.refuse_together("vocabulary", lambda: task_lookup.check_vocabulary(
            getattr(examples, "tasks", ()), checkpoint))


def _evaluations(parts: setup.Parts, objective: Objective, config: source.DatasetConfig | None,
                 num_examples: int | None, period: int, early_stop: hooks.EarlyStop | None,
                 infer_eval: InLoop | None, step_ready: concurrent.futures.Future
                 ) -> list[hooks.Hook]:
    found: list[hooks.Hook] = []
    if config is not None:
        evaluator = LossEvaluator(parts.model, parts.step.loss, objective, config, parts.mesh,
                                  parts.rules, num_examples)
        if early_stop is not None:
            early_stop.check_metric(evaluator.metric_names())
        found.append(hooks.EvaluateHook(evaluator, period, early_stop))
    if infer_eval is not None:
        _wait_to_import_tensorflow(step_ready)
        distributed.refuse_together(
            "evaluation in the loop",
            lambda: found.append(infer_eval.hook(parts, objective)), _CACHE_FILLED)
    return found


def _profile(stack: contextlib.ExitStack, run_dir: RunDir, first: int, steps: int) -> hooks.Hook:
    return stack.enter_context(contextlib.closing(hooks.ProfileHook(run_dir.profile, first, steps)))


def _writers(stack: contextlib.ExitStack, run_dir: RunDir, first_step: int, total_steps: int,
             tensorboard: bool) -> Writers:
    if not distributed.is_primary():
        return Writers([])
    kinds: list[Any] = [JsonlWriter(run_dir.metrics, first_step),
                        TerminalWriter(total_steps, first_step)]
    if tensorboard:
        kinds.append(TensorBoardWriter(run_dir.tensorboard, first_step))
    writers = Writers(kinds)
    stack.callback(writers.close)
    return writers


def _write_model_info(run_dir: RunDir, factory: StateFactory, mesh: jax.sharding.Mesh,
                      rules: LogicalAxisRules) -> None:
    if distributed.is_primary():
        lines = show.model_info(factory.boxed_params, mesh, rules)
        run_dir.write(run_dir.model_info, "\n".join(lines) + "\n")


def check_config(run_dir: RunDir, config: gin_config.ParsedConfig) -> None:
    """Compares the configuration with that of the run so far, and saves it.

    Raises:
        UserError: it changes the mathematics of a run that has begun.
    """
    if run_dir.config.exists() and storage.exists(run_dir.checkpoints):
        for change in gin_differences.math_differences(
                run_dir.config.read_text(), config.text(), config.allowed):
            logging.warning("changed since the run began: %s%s", change,
                            f" ({change.reason})" if change.reason else "")
    run_dir.write(run_dir.config, config.text())


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam train ARGV` and returns the exit code."""
    config = gin_config.parse(argv, "train", flags=FLAGS)
    screen.show_messages()
    joining.join(config)
    config.call(train, check_run=lambda run_dir: check_config(run_dir, config))
    return EXIT_OK
