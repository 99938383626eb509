"""Optimizers by name: T5X's Adafactor, and optax's AdamW, Lion and SGD.

Each is a frozen dataclass that gin can bind field by field; `build()` gives the optax
transformation, `schedule(step)` the learning rate for the log.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.training import schedules
from vishwam_t5x.training.adafactor import (
    STACKED_AXIS,
    STACKED_LAYERS,
    AdafactorRules,
    scale_by_adafactor,
)

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


def _tree_mask(decays: Callable[[str], bool]) -> Callable[[Any], Any]:
    def mask(params: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(params),
                                  [decays(name) for name in flatten_names(params)])

    return mask


@dataclasses.dataclass(frozen=True)
class Optimizer(abc.ABC):
    """What all optimizers share.

    Attributes:
        learning_rate: per update: a number, or a schedule (function of the step).
        global_norm_clip: gradients are scaled down to this global norm first; None: never.
        no_decay: regular expressions of parameters ('/'-joined names) whose weights do not decay.
    """

    learning_rate: float | Callable[[Any], Any] = 1e-3
    global_norm_clip: float | None = None
    no_decay: Sequence[str] = NO_DECAY

    def __post_init__(self) -> None:
        if not callable(self.learning_rate) and not self.learning_rate > 0:
            raise UserError("learning_rate must be positive, or a schedule",
                            got=repr(self.learning_rate))
        if self.global_norm_clip is not None and not self.global_norm_clip > 0:
            raise UserError("global_norm_clip must be positive, or None for no clipping",
                            got=repr(self.global_norm_clip))
        if isinstance(self.no_decay, str):
            raise UserError("no_decay must be a list of regular expressions",
                            got=repr(self.no_decay), fix=f"no_decay = ({self.no_decay!r},)")
        decay_mask(self.no_decay)

    def schedule(self, step: Any) -> Float[Array, ""]:
        """Returns the learning rate of the update that follows `step` updates, float32 []."""
        rate = self.learning_rate
        return jnp.asarray(rate(step) if callable(rate) else rate, jnp.float32)

    def build(self) -> optax.GradientTransformation:
        """Returns the optax transformation: global-norm clipping, then the rule itself."""
        if self.global_norm_clip is None:
            return self._rule(decay_mask(self.no_decay))
        return optax.chain(optax.clip_by_global_norm(self.global_norm_clip),
                           self._rule(decay_mask(self.no_decay)))

    @abc.abstractmethod
    def _rule(self, decays: Callable[[str], bool]) -> optax.GradientTransformation:
        """Returns the transformation without clipping by global norm."""

    def _check_betas(self, **betas: float) -> None:
        for name, value in betas.items():
            if not 0 <= value < 1:
                raise UserError(f"{type(self).__name__}: {name} must be in [0, 1)",
                                got=repr(value))

    def _check_decay(self, weight_decay: float) -> None:
        if weight_decay < 0:
            raise UserError(f"{type(self).__name__}: weight_decay must not be negative",
                            got=repr(weight_decay))


@dataclasses.dataclass(frozen=True)
class Adafactor(AdafactorRules, Optimizer):
    """T5X's Adafactor: factored second moments, relative step sizes.

    The fields of `AdafactorRules` are fields of this class, under the same names.

    Attributes:
        learning_rate: of relative size: times the root-mean-square of each parameter.
        stacked_layers: regular expression of parameters with a layer axis; None: none.
        stacked_axis: that axis.
    """

    learning_rate: float | Callable[[Any], Any] = dataclasses.field(
        default_factory=schedules.create_learning_rate_scheduler)
    stacked_layers: str | None = STACKED_LAYERS
    stacked_axis: int = STACKED_AXIS

    def __post_init__(self) -> None:
        AdafactorRules.__post_init__(self)
        Optimizer.__post_init__(self)

    def _rule(self, decays: Callable[[str], bool]) -> optax.GradientTransformation:
        return scale_by_adafactor(self.learning_rate, self, decays=decays,
                                  stacked_layers=self.stacked_layers,
                                  stacked_axis=self.stacked_axis)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: times the learning rate, taken off the weights each update.
    """

    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_betas(b1=self.b1, b2=self.b2)
        self._check_decay(self.weight_decay)
        if not self.eps > 0:
            raise UserError("AdamW: eps must be positive", got=repr(self.eps))

    def _rule(self, decays: Callable[[str], bool]) -> optax.GradientTransformation:
        return optax.adamw(self.learning_rate, b1=self.b1, b2=self.b2, eps=self.eps,
                           weight_decay=self.weight_decay, mask=_tree_mask(decays))


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of the momentum.

    Attributes:
        learning_rate: per update; three to ten times smaller than AdamW's.
        b1: share of the momentum in the update.
        b2: decay of the momentum.
        weight_decay: times the learning rate, taken off the weights each update.
    """

    learning_rate: float | Callable[[Any], Any] = 1e-4
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_betas(b1=self.b1, b2=self.b2)
        self._check_decay(self.weight_decay)

    def _rule(self, decays: Callable[[str], bool]) -> optax.GradientTransformation:
        return optax.lion(self.learning_rate, b1=self.b1, b2=self.b2,
                          weight_decay=self.weight_decay, mask=_tree_mask(decays))


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent, with momentum if asked.

    Attributes:
        momentum: decay of the momentum; None: none kept.
        nesterov: look one step ahead (needs momentum).
        weight_decay: times the learning rate, taken off the weights each update.
    """

    learning_rate: float | Callable[[Any], Any] = 1e-2
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_betas(momentum=self.momentum or 0.0)
        self._check_decay(self.weight_decay)
        if self.nesterov and self.momentum is None:
            raise UserError("SGD: nesterov needs momentum", fix="momentum = 0.9")

    def _rule(self, decays: Callable[[str], bool]) -> optax.GradientTransformation:
        direction = (optax.identity() if self.momentum is None
                     else optax.trace(self.momentum, self.nesterov))
        # Decoupled, as AdamW's and Lion's: after the momentum, times the learning rate.
        decay = (optax.add_decayed_weights(self.weight_decay, _tree_mask(decays))
                 if self.weight_decay else optax.identity())
        return optax.chain(direction, decay, optax.scale_by_learning_rate(self.learning_rate))


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adafactor": Adafactor, "adamw": AdamW, "lion": Lion, "sgd": SGD}


def optimizer(name: str = "adafactor", **fields: Any) -> Optimizer:
    """Returns the optimizer called `name` ('adafactor', 'adamw', 'lion' or 'sgd').

    Args:
        name: which one, in any case.
        **fields: its fields.

    Raises:
        UserError: an unknown name or field (with the nearest known one), or a value out of range.
    """
    kind = OPTIMIZERS[one_of(name.lower(), OPTIMIZERS, "optimizer")]
    known = [field.name for field in dataclasses.fields(kind)]
    for field in fields:
        one_of(field, known, f"field of optimizer '{name}'")
    return kind(**fields)
