"""The loop: fetch a batch, take a step, look at the one before, let the hooks act.

It names no modality, model, task or cloud. The order of the calls is part of the contract; the
reason stands beside each line.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from absl import logging

from vishwam_t5x.core.batch import Batch, DataPosition
from vishwam_t5x.core.errors import Preempted, Resumable, UserError
from vishwam_t5x.training.hooks import Hook
from vishwam_t5x.training.ledger import Ledger
from vishwam_t5x.training.signals import StopRequest
from vishwam_t5x.training.stability import CulpritBatches, StabilityConfig
from vishwam_t5x.training.state import TrainState
from vishwam_t5x.training.throughput import StepWork, Throughput
from vishwam_t5x.training.writers import Writers


class DeviceBatch(Protocol):
    """One batch on the devices, where it begins and ends in the data, and what it holds."""

    arrays: Batch
    start: DataPosition
    end: DataPosition
    example_ids: Sequence[int]
    work: StepWork


class Batches(Protocol):
    """A stream of batches that can be moved to any position."""

    def __next__(self) -> DeviceBatch: ...

    def seek(self, position: DataPosition) -> None: ...

    def check_damage(self) -> None: ...


class Saver(Protocol):
    """Where checkpoints go."""

    def should_save(self, step: int) -> bool: ...

    seconds_held: float
    """How long the last `save` held the loop."""

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float] | None = None
             ) -> bool: ...

    def restore_before(self, abstract_state: TrainState, step: int) -> TrainState | None: ...

    def wait(self) -> bool: ...


class Diverged(RuntimeError):
    """The loss is bad, step after step, and going back did not help."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When the loop ends and how often it reports.

    Attributes:
        total_steps: steps of the whole run, resumed ones included.
        stats_period: steps between metric records.
        stability: what a bad step is and when to roll back.
        save_at_end: whether the last step is saved.
    """

    total_steps: int
    stats_period: int = 100
    stability: StabilityConfig = dataclasses.field(default_factory=StabilityConfig)
    save_at_end: bool = True

    def __post_init__(self) -> None:
        for name in ("total_steps", "stats_period"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1 step", got=getattr(self, name))


@dataclasses.dataclass
class _Taken:
    """A step that was dispatched, without its arrays: a batch on the devices must be let go."""

    step: int
    metrics: Any
    start: DataPosition
    end: DataPosition
    example_ids: Sequence[int]
    work: StepWork


class Loop:
    """Runs `step_fn` over `batches` until `total_steps`, a stop request, or a hook ends it."""

    def __init__(self, config: LoopConfig, step_fn: Callable[[TrainState, Batch], tuple],
                 batches: Batches, saver: Saver, hooks: Sequence[Hook], writers: Writers,
                 culprits: CulpritBatches, throughput: Throughput, abstract: TrainState,
                 describe: Callable[[Any, int], dict[str, float]],
                 stop: StopRequest | None = None, ledger: Ledger | None = None) -> None:
        """Everything the loop uses is handed in.

        Args:
            config: when to end, how often to report.
            step_fn: compiled (state, batch) -> (state, metrics); donates the state.
            batches: the data.
            saver: checkpoints.
            hooks: called after each step, in order.
            writers: where records go.
            culprits: batches to step over.
            throughput: counts what was done.
            abstract: shapes and shardings of the state, for going back to a checkpoint.
            describe: (host metrics, step) -> numbers to log.
            stop: stop requests.
            ledger: counts where the time goes.
        """
        self._config, self._step_fn, self._batches, self._saver = config, step_fn, batches, saver
        self._hooks, self._writers, self._culprits = hooks, writers, culprits
        self._throughput, self._abstract, self._describe = throughput, abstract, describe
        self._stop, self._ledger = stop or StopRequest(), ledger or Ledger()
        self._recent: collections.deque[_Taken] = collections.deque(maxlen=256)
        self._rollbacks, self._save_stall = 0, 0.0

    def run(self, state: TrainState) -> TrainState:
        """Trains from `state` to the end and returns the last state, saved.

        Raises:
            Preempted: asked to stop; the state has been saved.
            Resumable: the last state could not be saved.
            Diverged: rolled back as often as allowed.
        """
        previous: _Taken | None = None
        step, ended = int(state.step), None
        extra: dict[str, float] = {}
        self._ledger.enter("host")
        while step < self._config.total_steps and ended is None:
            with self._ledger.spend("data_wait"):
                batch = self._next_batch()
            # The state is donated: from here on only the new one exists.
            with self._ledger.spend("step"):
                state, metrics = self._step_fn(state.on_device(), batch.arrays)
            # Position and parameters travel together, so a save can never pair the wrong two.
            state = state.at(batch.end)
            step += 1
            self._writers.advance(step)
            # Look at the step before, never this one: the host must not wait for the device.
            if previous is not None:
                rolled_back = self._observe(previous)
                if rolled_back is not None:
                    state, step, previous = rolled_back, int(rolled_back.step), None
                    continue
            previous = _Taken(step, metrics, batch.start, batch.end, batch.example_ids, batch.work)
            self._recent.append(dataclasses.replace(previous, metrics=None))
            # Evaluate before saving, so that keep-best has the metric of this very step.
            with self._ledger.spend("eval"):
                extra, ended = self._call_hooks(step, state)
            saving = self._saver.should_save(step)
            # Agreed across processes; last, so that the step just made is what gets saved.
            stopping = self._stop.agreed(step)
            if saving or stopping:
                # A save waits for this step anyway. Looked at now, its record is written before
                # its checkpoint, and a state that is due to be rolled back is never saved.
                rolled_back, previous = self._observe(previous), None
                if rolled_back is not None:
                    state, step, extra, saving = rolled_back, int(rolled_back.step), {}, False
            if saving:
                with self._ledger.spend("save"):
                    self._saver.save(step, state, extra)
                self._save_stall += self._saver.seconds_held
            if stopping:
                self._finish(step, state, extra)
                raise Preempted(step, "asked to stop")
        if previous is not None:
            rolled_back = self._observe(previous)
            if rolled_back is not None:
                return self.run(rolled_back)
        if ended is not None:
            logging.info("training ends at step %d: %s", step, ended)
        self._finish(step, state, extra)
        return state

    def _finish(self, step: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        with self._ledger.spend("save"):
            if self._config.save_at_end:
                self._saver.save(step, state, metrics)
            saved = self._saver.wait()
        if not saved:
            raise Resumable(f"the last checkpoint, of step {step}, could not be written (see the "
                            "log above); the one before it is intact")

    def _next_batch(self) -> DeviceBatch:
        while True:
            batch = next(self._batches)
            if batch.start not in self._culprits:
                return batch
            logging.info("stepping over the batch at example %d, which made the loss bad",
                         batch.start.next_example)

    def _call_hooks(self, step: int, state: TrainState) -> tuple[dict[str, float], str | None]:
        extra: dict[str, float] = {}
        ended = None
        last = step >= self._config.total_steps
        for hook in self._hooks:
            result = hook(step, state, last)
            if result is None:
                continue
            extra.update(result.metrics)
            ended = ended or result.stop
            self._throughput.exclude(result.seconds)
        if extra:
            self._writers.write(step, extra)
        return extra, ended

    def _observe(self, taken: _Taken) -> TrainState | None:
        """Logs a finished step; returns an older state when it is time to go back."""
        self._throughput.add(taken.work)
        for damaged in taken.work.skipped:
            logging.warning("step %d: damaged record left out: %s", taken.step, damaged)
        with self._ledger.spend("step"):
            metrics = jax.device_get(taken.metrics)
        if taken.step % self._config.stats_period == 0 or taken.step == self._config.total_steps:
            # Exchanged between processes where all are at the same step: all stop, or none.
            with self._ledger.spend("step"):
                self._batches.check_damage()
            record = {**self._describe(metrics, taken.step), **self._throughput.report(),
                      **self._ledger.slowest(),
                      "next_example": taken.end.next_example,
                      # Two runs that saw the same examples at a step show the same number.
                      "examples_crc32": zlib.crc32(repr(taken.example_ids).encode()),
                      "carried": len(taken.end.carried),
                      "save_stall_seconds": self._save_stall}
            self._writers.write(taken.step, record)
            self._ledger.progress(taken.step)
            self._save_stall = 0.0
        if not bool(metrics["update_applied"]):
            logging.warning(
                "step %d: update skipped (loss %s, gradient norm %s); examples %s", taken.step,
                metrics["loss"], metrics["grad_norm"], _some(taken.example_ids))
        bad = int(metrics["bad_in_a_row"])
        limit = self._config.stability.rollback_after
        if not limit or bad < limit:
            return None
        return self._roll_back(taken, bad)

    def _roll_back(self, taken: _Taken, bad: int) -> TrainState | None:
        first_bad = taken.step - bad + 1
        self._rollbacks += 1
        if self._rollbacks > self._config.stability.max_rollbacks:
            raise Diverged(
                f"steps {first_bad} to {taken.step} were bad again after "
                f"{self._rollbacks - 1} rollbacks; the batches are listed in "
                f"{self._culprits.shown}")
        for culprit in self._recent:
            if first_bad <= culprit.step <= taken.step:
                self._culprits.add(culprit.start, culprit.step, "bad loss",
                                   list(map(int, culprit.example_ids)),
                                   write=jax.process_index() == 0)
        with self._ledger.spend("save"):  # reads and checks all of a checkpoint
            state = self._saver.restore_before(self._abstract, first_bad)
        if state is None:
            raise Diverged(
                f"steps {first_bad} to {taken.step} were bad and there is no earlier checkpoint "
                f"to go back to; the batches are listed in {self._culprits.shown}")
        logging.error(
            "steps %d to %d were bad: back to step %d, stepping over their batches (listed in %s)",
            first_bad, taken.step, int(state.step), self._culprits.shown)
        self._ledger.lost(taken.step - int(state.step), self._throughput.seconds_per_step)
        # The steps since then are about to be taken, evaluated and logged again.
        self._recent.clear()
        self._writers.rewind(int(state.step))
        for hook in self._hooks:
            hook.rewind(int(state.step))
        self._batches.seek(state.data_position)
        self._throughput.restart()
        return state


def _some(ids: Sequence[int], limit: int = 8) -> str:
    shown = ", ".join(map(str, ids[:limit]))
    return shown + (f", … ({len(ids)} in all)" if len(ids) > limit else "")


