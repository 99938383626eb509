"""When a step must not count: non-finite numbers and loss spikes.

The verdict on a step is taken on the device, from statistics that live in `TrainState`, so a
resumed run judges every batch exactly as the uninterrupted one did. The host only reads it, and
rolls back when several steps in a row were bad.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from flax import struct

from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """What counts as a bad step and what to do about it.

    Attributes:
        spike_sigmas: a loss this many standard deviations above its running mean is a spike and
            its update is skipped; None judges finiteness only.
        warmup_steps: good steps before spikes are judged.
        decay: per-step decay of the running mean and variance of the loss.
        min_sigma_fraction: floor of the standard deviation as a fraction of the mean, so that a
            very smooth run does not call noise a spike.
        rollback_after: bad steps in a row after which the run goes back to the last good
            checkpoint and steps over their batches; 0 never rolls back.
        max_rollbacks: rollbacks in one process before it gives up.
    """

    spike_sigmas: float | None = 10.0
    warmup_steps: int = 100
    decay: float = 0.98
    min_sigma_fraction: float = 0.05
    rollback_after: int = 3
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        if self.spike_sigmas is not None and self.spike_sigmas <= 0:
            raise UserError("spike_sigmas must be positive", got=self.spike_sigmas,
                            fix="use None to judge finiteness only")
        if not 0.0 < self.decay < 1.0:
            raise UserError("decay must lie between 0 and 1", got=self.decay)
        for name in ("warmup_steps", "rollback_after", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative", got=getattr(self, name))


@struct.dataclass
class StabilityState:
    """Running statistics of the loss; part of `TrainState`.

    Attributes:
        mean: float32 [], running mean of the loss over good steps.
        variance: float32 [], its running variance.
        good_steps: int32 [], updates applied.
        skipped_steps: int32 [], updates skipped for any reason since the run began.
        bad_in_a_row: int32 [], the current streak of non-finite or spiking losses; float16
            overflows that a smaller loss scale cures do not count.
    """

    mean: jax.Array
    variance: jax.Array
    good_steps: jax.Array
    skipped_steps: jax.Array
    bad_in_a_row: jax.Array

    @classmethod
    def create(cls) -> StabilityState:
        """Statistics of a run that has not begun."""
        # Five separate buffers: a shared one could not be donated twice.
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32),
                   jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(state: StabilityState, config: StabilityConfig, loss: jax.Array, finite: jax.Array,
          curable: jax.Array) -> tuple[jax.Array, StabilityState]:
    """Decides whether the step's update is applied.

    Args:
        state: statistics before the step.
        config: thresholds.
        loss: float32 [], the step's loss.
        finite: bool [], whether loss and gradients are finite.
        curable: bool [], whether a non-finite gradient is a float16 overflow that the next,
            smaller loss scale may cure.

    Returns:
        (apply, state): bool [] and the statistics after the step.
    """
    spike = jnp.zeros((), bool)
    if config.spike_sigmas is not None:
        floor = config.min_sigma_fraction * jnp.abs(state.mean)
        sigma = jnp.maximum(jnp.sqrt(state.variance), floor)
        spike = (state.good_steps >= config.warmup_steps) & (
            loss > state.mean + config.spike_sigmas * sigma)
    apply = finite & ~spike
    # The first loss starts the mean; a zero start would call the second a spike.
    decay = jnp.where(state.good_steps == 0, 0.0, config.decay)
    delta = loss - state.mean
    mean = state.mean + (1.0 - decay) * delta
    variance = decay * (state.variance + (1.0 - decay) * delta * delta)
    new = StabilityState(
        mean=jnp.where(apply, mean, state.mean),
        variance=jnp.where(apply, variance, state.variance),
        good_steps=state.good_steps + apply,
        skipped_steps=state.skipped_steps + ~apply,
        bad_in_a_row=jnp.where(apply, 0, jnp.where(finite | ~curable, state.bad_in_a_row + 1,
                                                   state.bad_in_a_row)))
    return apply, new


class CulpritBatches:
    """The batches that a rollback steps over, remembered in `MODEL_DIR/skipped_batches.jsonl`."""

    def __init__(self, model_dir: str | pathlib.Path, url: str | None = None,
                 share: Callable[[str], str] = lambda starts: starts) -> None:
        """Reads what is remembered.

        Args:
            model_dir: where the file is.
            url: of the bucket's folder that `model_dir` stands for, for messages.
            share: takes what this process has read and returns what process 0 has: all must step
                over the same batches.
        """
        self.shown = f"{url or model_dir}/skipped_batches.jsonl"
        self.path = pathlib.Path(model_dir) / "skipped_batches.jsonl"
        self._starts: set[tuple[int, tuple[int, ...]]] = set()
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                    self._starts.add((record["next_example"], tuple(record["carried"])))
                except (ValueError, KeyError) as error:
                    # A killed writer leaves at most its last line half-written.
                    logging.warning("%s: unreadable line ignored (%s)", self.path, error)
        self._starts = {(start, tuple(carried)) for start, carried in json.loads(
            share(json.dumps(sorted(self._starts))))}

    def __contains__(self, start: DataPosition) -> bool:
        return (start.next_example, start.carried) in self._starts

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: DataPosition, step: int, reason: str, example_ids: list[int],
            write: bool = True) -> None:
        """Marks the batch that starts at `start`; `write` is true on process 0 only."""
        if start in self:
            return
        self._starts.add((start.next_example, start.carried))
        if write:
            record = {"step": step, "reason": reason, "next_example": start.next_example,
                      "carried": list(start.carried), "example_ids": example_ids}
            with self.path.open("a") as out:
                out.write(json.dumps(record) + "\n")
