"""T5X's wrapped optimizers of optax, and several at once by the names of parameters.

As in T5X the trainer's learning rate is Adafactor's alone: those of optax have their own, bound to
them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.training import optimizers

STANDS_FOR = "t5x.optimizers"
LearningRate = float | Callable[[Any], Any]


class OptimizerDef(abc.ABC):
    """An optimizer as T5X configures it."""

    @abc.abstractmethod
    def ours(self, learning_rate: LearningRate, before: int = 0) -> optimizers.Optimizer:
        """Returns the optimizer of ours that it means.

        Args:
            learning_rate: of the trainer.
            before: steps that another run has made, from which schedules go on.
        """


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """A schedule that goes on where another run has ended."""

    schedule: Callable[[Any], Any]
    steps: int

    def __call__(self, step: Any) -> Any:
        return self.schedule(step + self.steps)


def shifted(learning_rate: LearningRate, steps: int) -> LearningRate:
    """Returns a learning rate that goes on from a step; one that never changes is as it was."""
    return _Shifted(learning_rate, steps) if steps and callable(learning_rate) else learning_rate


@dataclasses.dataclass(frozen=True)
class _Optax(OptimizerDef):
    """One of optax's, with the arguments that were bound."""

    name: str
    learning_rate: LearningRate
    settings: Mapping[str, Any]

    def ours(self, learning_rate: LearningRate, before: int = 0) -> optimizers.Optimizer:
        from vishwam_t5x.training.optimizer_families import OptaxOptimizer

        del learning_rate
        # T5X's wrapped optimizers mask nothing unless told to.
        masked = self.name in ("adamw", "lion", "lamb", "lars")
        return OptaxOptimizer(learning_rate=shifted(self.learning_rate, before), name=self.name,
                              settings=dict(self.settings), **({"no_decay": ()} if masked else {}))


def _wrapped(name: str) -> Callable[..., OptimizerDef]:
    def wrap(learning_rate: Any = None, **settings: Any) -> OptimizerDef:
        if learning_rate is None:
            raise UserError(f"optimizers.{name} has no learning rate",
                            got="the trainer's learning_rate_fn is Adafactor's alone, as in T5X",
                            fix=f"optimizers.{name}.learning_rate = a number, or "
                                "@utils.create_learning_rate_scheduler()")
        return _Optax(name, learning_rate, settings)

    wrap.__name__ = wrap.__qualname__ = name
    wrap.__doc__ = f"optax.{name}, with its arguments; `learning_rate` is one that it needs."
    return wrap


adabelief = _wrapped("adabelief")
adagrad = _wrapped("adagrad")
adam = _wrapped("adam")
adamw = _wrapped("adamw")
fromage = _wrapped("fromage")
lamb = _wrapped("lamb")
lars = _wrapped("lars")
lion = _wrapped("lion")
noisy_sgd = _wrapped("noisy_sgd")
radam = _wrapped("radam")
rmsprop = _wrapped("rmsprop")
sgd = _wrapped("sgd")
yogi = _wrapped("yogi")


@dataclasses.dataclass(frozen=True)
class _Chain(OptimizerDef, optimizers.Optimizer):
    """Transformations of optax, one after the other."""

    transformations: Sequence[Any]

    def ours(self, learning_rate: LearningRate, before: int = 0) -> optimizers.Optimizer:
        del learning_rate, before  # the last of them has its own, as in T5X
        return self

    def schedule(self, step: Any) -> Any:
        """Not known: it is inside one of the transformations."""
        return jnp.full_like(jnp.asarray(step, jnp.float32), jnp.nan)

    def build(self, logical_axes: Any = None) -> Any:
        """Returns optax's chain of them."""
        import optax

        del logical_axes
        return optax.chain(*self.transformations)


def chain(transformations: Sequence[Any]) -> OptimizerDef:
    """optax's transformations, one after the other: [@optax.clip_by_global_norm(), @optax.adamw()].

    Args:
        transformations: of optax; the learning rate is in one of them, and a schedule there begins
            at 0 even if the run begins with a checkpoint.
    """
    if not transformations:
        raise UserError("optimizers.chain needs a transformation", got=repr(transformations),
                        fix="transformations = [@optax.adamw()]")
    return _Chain(tuple(transformations))


@dataclasses.dataclass(frozen=True)
class MultiOptimizer(OptimizerDef):
    """Optimizers by the names of parameters.

    Attributes:
        traversals_and_optimizers: (regular expression, optimizer) pairs; the one whose expression
            is found in a parameter's name has it. As in T5X parameters of none are frozen, and one
            of two is refused.
    """

    traversals_and_optimizers: Sequence[tuple[str, OptimizerDef]]

    def ours(self, learning_rate: LearningRate, before: int = 0) -> optimizers.Optimizer:
        """See `OptimizerDef.ours`."""
        from vishwam_t5x.training.optimizer_groups import OptimizerGroups

        for pair in self.traversals_and_optimizers:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2
                    and isinstance(pair[0], str) and isinstance(pair[1], OptimizerDef)):
                raise UserError("MultiOptimizer takes (regular expression, optimizer) pairs",
                                got=repr(pair), fix="(('^decoder/', @adafactor.Adafactor()),)")
        return OptimizerGroups(groups=tuple(
            (pattern, optimizer.ours(learning_rate, before))
            for pattern, optimizer in self.traversals_and_optimizers), default=None, disjoint=True)
