"""When to save, and which checkpoints to keep: pure functions of steps, seconds and metrics.

Nothing here reads a clock or a disk; `manager.py` does, and tests hand in their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

from vishwam_t5x.core.errors import UserError, one_of


class SavePolicy(Protocol):
    """Says after which steps a checkpoint is due."""

    @property
    def by_clock(self) -> bool:
        """Whether time matters; if so, the processes of a run must agree on it."""

    def due(self, step: int, last_step: int, elapsed: float | None) -> bool:
        """Returns whether a checkpoint is due now.

        Args:
            step: steps done.
            last_step: step of the last save, or the step the run began at.
            elapsed: seconds since then; None where the time is not asked at this step.
        """


@dataclasses.dataclass(frozen=True)
class EverySteps:
    """Saves at every multiple of `steps`, at the next step if one was missed.

    Attributes:
        steps: the period, in training steps.
    """

    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise UserError("the save period must be a positive whole number of steps",
                            got=repr(self.steps), fix="SAVE_PERIOD = 1000")

    by_clock = False

    def due(self, step: int, last_step: int, elapsed: float | None) -> bool:
        """See `SavePolicy.due`."""
        return step // self.steps > last_step // self.steps


@dataclasses.dataclass(frozen=True)
class AtSteps:
    """Saves at the steps listed.

    Attributes:
        steps: training steps, in any order.
    """

    steps: tuple[int, ...]

    by_clock = False

    def due(self, step: int, last_step: int, elapsed: float | None) -> bool:
        """See `SavePolicy.due`."""
        return any(last_step < at <= step for at in self.steps)


@dataclasses.dataclass(frozen=True)
class EveryMinutes:
    """Saves when this much time has passed since the last save.

    Attributes:
        minutes: the period, in minutes.
    """

    minutes: float

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise UserError("the save period must be positive", got=f"{self.minutes} minutes")

    by_clock = True

    def due(self, step: int, last_step: int, elapsed: float | None) -> bool:
        """See `SavePolicy.due`."""
        return elapsed is not None and elapsed >= 60.0 * self.minutes and step > last_step


class AnyOf:
    """Saves when any of several policies says so; with none, never."""

    def __init__(self, *policies: SavePolicy) -> None:
        self.policies = policies

    @property
    def by_clock(self) -> bool:
        """See `SavePolicy.by_clock`."""
        return any(policy.by_clock for policy in self.policies)

    def due(self, step: int, last_step: int, elapsed: float | None) -> bool:
        """See `SavePolicy.due`."""
        return any(policy.due(step, last_step, elapsed) for policy in self.policies)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay on disk; the newest always does, and one with a file PINNED in it.

    Attributes:
        last: how many of the newest to keep; None: all.
        best_metric: name of the metric, as given to `save`, whose best checkpoints are kept too.
        best_mode: 'min' or 'max', what is best.
        best: how many of the best to keep.
        every_steps: checkpoints at multiples of this many steps are kept for ever.
    """

    last: int | None = 3
    best_metric: str | None = None
    best_mode: str = "min"
    best: int = 1
    every_steps: int | None = None

    def __post_init__(self) -> None:
        one_of(self.best_mode, ("min", "max"), "best_mode of checkpoints to keep")
        for name, least in (("last", 1), ("best", 1), ("every_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"'{name}' of checkpoints to keep must be at least {least}",
                                got=value)

    def kept(self, checkpoints: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Returns the steps to keep.

        Args:
            checkpoints: {step: metrics given when it was saved}.
        """
        steps = sorted(checkpoints)
        if self.last is None:
            return set(steps)
        kept = set(steps[-self.last:])
        if self.every_steps is not None:
            kept.update(step for step in steps if step % self.every_steps == 0)
        return kept | set(self._ranked(checkpoints)[:self.best])

    def best_of(self, checkpoints: Mapping[int, Mapping[str, float]]) -> int | None:
        """Returns the step of the best by the metric; None if none has it or none is asked for."""
        return next(iter(self._ranked(checkpoints)), None)

    def _ranked(self, checkpoints: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Steps that have the metric from best to worst, of equals the newest first."""
        if self.best_metric is None:
            return []
        sign = 1.0 if self.best_mode == "min" else -1.0
        scores = {step: sign * metrics.get(self.best_metric, math.nan)
                  for step, metrics in checkpoints.items()}
        finite = [step for step, score in scores.items() if math.isfinite(score)]
        return sorted(finite, key=lambda step: (scores[step], -step))


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
        period: save at every multiple of this many steps; None: not by steps.
        minutes: save when this many minutes have passed since the last save; None: not by time.
        steps: further steps to save at.
        keep: how many of the newest to keep; None: all.
        keep_best_metric: keep the best by this metric of the evaluation too, e.g. 'eval/loss'.
        keep_best_mode: 'min' or 'max', which values of the metric are best.
        keep_best: how many of the best to keep.
        keep_every_steps: keep those at multiples of this many steps for ever.
        verify: on restore compare the checksum of every file with what was written (reads every
            byte twice); False: only whether all files are there in their full size.
        compress: zstd on what is written: some 8 % smaller, four times the CPU time.
        local_folder: on a local disk of every host; saved there too, more often, and restored from
            if newer and there on every host of as many; None: nowhere. What is there of a run is
            deleted when the run ends with all saved, or after a week in which no run touches it.
        local_period: steps between these saves.
    """

    period: int | None = 1000
    minutes: float | None = None
    steps: tuple[int, ...] = ()
    keep: int | None = 3
    keep_best_metric: str | None = None
    keep_best_mode: str = "min"
    keep_best: int = 1
    keep_every_steps: int | None = None
    verify: bool = True
    compress: bool = False
    local_folder: str | None = None
    local_period: int = 100

    def __post_init__(self) -> None:
        self.policy()
        self.retention()
        if self.local_period < 1:
            raise UserError("local_period must be at least 1 step", got=self.local_period)
        if "://" in (self.local_folder or ""):
            raise UserError("local_folder must be on a disk of the host", got=self.local_folder)

    def policy(self) -> SavePolicy:
        """Returns when to save."""
        policies: list[SavePolicy] = []
        if self.period is not None:
            policies.append(EverySteps(self.period))
        if self.minutes is not None:
            policies.append(EveryMinutes(self.minutes))
        if self.steps:
            policies.append(AtSteps(tuple(self.steps)))
        return AnyOf(*policies)

    def retention(self) -> Retention:
        """Returns which to keep."""
        return Retention(self.keep, self.keep_best_metric, self.keep_best_mode, self.keep_best,
                         self.keep_every_steps)
