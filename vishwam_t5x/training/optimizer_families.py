"""Optax's optimizers by the names T5X wraps them under, with optax's own defaults.

Weights decay as optax has it, but for those of `no_decay`; T5X's names leave none out (`compat`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.training.optimizer_base import (
    NO_DECAY,
    LogicalAxes,
    SingleOptimizer,
    check_range,
    plain,
    tree_mask,
)

FAMILY = ("adabelief", "adagrad", "adam", "adamw", "fromage", "lamb", "lars", "lion", "noisy_sgd",
          "radam", "rmsprop", "sgd", "yogi")

REFUSED = {
    "amos": "it is in jestimator and not in optax; adafactor is as sparing with memory",
    "dpsgd": "it clips the gradient of each example, and a train step has only their sum",
}
"""Names of T5X that no run can use, and why."""

_MASKS = ("mask", "weight_decay_mask")
# Optax takes any number: a run would end in NaN, or climb. None and schedules are optax's to judge.
_SHARES = ("b1", "b2", "decay", "momentum")  # of what is kept each update
_NOT_NEGATIVE = ("eps", "eps_root", "weight_decay", "min_norm", "initial_scale", "eta", "gamma",
                 "initial_accumulator_value", "trust_coefficient")
_MAY_BE_ZERO = (("lars", "eps"), ("adagrad", "eps"))  # their sums begin above zero, or are guarded
_OURS = ("learning_rate", "key", "trust_ratio_mask", *_MASKS)


@dataclasses.dataclass(frozen=True)
class OptaxOptimizer(SingleOptimizer):
    """An optimizer of optax.

    Attributes:
        name: one of `FAMILY`.
        settings: arguments of optax's function by name; those not named have optax's defaults.
            Masks come from `no_decay`; `noisy_sgd` takes a `seed`.
    """

    name: str = "adam"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name in REFUSED:
            raise UserError(f"optimizer '{self.name}' cannot be used", got=REFUSED[self.name],
                            fix="one of: " + ", ".join(FAMILY))
        one_of(self.name, FAMILY, "optimizer of optax")
        known = self._parameters()
        settings = [name for name in known if name not in _OURS]
        for setting in self.settings:
            one_of(setting, settings, f"setting of optax.{self.name}")
            self._check_setting(setting, self.settings[setting])
        if tuple(self.no_decay) != NO_DECAY and not any(mask in known for mask in _MASKS):
            raise UserError(f"optax.{self.name} decays no weights: no_decay has no meaning",
                            got=repr(self.no_decay), fix="leave no_decay out")

    def _check_setting(self, setting: str, value: Any) -> None:
        what = f"optax.{self.name}: {setting}"
        if value is None or callable(value):
            return
        default = inspect.signature(getattr(optax, self.name)).parameters.get(setting)
        usual = f"{setting} = {default.default!r}, optax's default" if default else None
        if setting in _SHARES:
            check_range(what, value, 0.0, 1.0, fix=usual)
        elif setting in _NOT_NEGATIVE:
            check_range(what, value, 0.0, fix=usual,
                        above=setting == "eps" and (self.name, setting) not in _MAY_BE_ZERO)

    def _parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(getattr(optax, self.name)).parameters)

    def _rule(self, decays: Callable[[str], bool], logical_axes: LogicalAxes | None
              ) -> optax.GradientTransformation:
        arguments = {name: plain(value) for name, value in self.settings.items()}
        for mask in _MASKS:
            if mask in self._parameters():
                arguments[mask] = tree_mask(decays)
        if self.name == "noisy_sgd":
            arguments["key"] = arguments.pop("seed", 0)
        try:
            optimizer = getattr(optax, self.name)(self.learning_rate, **arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"optax.{self.name} refuses its settings", got=str(error)) from error
        return _with_plain_key(optimizer) if self.name == "noisy_sgd" else optimizer


def _with_plain_key(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the random key of the noise as the words it is made of: a typed key is no array."""

    def hide(state: Any) -> Any:
        noise, *others = state
        return (noise._replace(rng_key=jax.random.key_data(noise.rng_key)), *others)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        noise, *others = state
        noise = noise._replace(rng_key=jax.random.wrap_key_data(noise.rng_key))
        updates, state = optimizer.update(grads, (noise, *others), params)
        return updates, hide(state)

    return optax.GradientTransformation(lambda params: hide(optimizer.init(params)), update)
