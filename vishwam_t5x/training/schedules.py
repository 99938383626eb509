"""Learning rates as functions of the step: T5X's factor strings, and warm-up then cosine.

A schedule maps a step (int, or int32 [] under `jit`) to a float32 [] learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vishwam_t5x.core.errors import UserError, one_of

Schedule = Callable[[Any], Float[Array, ""]]

FACTORS = ("constant", "linear_warmup", "linear_decay", "rsqrt_decay", "rsqrt_normalized_decay",
           "decay_every", "cosine_decay")
"""Names a factor string may multiply: T5X's."""


def _positive(name: str, value: float, what: str) -> None:
    if not value > 0:
        raise UserError(f"{name} of a learning-rate schedule must be positive ({what})",
                        got=repr(value))


def create_learning_rate_scheduler(
        factors: str = "constant * linear_warmup * rsqrt_decay",
        base_learning_rate: float = 0.5,
        warmup_steps: int = 1000,
        decay_factor: float = 0.5,
        steps_per_decay: int = 20000,
        steps_per_cycle: int = 100000,
        step_offset: int = 0,
        min_learning_rate: float = 1e-8) -> Schedule:
    """Returns the product of named factors, as `t5x.utils.create_learning_rate_scheduler` does.

    - `constant`: base_learning_rate
    - `linear_warmup`: min(1, step / warmup_steps)
    - `linear_decay`: base_learning_rate * min(step / warmup_steps,
      1 - decay_factor * (step - warmup_steps)); it holds the base and the warm-up already
    - `rsqrt_decay`: 1 / sqrt(max(step, warmup_steps))
    - `rsqrt_normalized_decay`: sqrt(warmup_steps) / sqrt(max(step, warmup_steps))
    - `decay_every`: decay_factor ** (step // steps_per_decay)
    - `cosine_decay`: 1 down to 0 after warm-up, again every steps_per_cycle

    Args:
        factors: factor names joined by '*'.
        base_learning_rate: the constant, per update.
        warmup_steps: length of the warm-up, in steps.
        decay_factor: what `decay_every` multiplies by, or the slope per step of `linear_decay`.
        steps_per_decay: steps between decays of `decay_every`.
        steps_per_cycle: length of the cosine, in steps.
        step_offset: step taken as 0 (steps before it count as 0).
        min_learning_rate: least learning rate given.

    Raises:
        UserError: an unknown factor, a length that is not positive, a base counted twice.
    """
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        one_of(name, FACTORS, "learning-rate factor")
    if "linear_decay" in names and {"constant", "linear_warmup"} & set(names):
        raise UserError("'linear_decay' holds the base learning rate and the warm-up already",
                        got=factors, fix="use 'linear_decay' without constant and linear_warmup")
    _positive("base_learning_rate", base_learning_rate, "per update")
    _positive("warmup_steps", warmup_steps, "steps")
    _positive("steps_per_decay", steps_per_decay, "steps")
    _positive("steps_per_cycle", steps_per_cycle, "steps")

    def factor(name: str, step: Array) -> Any:
        if name == "constant":
            return base_learning_rate
        if name == "linear_warmup":
            return jnp.minimum(1.0, step / warmup_steps)
        if name == "linear_decay":
            return base_learning_rate * jnp.minimum(
                step / warmup_steps, 1.0 + decay_factor * (warmup_steps - step))
        if name == "rsqrt_decay":
            return 1.0 / jnp.sqrt(jnp.maximum(step, float(warmup_steps)))
        if name == "rsqrt_normalized_decay":
            return jnp.sqrt(float(warmup_steps)) / jnp.sqrt(jnp.maximum(step, float(warmup_steps)))
        if name == "decay_every":
            return decay_factor ** (step // steps_per_decay)
        assert name == "cosine_decay", name
        progress = jnp.maximum(0.0, (step - warmup_steps) / float(steps_per_cycle))
        return jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * (progress % 1.0))))

    def schedule(step: Any) -> Float[Array, ""]:
        step = jnp.maximum(0, jnp.asarray(step) - step_offset)
        rate: Any = 1.0
        for name in names:
            rate = rate * factor(name, step)
        return jnp.asarray(jnp.maximum(rate, min_learning_rate), jnp.float32)

    return schedule


def warmup_cosine(base_learning_rate: float = 1e-3, warmup_steps: int = 100,
                  total_steps: int = 1000, end_factor: float = 0.0,
                  step_offset: int = 0) -> Schedule:
    """Returns a linear warm-up to the peak, then half a cosine down to `end_factor` of it.

    The first update (step 0) already learns: the warm-up reaches the peak with the
    `warmup_steps`-th update. SGDR's cosine (Loshchilov & Hutter 2017), one cycle.

    Args:
        base_learning_rate: the peak.
        warmup_steps: updates until the peak; 0: none.
        total_steps: step at which the end is reached, warm-up included.
        end_factor: learning rate at the end over the peak, in [0, 1].
        step_offset: step taken as 0.

    Raises:
        UserError: a value out of its range, or a warm-up longer than the run.
    """
    _positive("base_learning_rate", base_learning_rate, "per update")
    if warmup_steps < 0 or total_steps <= warmup_steps:
        raise UserError("the warm-up must be shorter than the run",
                        got=f"warmup_steps={warmup_steps}, total_steps={total_steps}",
                        fix="lower warmup_steps or raise TRAIN_STEPS")
    if not 0 <= end_factor <= 1:
        raise UserError("end_factor must be in [0, 1]", got=repr(end_factor))

    def schedule(step: Any) -> Float[Array, ""]:
        step = jnp.maximum(0, jnp.asarray(step) - step_offset)
        warm = jnp.minimum(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        share = end_factor + (1.0 - end_factor) * cosine
        return jnp.asarray(base_learning_rate * warm * share, jnp.float32)

    return schedule


def constant(learning_rate: float = 1e-3) -> Schedule:
    """Returns a learning rate that never changes."""
    _positive("learning_rate", learning_rate, "per update")
    return lambda step: jnp.full((), learning_rate, jnp.float32)
