"""Optimizers by name: T5X's Adafactor; AdamW, Lion and SGD; the rest of optax's family.

Each is a frozen dataclass that gin can bind field by field; `build()` gives the optax
transformation, `schedule(step)` the learning rate for the log.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.training import schedules
from vishwam_t5x.training.adafactor import AdafactorRules, scale_by_adafactor
from vishwam_t5x.training.adafactor_layout import STACKED_AXIS, STACKED_LAYERS
from vishwam_t5x.training.adafactor_layout import HParamMap as HParamMap
from vishwam_t5x.training.adafactor_layout import (
    standard_logical_factor_rules as standard_logical_factor_rules,
)
from vishwam_t5x.training.optimizer_base import NO_DECAY as NO_DECAY
from vishwam_t5x.training.optimizer_base import (
    LogicalAxes,
    SingleOptimizer,
    check_range,
    tree_mask,
)
from vishwam_t5x.training.optimizer_base import Optimizer as Optimizer
from vishwam_t5x.training.optimizer_families import FAMILY, REFUSED, OptaxOptimizer


@dataclasses.dataclass(frozen=True)
class Adafactor(AdafactorRules, SingleOptimizer):
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
        SingleOptimizer.__post_init__(self)

    def _rule(self, decays: Callable[[str], bool], logical_axes: LogicalAxes | None
              ) -> optax.GradientTransformation:
        return scale_by_adafactor(self.learning_rate, self, decays=decays,
                                  stacked_layers=self.stacked_layers,
                                  stacked_axis=self.stacked_axis, logical_axes=logical_axes)


@dataclasses.dataclass(frozen=True)
class AdamW(SingleOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    Not with optax's defaults, which are b2 = 0.999, weight_decay = 1e-4 and no mask: at b2 = 0.98 a
    second moment is 50 updates old and not 1,000, which suits a Transformer's warm-up (Vaswani et
    al. 2017); weights decay only if asked, and those of `no_decay` (norms, biases, embedding
    tables) not even then. Optax's own: `OptaxOptimizer(name='adamw', no_decay=())`, which is what
    T5X's `optimizers.adamw` means.

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
        check_range("AdamW: eps", self.eps, 0.0, above=True, fix="eps = 1e-8")

    def _rule(self, decays: Callable[[str], bool], logical_axes: LogicalAxes | None
              ) -> optax.GradientTransformation:
        return optax.adamw(self.learning_rate, b1=self.b1, b2=self.b2, eps=self.eps,
                           weight_decay=self.weight_decay, mask=tree_mask(decays))


@dataclasses.dataclass(frozen=True)
class Lion(SingleOptimizer):
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

    def _rule(self, decays: Callable[[str], bool], logical_axes: LogicalAxes | None
              ) -> optax.GradientTransformation:
        return optax.lion(self.learning_rate, b1=self.b1, b2=self.b2,
                          weight_decay=self.weight_decay, mask=tree_mask(decays))


@dataclasses.dataclass(frozen=True)
class SGD(SingleOptimizer):
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
        self._check_betas(momentum=0.0 if self.momentum is None else self.momentum)
        self._check_decay(self.weight_decay)
        if self.nesterov and self.momentum is None:
            raise UserError("SGD: nesterov needs momentum", fix="momentum = 0.9")

    def _rule(self, decays: Callable[[str], bool], logical_axes: LogicalAxes | None
              ) -> optax.GradientTransformation:
        direction = (optax.identity() if self.momentum is None
                     else optax.trace(self.momentum, self.nesterov))
        # Decoupled, as AdamW's and Lion's: after the momentum, times the learning rate.
        decay = (optax.add_decayed_weights(self.weight_decay, tree_mask(decays))
                 if self.weight_decay else optax.identity())
        return optax.chain(direction, decay, optax.scale_by_learning_rate(self.learning_rate))


OPTIMIZERS: dict[str, type[SingleOptimizer]] = {
    "adafactor": Adafactor, "adamw": AdamW, "lion": Lion, "sgd": SGD}


def optimizer(name: str = "adafactor", **fields: Any) -> SingleOptimizer:
    """Returns the optimizer called `name`: one of `OPTIMIZERS`, or else of optax's by its name.

    Args:
        name: which one, in any case.
        **fields: its fields; those of optax's function, for one of optax's.

    Raises:
        UserError: an unknown name or field (with the nearest known one), or a value out of range.
    """
    name = name.lower()
    if name not in OPTIMIZERS and name in (*FAMILY, *REFUSED):
        own = {field.name for field in dataclasses.fields(OptaxOptimizer)}
        settings = {key: value for key, value in fields.items() if key not in own}
        return OptaxOptimizer(name=name, settings=settings, **{
            key: value for key, value in fields.items() if key in own})
    kind = OPTIMIZERS[one_of(name, (*OPTIMIZERS, *FAMILY), "optimizer")]
    known = [field.name for field in dataclasses.fields(kind)]
    for field in fields:
        one_of(field, known, f"field of optimizer '{name}'")
    return kind(**fields)
