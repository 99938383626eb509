"""What happens between steps: evaluation, early stopping, profiles. Each says how often."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from absl import logging

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.training.state import TrainState
from vishwam_t5x.training.writers import read_records


@dataclasses.dataclass
class HookResult:
    """What a hook has to say.

    Attributes:
        metrics: numbers to log at this step.
        stop: why the run should end now, or None.
        seconds: time spent, taken out of the throughput window.
    """

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    stop: str | None = None
    seconds: float = 0.0


class Hook(Protocol):
    """Called after each step with the state that the step made."""

    def __call__(self, step: int, state: TrainState, last: bool) -> HookResult | None: ...

    def rewind(self, step: int) -> None:
        """Told when the run goes back to `step`: what came after is about to happen again."""


class Evaluator(Protocol):
    """Anything that scores parameters: training needs to know no more about evaluation."""

    def __call__(self, params: Any) -> Mapping[str, float]: ...


class EvaluateHook:
    """Runs an evaluator every `period` steps and at the end; metrics get a prefix."""

    def __init__(self, evaluator: Evaluator, period: int, early_stop: EarlyStop | None = None,
                 clock: Callable[[], float] = time.monotonic, prefix: str = "eval/") -> None:
        if period < 1:
            raise UserError("EVAL_PERIOD must be at least 1 step", got=period)
        self._evaluator, self._period, self._early_stop = evaluator, period, early_stop
        self._clock, self._prefix = clock, prefix

    def __call__(self, step: int, state: TrainState, last: bool) -> HookResult | None:
        if step % self._period and not last:
            return None
        # The step itself may still run: its time is not the evaluation's.
        jax.block_until_ready(state.params)
        start = self._clock()
        metrics = {f"{self._prefix}{name}": float(value)
                   for name, value in self._evaluator(state.params).items()}
        stop = self._early_stop.observe(step, metrics) if self._early_stop else None
        return HookResult(metrics, stop, self._clock() - start)

    def rewind(self, step: int) -> None:
        """See `Hook.rewind`."""
        if self._early_stop is not None:
            self._early_stop.rewind(step)


@dataclasses.dataclass
class EarlyStop:
    """Ends the run when a metric has not improved for `patience` evaluations.

    Attributes:
        metric: name of the metric, e.g. 'eval/loss'.
        patience: evaluations without improvement that are forgiven.
        mode: 'min' or 'max'.
        min_delta: smallest change that counts as an improvement.
    """

    metric: str = "eval/loss"
    patience: int = 5
    mode: str = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise UserError("mode of EarlyStop must be 'min' or 'max'", got=repr(self.mode))
        if self.patience < 1:
            raise UserError("patience of EarlyStop must be at least 1", got=self.patience)
        if not self.metric.startswith("eval/"):
            raise UserError("EarlyStop watches a metric of the evaluation", got=repr(self.metric),
                            fix=f"EarlyStop.metric = 'eval/{self.metric}'")
        self._seen: dict[int, float] = {}

    def replay(self, metrics_file: pathlib.Path, last_step: int) -> str | None:
        """Takes up again what a run observed up to `last_step`, so that a resume forgets nothing.

        Args:
            metrics_file: the run's `metrics.jsonl`.
            last_step: the step it resumes at.

        Returns:
            Why the run had ended already, or None.
        """
        for record in read_records(metrics_file):
            if self.metric in record and record["step"] <= last_step:
                self._seen[record["step"]] = float(record[self.metric])
        return self._verdict()

    def rewind(self, step: int) -> None:
        """Forgets what was observed after `step`."""
        self._seen = {seen: value for seen, value in self._seen.items() if seen <= step}

    def check_metric(self, names: Sequence[str]) -> None:
        """Refuses a metric that evaluation cannot give, before anything is trained.

        Args:
            names: what the evaluator gives, without 'eval/'.

        Raises:
            UserError: the metric is none of them.
        """
        one_of(self.metric, [f"eval/{name}" for name in names], "metric of EarlyStop")

    def observe(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Returns why to stop, or None."""
        if self.metric not in metrics:
            raise UserError("EarlyStop watches a metric that evaluation does not give",
                            got=self.metric, fix="one of: " + ", ".join(sorted(metrics)))
        self._seen[step] = metrics[self.metric]
        return self._verdict()

    def _verdict(self) -> str | None:
        best, waited = math.inf, 0
        for seen in self._seen.values():
            value = seen if self.mode == "min" else -seen
            # A value that is not a number improves nothing, and nothing must be worse than it.
            if value < best - self.min_delta:
                best, waited = value, 0
            else:
                waited += 1
        if waited < self.patience:
            return None
        return (f"{self.metric} has not improved for {waited} evaluations "
                f"(step {max(self._seen)})")


class ProfileHook:
    """Writes one profile of `num_steps` steps, starting after `first_step` or the step after it.

    To be closed: a run that ends inside the profile writes what there is of it.
    """

    def __init__(self, directory: str | pathlib.Path, first_step: int, num_steps: int) -> None:
        self._directory = str(directory)
        self._first, self._end = first_step, first_step + num_steps
        self._begun = self._running = False

    def __call__(self, step: int, state: TrainState, last: bool) -> HookResult | None:
        if not self._begun and step >= self._first and not last:
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(self._directory)
            self._begun = self._running = True
            self._end += step - self._first
        elif self._running and (step >= self._end or last):
            jax.block_until_ready(state.params)
            self.close()
        elif last and not self._begun:
            logging.warning("no profile: the run ends before step %d, where it was to begin; "
                            "lower train.profile_start", self._first)
        return None

    def rewind(self, step: int) -> None:
        """See `Hook.rewind`: one profile is enough."""

    def close(self) -> None:
        """Ends a profile under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("profile written to %s", self._directory)
