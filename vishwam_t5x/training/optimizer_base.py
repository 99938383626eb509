"""What every optimizer has: a schedule, an optax transformation, and what it leaves alone."""

from __future__ import annotations

import abc
import dataclasses
import math
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names, unflatten_names

LogicalAxes = Callable[[], Mapping[str, Sequence[str | None]]]
"""Returns {'/'-joined parameter name: logical axis names}; asked only by who needs them."""

NO_DECAY = (r"(^|/)scale$", r"(^|/)bias$", r"embedding$")
"""Parameters whose weights do not decay unless asked: norm scales, biases, embedding tables."""


def decay_mask(no_decay: Sequence[str] = NO_DECAY) -> Callable[[str], bool]:
    """Returns the function that tells by '/'-joined name whether a parameter's weights decay.

    Args:
        no_decay: regular expressions, searched in the name, of those that do not.

    Raises:
        UserError: a pattern is not a regular expression.
    """
    compiled = []
    for pattern in no_decay:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError("a pattern of `no_decay` is not a regular expression",
                            got=repr(pattern), fix=str(error)) from error
    return lambda name: not any(pattern.search(name) for pattern in compiled)


def tree_mask(decays: Callable[[str], bool]) -> Callable[[Any], Any]:
    """Returns optax's form of `decays`: parameters to a tree of booleans."""
    def mask(params: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(params),
                                  [decays(name) for name in flatten_names(params)])

    return mask


def plain(value: Any) -> Any:
    """Returns Python's number for one of NumPy's or jax's, also for an array without axes.

    Arithmetic with it keeps the dtype of bfloat16 moments, as with any number of Python's.

    Args:
        value: anything else is returned as it is.
    """
    if not isinstance(value, np.generic | np.ndarray | jax.Array) or value.ndim or isinstance(
            value, jax.core.Tracer):
        return value
    return float(value) if jnp.issubdtype(value.dtype, jnp.floating) else value.item()


def check_range(what: str, value: Any, least: float, most: float = math.inf, *,
                above: bool = False, below: bool = True, fix: str | None = None) -> None:
    """Refuses a setting that is no number, not finite, or out of its range.

    Args:
        what: the setting, e.g. 'AdamW: eps'.
        value: what it is set to; a number of Python's, NumPy's or jax's.
        least: smallest value.
        most: largest.
        above: whether it must be above `least`.
        below: whether it must be below `most`.
        fix: a value that will do, in words.

    Raises:
        UserError: it is.
    """
    number = plain(value)
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if real and abs(number) <= sys.float_info.max and (
            number > least if above else number >= least) and (
            number < most if below else number <= most):
        return
    first = f"above {least:g}" if above else f"at least {least:g}"
    last = "" if math.isinf(most) else f" and {'below' if below else 'at most'} {most:g}"
    raise UserError(f"{what} must be a number, {first}{last}", got=repr(value), fix=fix)


class Optimizer(abc.ABC):
    """What a training run asks of an optimizer's config."""

    @abc.abstractmethod
    def schedule(self, step: Any) -> Float[Array, ""]:
        """Returns the learning rate of the update that follows `step` updates, float32 []."""

    @abc.abstractmethod
    def build(self, logical_axes: LogicalAxes | None = None) -> optax.GradientTransformation:
        """Returns the optax transformation.

        Args:
            logical_axes: of the parameters; only Adafactor's `logical_factor_rules` need them.
        """

    def frozen(self, name: str) -> bool:
        """Whether the parameter of this name is left as it is, without state or gradient."""
        return False

    def sparing(self, prefixes: tuple[str, ...]) -> Optimizer:
        """Returns the optimizer without the parameters whose '/'-joined names begin so."""
        return Sparing(self, prefixes) if prefixes else self


@dataclasses.dataclass(frozen=True)
class Sparing(Optimizer):
    """An optimizer that never sees some parameters: no state, no gradient, no part in a norm.

    Its state is that which the optimizer would have if they were not there.

    Attributes:
        inner: what trains the others.
        prefixes: what the '/'-joined names of those parameters begin with.
    """

    inner: Optimizer
    prefixes: tuple[str, ...]

    def schedule(self, step: Any) -> Float[Array, ""]:
        return self.inner.schedule(step)

    def frozen(self, name: str) -> bool:
        return name.startswith(self.prefixes) or self.inner.frozen(name)

    def build(self, logical_axes: LogicalAxes | None = None) -> optax.GradientTransformation:
        """Returns the transformation: `init` takes all parameters, `update` those that are left."""
        rule = self.inner.build(logical_axes)

        def init(params: Any) -> Any:
            return rule.init(unflatten_names({
                name: leaf for name, leaf in flatten_names(params).items()
                if not name.startswith(self.prefixes)}))

        return optax.GradientTransformation(init, rule.update)


@dataclasses.dataclass(frozen=True)
class SingleOptimizer(Optimizer):
    """What all optimizers share that treat all parameters alike.

    Attributes:
        learning_rate: per update: a number, or a schedule (function of the step).
        global_norm_clip: gradients are scaled down to this global norm first (T5X's
            `global_norm_clip_threshold`); None: never.
        no_decay: regular expressions of parameters ('/'-joined names) whose weights do not decay.
    """

    learning_rate: float | Callable[[Any], Any] = 1e-3
    global_norm_clip: float | None = None
    no_decay: Sequence[str] = NO_DECAY

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if not callable(self.learning_rate):
            check_range("learning_rate, where it is no schedule,", self.learning_rate, 0.0,
                        above=True, fix="learning_rate = 1e-3, say; OptimizerGroups freeze "
                                        "parameters")
        if self.global_norm_clip is not None:
            check_range("global_norm_clip", self.global_norm_clip, 0.0, above=True,
                        fix="global_norm_clip = 1.0, or None for no clipping")
        if isinstance(self.no_decay, str):
            raise UserError("no_decay must be a list of regular expressions",
                            got=repr(self.no_decay), fix=f"no_decay = ({self.no_decay!r},)")
        decay_mask(self.no_decay)

    def schedule(self, step: Any) -> Float[Array, ""]:
        rate = self.learning_rate
        return jnp.asarray(rate(step) if callable(rate) else rate, jnp.float32)

    def build(self, logical_axes: LogicalAxes | None = None) -> optax.GradientTransformation:
        rule = self._rule(decay_mask(self.no_decay), logical_axes)
        if self.global_norm_clip is None:
            return rule
        return optax.chain(optax.clip_by_global_norm(self.global_norm_clip), rule)

    @abc.abstractmethod
    def _rule(self, decays: Callable[[str], bool], logical_axes: LogicalAxes | None
              ) -> optax.GradientTransformation:
        """Returns the transformation without clipping by global norm."""

    def _check_betas(self, **betas: float) -> None:
        for name, value in betas.items():
            check_range(f"{type(self).__name__}: {name}", value, 0.0, 1.0,
                        fix=f"{name} = 0.9, say: the share that is kept each update")

    def _check_decay(self, weight_decay: float) -> None:
        check_range(f"{type(self).__name__}: weight_decay", weight_decay, 0.0,
                    fix="weight_decay = 0.0 for none")
