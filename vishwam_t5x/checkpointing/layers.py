"""Which arrays of a checkpoint make up which arrays of a model, stacked layers or not.

An unrolled model names its layers 'encoder/layers_3/mlp/wi/kernel'; one scanned over its layers has
'encoder/encoder/mlp/wi/kernel' with the layers on axis 1. A checkpoint of one fits the other.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Mapping

from vishwam_t5x.core.errors import UserError

_STACKED = re.compile(r"(?P<head>(?:.*/)?)(?P<stack>encoder|decoder)/(?P=stack)/(?P<rest>.+)")
_UNROLLED = re.compile(
    r"(?P<head>(?:.*/)?)(?P<stack>encoder|decoder)/layers_(?P<number>\d+)/(?P<rest>.+)")
_PARAMS = "params/"
LAYER_AXIS = 1
"""Of stacked parameters; what is derived from them may have it elsewhere."""

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one array is made of a checkpoint's.

    Attributes:
        sources: names in the checkpoint: one, or one per layer to be stacked.
        axis: the layer axis, None if the array is taken as it is.
        index: which layer to take out of a single stacked source; None: stack the sources.
    """

    sources: tuple[str, ...]
    axis: int | None = None
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the arrays of a model are made of those of a checkpoint.

    Attributes:
        recipes: name in the model -> how to make it.
        missing: names in the model that the checkpoint has not.
        mismatched: (name, shape in the model, shape in the checkpoint).
        extra: names in the checkpoint that nothing is made of.
    """

    recipes: dict[str, Recipe]
    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]
    extra: tuple[str, ...]


def layer_axis(single: Shape, stacked: Shape) -> int | None:
    """Returns the axis on which arrays of shape `single` are stacked to `stacked`, or None.

    Where several would do, the one parameters use is meant.
    """
    usual = min(LAYER_AXIS, len(single))
    others = [axis for axis in range(len(single) + 1) if axis != usual]
    for axis in (usual, *others):
        if len(stacked) == len(single) + 1 and stacked[:axis] + stacked[axis + 1:] == single:
            return axis
    return None


def make_plan(wanted: Mapping[str, Shape], available: Mapping[str, Shape],
              renamed: Mapping[str, str] | None = None) -> Plan:
    """Finds each wanted array in a checkpoint.

    Args:
        wanted: '/'-joined name -> shape, of the model.
        available: the same of the checkpoint.
        renamed: name in the model -> name looked for in the checkpoint, where it differs.
    """
    recipes: dict[str, Recipe] = {}
    missing, mismatched = [], []
    unrolled = _count_layers(wanted, renamed or {})
    for name, shape in wanted.items():
        source = (renamed or {}).get(name, name)
        found = _find(source, shape, available, unrolled)
        if isinstance(found, Recipe):
            recipes[name] = found
        elif found is None:
            missing.append(name)
        else:
            mismatched.append((name, shape, found))
    used = {source for recipe in recipes.values() for source in recipe.sources}
    used.update(_related((renamed or {}).get(name, name), available) for name, _, _ in mismatched)
    return Plan(recipes, tuple(missing), tuple(mismatched),
                tuple(name for name in available if name not in used))


def _find(name: str, shape: Shape, available: Mapping[str, Shape], unrolled: Mapping[str, int]
          ) -> Recipe | Shape | None:
    """A recipe; or the shape of what should have fitted; or None if there is nothing."""
    if name in available:
        return Recipe((name,)) if available[name] == shape else available[name]
    if match := _STACKED.fullmatch(name):
        return _from_layers(match, shape, available)
    if match := _UNROLLED.fullmatch(name):
        return _from_stack(match, shape, available, unrolled)
    return None


def _from_layers(match: re.Match, shape: Shape, available: Mapping[str, Shape]
                 ) -> Recipe | Shape | None:
    prefix = f"{match['head']}{match['stack']}/layers_"
    names: list[str] = []
    while (name := f"{prefix}{len(names)}/{match['rest']}") in available:
        names.append(name)
    if not names:
        return None
    single = available[names[0]]
    if single == shape:  # a placeholder of fixed shape, the same in every layer
        return Recipe((names[0],))
    axis = layer_axis(single, shape)
    fits = (axis is not None and shape[axis] == len(names)
            and all(available[name] == single for name in names))
    return Recipe(tuple(names), axis) if fits else (len(names), *single)


def _from_stack(match: re.Match, shape: Shape, available: Mapping[str, Shape],
                unrolled: Mapping[str, int]) -> Recipe | Shape | None:
    branch = f"{match['head']}{match['stack']}/"
    name = f"{branch}{match['stack']}/{match['rest']}"
    if name not in available:
        return None
    if available[name] == shape:
        return Recipe((name,))
    axis = layer_axis(shape, available[name])
    # A model of fewer layers than the stack is another model, not a part of it.
    if axis is None or available[name][axis] != unrolled[branch]:
        return available[name]
    return Recipe((name,), axis, int(match["number"]))


def _count_layers(wanted: Mapping[str, Shape], renamed: Mapping[str, str]) -> dict[str, int]:
    """Number of unrolled layers under each 'head/encoder/' of the model, by checkpoint name."""
    count: dict[str, int] = {}
    for name in wanted:
        if match := _UNROLLED.fullmatch(renamed.get(name, name)):
            branch = f"{match['head']}{match['stack']}/"
            count[branch] = max(count.get(branch, 0), int(match["number"]) + 1)
    return count


def _related(name: str, available: Mapping[str, Shape]) -> str:
    """The name in the checkpoint that a mismatched array was compared with."""
    if name not in available and (match := _UNROLLED.fullmatch(name)):
        return f"{match['head']}{match['stack']}/{match['stack']}/{match['rest']}"
    if name not in available and (match := _STACKED.fullmatch(name)):
        return f"{match['head']}{match['stack']}/layers_0/{match['rest']}"
    return name


def only_state(lone: Collection[str], shared: Collection[str]) -> tuple[str, ...]:
    """Returns the parameters whose optimizer state some arrays are; () if any is something else.

    It must be state as other parameters have it, and all that these have: so it is the same
    optimizer, and these parameters are trained on the one side and frozen on the other.

    Args:
        lone: names of arrays that only the checkpoint, or only the run, has.
        shared: names of those that both have.
    """
    params = {name.removeprefix(_PARAMS) for name in shared if name.startswith(_PARAMS)}
    common = [found for name in shared if (found := _owner(name, params)) is not None]
    trained, kinds = {param for param, _ in common}, {kind for _, kind in common}
    owners: dict[str, None] = {}
    for name in lone:
        found = _owner(name, params)
        if found is None or found[0] in trained or found[1] not in kinds:
            return ()
        owners[found[0]] = None
    return tuple(owners)


def _owner(name: str, params: Collection[str]) -> tuple[str, str] | None:
    """The parameter that an array of an optimizer's state is of, and which of its arrays it is."""
    words = name.split("/")
    if words[0] != "opt_state":
        return None
    for length in range(len(words) - 1, 0, -1):
        for start in range(1, len(words) - length + 1):
            if (param := "/".join(words[start:start + length])) in params:
                return param, "/".join((*words[:start], "*", *words[start + length:]))
    return None


