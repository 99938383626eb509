"""Parts of a model trained each in its own way, or not at all: T5X's `MultiOptimizer`, by regex."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names, unflatten_names
from vishwam_t5x.training.optimizer_base import (
    LogicalAxes,
    Optimizer,
    SingleOptimizer,
    check_range,
    plain,
)

DEFAULT = "default"
"""Label of the parameters that no pattern is found in."""
_SHOWN = 3  # parameters named in a message


class GroupsState(NamedTuple):
    """State of each group's optimizer, by the group's number or `DEFAULT`; none of frozen ones."""

    groups: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ScaledSchedule:
    """A schedule, or a number, times a factor."""

    learning_rate: float | Callable[[Any], Any]
    factor: float

    def __call__(self, step: Any) -> Any:
        rate = self.learning_rate
        return self.factor * (rate(step) if callable(rate) else rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerGroups(Optimizer):
    """Groups of parameters by regular expression, each with an optimizer of its own.

    A group's `global_norm_clip` and `no_decay` are those of its optimizer, taken over its own
    parameters. A frozen parameter has no optimizer state and no gradient: the backward pass ends
    where nothing trained is left below. (The log's MFU counts what groups freeze as if it were
    trained.)

    Attributes:
        groups: (regular expression, treatment) pairs. The first expression that is found in a
            parameter's '/'-joined name decides. The treatment is an optimizer; a number: the
            default optimizer with its learning rate times that; or None: frozen.
        default: optimizer of the parameters that none is found in; None: they are frozen.
        global_norm_clip: gradients of all trained parameters together are scaled down to this
            global norm first; None: never.
        disjoint: a parameter that two expressions are found in is refused, as T5X's MultiOptimizer
            refuses it; False: the order of the groups decides.
        spared: what the names of parameters begin with that are frozen whatever their group; a
            training run sets it to what the model itself freezes.
    """

    groups: Sequence[tuple[str, SingleOptimizer | float | None]]
    default: SingleOptimizer | None
    global_norm_clip: float | None = None
    disjoint: bool = False
    spared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.groups, str) or not self.groups:
            raise UserError("OptimizerGroups.groups are pairs (regular expression, treatment)",
                            got=repr(self.groups), fix="groups = (('^encoder/', None),)")
        for group in self.groups:
            self._check_group(group)
        if self.default is not None and not isinstance(self.default, SingleOptimizer):
            raise UserError("OptimizerGroups.default must be an optimizer, or None",
                            got=repr(self.default), fix="default = @optimizers.Adafactor()")
        if self.global_norm_clip is not None:
            check_range("global_norm_clip", self.global_norm_clip, 0.0, above=True,
                        fix="global_norm_clip = 1.0, or None for no clipping")
        if all(optimizer is None for optimizer in self._optimizers().values()):
            raise UserError("OptimizerGroups freeze everything: there is nothing to train",
                            got=repr(self.groups), fix="give one group or the default an optimizer")

    def _check_group(self, group: Any) -> None:
        if isinstance(group, str) or len(group) != 2 or not isinstance(group[0], str):
            raise UserError("a group is a pair (regular expression, treatment)", got=repr(group),
                            fix="('^encoder/', None) freezes the encoder")
        pattern, treatment = group
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError("a pattern of OptimizerGroups is not a regular expression",
                            got=repr(pattern), fix=str(error)) from error
        if treatment is None or isinstance(treatment, SingleOptimizer):
            return
        if isinstance(treatment, bool) or not isinstance(
                plain(treatment), (int, float)):
            raise UserError(f"group '{pattern}' needs an optimizer, a number or None",
                            got=repr(treatment))
        check_range(f"the factor of the learning rate of group '{pattern}'", treatment, 0.0,
                    above=True, fix="a positive one; None freezes the group")
        if self.default is None:
            raise UserError(f"group '{pattern}' multiplies the learning rate of a default "
                            "optimizer that is not there", got=treatment,
                            fix="set OptimizerGroups.default, or give the group an optimizer")

    def _optimizers(self) -> dict[str, SingleOptimizer | None]:
        """The optimizer of each label."""
        found: dict[str, SingleOptimizer | None] = {}
        for number, (_, treatment) in enumerate(self.groups):
            if isinstance(treatment, (int, float)):
                assert self.default is not None
                treatment = dataclasses.replace(self.default, learning_rate=ScaledSchedule(
                    self.default.learning_rate, float(treatment)))
            found[str(number)] = treatment
        return found | {DEFAULT: self.default}

    def label(self, name: str) -> str:
        """Returns the number of the group that a parameter is in, or `DEFAULT`."""
        for number, (pattern, _) in enumerate(self.groups):
            if re.search(pattern, name):
                return str(number)
        return DEFAULT

    def sparing(self, prefixes: tuple[str, ...]) -> OptimizerGroups:
        return dataclasses.replace(self, spared=(*self.spared, *prefixes))

    def frozen(self, name: str) -> bool:
        if name.startswith(self.spared):
            return True
        label = self.label(name)
        return (self.default if label == DEFAULT else self.groups[int(label)][1]) is None

    def schedule(self, step: Any) -> Float[Array, ""]:
        """Returns the learning rate of the default optimizer; without one, of the first group."""
        trained = [optimizer for optimizer in self._optimizers().values() if optimizer is not None]
        return (self.default or trained[0]).schedule(step)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises `UserError` if a pattern decides about none of these parameters, or two about one
        where the groups are to be disjoint; or a group trains nothing but what is spared."""
        names = list(names)
        if self.disjoint:
            self._check_disjoint(names)
        taken = {self.label(name) for name in names}
        self._check_spared(names)
        for number, (pattern, _) in enumerate(self.groups):
            if str(number) in taken:
                continue
            found = [name for name in names if re.search(pattern, name)]
            if found:
                earlier = self.groups[int(self.label(found[0]))][0]
                raise UserError(f"pattern '{pattern}' of OptimizerGroups decides about nothing",
                                got=f"'{earlier}' comes first and has taken all it would match, "
                                    f"as '{found[0]}'",
                                fix="put the narrower pattern first")
            raise UserError(f"pattern '{pattern}' of OptimizerGroups matches no parameter",
                            got=f"{len(names)} parameters",
                            fix="nearest names: " + ", ".join(_nearest(pattern, names)))

    def _check_spared(self, names: Sequence[str]) -> None:
        trained = {self.label(name) for name in names if not self.frozen(name)}
        for name in names:
            label = self.label(name)
            if label != DEFAULT and label not in trained:
                pattern, treatment = self.groups[int(label)]
                if treatment is not None:
                    raise UserError(
                        f"group '{pattern}' of OptimizerGroups trains what the model freezes",
                        got=f"as '{name}'", fix="leave the group out, or let the model train it: "
                        "freeze = False of the input that it belongs to")

    def _check_disjoint(self, names: Sequence[str]) -> None:
        patterns = [pattern for pattern, _ in self.groups]
        both = {name: found for name in names
                if len(found := [one for one in patterns if re.search(one, name)]) > 1}
        if both:
            first, found = next(iter(both.items()))
            more = f" and {len(both) - _SHOWN} more" if len(both) > _SHOWN else ""
            raise UserError(
                f"{len(both)} parameters have more than one optimizer",
                got=f"{', '.join(list(both)[:_SHOWN])}{more}: in '{first}' "
                    + " and ".join(f"'{one}'" for one in found) + " are found",
                fix="narrow the expressions, e.g. '^encoder/(?!.*scale$)', until each parameter "
                    "has one")

    def build(self, logical_axes: LogicalAxes | None = None) -> optax.GradientTransformation:
        """Returns the transformation.

        Its `init` takes all parameters. Its `update` takes gradients and parameters with the
        frozen ones left out, and returns what it was given the changes of; given all, the frozen
        ones' changes are zero.
        """
        inner = {label: optimizer.build(logical_axes)
                 for label, optimizer in self._optimizers().items() if optimizer is not None}
        clip = None if self.global_norm_clip is None else optax.clip_by_global_norm(
            plain(self.global_norm_clip))

        def init(params: Any) -> GroupsState:
            flat = flatten_names(params)
            self.check_names(flat)
            parts = self._parts(flat)
            return GroupsState({label: inner[label].init(unflatten_names(part))
                                for label, part in parts.items()})

        def update(grads: Any, state: GroupsState, params: Any = None
                   ) -> tuple[Any, GroupsState]:
            assert params is not None, "the groups are told by the names of the parameters"
            flat, param_parts = flatten_names(grads), self._parts(flatten_names(params))
            changes = {name: jnp.zeros_like(grad) for name, grad in flat.items()
                       if self.frozen(name)}
            trained = {name: grad for name, grad in flat.items() if name not in changes}
            if clip is not None:
                trained, _ = clip.update(trained, optax.EmptyState())
            new = {}
            for label, part in self._parts(trained).items():
                change, new[label] = inner[label].update(
                    unflatten_names(part), state.groups[label], unflatten_names(param_parts[label]))
                changes |= flatten_names(change)
            return (jax.tree.unflatten(jax.tree.structure(grads), [changes[name] for name in flat]),
                    GroupsState(new))

        return optax.GradientTransformation(init, update)

    def _parts(self, flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The trained leaves by label."""
        parts: dict[str, dict[str, Any]] = {}
        for name, leaf in flat.items():
            if not self.frozen(name):
                parts.setdefault(self.label(name), {})[name] = leaf
        return parts


def _nearest(pattern: str, names: Sequence[str], number: int = 3) -> list[str]:
    """The names most like a pattern without its regular-expression characters."""
    plain = re.sub(r"[\\^$()*+?|\[\].]", "", pattern)

    def likeness(name: str) -> float:
        # Patterns name a part, so the best of a name's parts counts most.
        parts = [name, *name.split("/")]
        return max(difflib.SequenceMatcher(None, plain.strip("/"), part).ratio() for part in parts)

    return sorted(names, key=likeness, reverse=True)[:number]