def by_branch(names: Collection[str]) -> str:
    """Returns the first parts of names with how many begin so: 'encoder/ (12), decoder/ (18)'."""
    counted = collections.Counter(name.split("/")[0] for name in names)
    return ", ".join(f"{branch}/ ({count})" for branch, count in counted.items())


def leave_state_of_frozen(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """Returns the plan without what a checkpoint holds of parameters that are frozen since, and
    these parameters: their optimizer state, if nothing else is over.
    """
    used = {source for recipe in plan.recipes.values() for source in recipe.sources}
    frozen = only_state(plan.extra, used)
    return (dataclasses.replace(plan, extra=()), frozen) if frozen else (plan, ())


def refuse_other_model(place: object, plan: Plan) -> None:
    """Raises `UserError` with the first differences if a checkpoint and the model differ."""
    if not (plan.missing or plan.mismatched or plan.extra):
        return
    if not plan.mismatched and not plan.extra and (
            thawed := only_state(plan.missing, plan.recipes)):
        # Not begun here: the optimizer's count of updates is far along, so that fresh moments would
        # go uncorrected and make the first steps several times too large.
        raise UserError(
            f"the checkpoint {place} has no optimizer state of {len(thawed)} parameters that are "
            "to learn: they were frozen", got=by_branch(thawed),
            fix="freeze them again, or begin another MODEL_DIR with the parameters and a fresh "
                f"optimizer: INITIAL_CHECKPOINT_PATH = '{place}'")
    lines = [f"{name}: {model} wanted, {found} in the checkpoint"
             for name, model, found in plan.mismatched[:8]]
    lines += [f"{name}: not in the checkpoint" for name in plan.missing[:8]]
    lines += [f"{name}: only in the checkpoint" for name in plan.extra[:8]]
    count = len(plan.missing) + len(plan.mismatched) + len(plan.extra)
    raise UserError(
        f"the checkpoint {place} is of another model or optimizer ({count} arrays differ)",
        got="\n       ".join(lines),
        fix="resume with the config it was saved with, choose another MODEL_DIR, or take only its "
            "parameters: INITIAL_CHECKPOINT_PATH")
