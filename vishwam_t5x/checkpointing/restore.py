"""Parameters out of a checkpoint or a flat `.npz`, onto any mesh and dtype, wholly or in part."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.checkpointing import manifest as manifests
from vishwam_t5x.checkpointing.convert import names as t5x_names
from vishwam_t5x.checkpointing.layers import (
    Plan,
    by_branch,
    leave_state_of_frozen,
    make_plan,
    refuse_other_model,
)
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint, Leaf
from vishwam_t5x.checkpointing.sources import (
    CheckpointSource,
    Source,
    Subtree,
    assemble,
    request_of,
)
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.core.trees import flatten_names

log = logging.getLogger(__name__)

AssignmentMap = Sequence[tuple[str, str | None]]
_SHOWN = 20  # names listed of each kind
_ROOT = re.compile(r"^\^?(target|params)/")


class OtherModel(UserError):
    """A checkpoint does not fit the model.

    Attributes:
        checkpoint_leaves: what is in the checkpoint, so that who knows models can name another.
    """

    def __init__(self, problem: str, got: object = None, fix: str | None = None,
                 checkpoint_leaves: Mapping[str, Leaf] | None = None) -> None:
        self.checkpoint_leaves = dict(checkpoint_leaves or {})
        super().__init__(problem, got, fix)

    def __reduce__(self) -> tuple:
        return type(self), (self.problem, self.got, self.fix, self.checkpoint_leaves)


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What became of each parameter.

    Attributes:
        path: what was restored.
        step: its training step; None for a file.
        matched: parameters restored.
        missing: parameters of the model that the checkpoint has not.
        dropped: parameters that the assignment map leaves as they are.
        mismatched: (parameter, its shape in the model, its shape in the checkpoint).
        extra: parameters of the checkpoint that the model has not.
        restacked: matched parameters whose layers were stacked or taken apart.
    """

    path: str
    step: int | None
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    extra: tuple[str, ...] = ()
    restacked: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Returns the report as lines of text: counts first, then names."""
        parts = {part: count for part, count in self.absent_parts().items() if count > 1}
        alone = tuple(name for name in self.extra if not name.startswith(
            tuple(f"{part}/" for part in parts)))
        unequal = tuple(f"{name}: {model} in the model, {found} in the checkpoint"
                        for name, model, found in self.mismatched)
        rows = (("matched", self.matched), ("of these restacked", self.restacked),
                ("missing in the checkpoint", self.missing),
                ("left out by the assignment map", self.dropped),
                ("of another shape", unequal), ("extra in the checkpoint", alone))
        at = "" if self.step is None else f" (step {self.step})"
        lines = [f"parameters in {self.path}{at}:"]
        lines += [f"  {len(names):>6} {what}" for what, names in rows
                  if names or what == "matched"]
        if parts:
            lines.append(f"  {sum(parts.values()):>6} of parts that the model is without, not read")
        for what, names in rows[2:]:
            lines += _listed(what, names)
        lines += _listed("parts that the model is without",
                         [f"{part}/ ({count})" for part, count in parts.items()])
        return "\n".join(lines)

    def absent_parts(self) -> dict[str, int]:
        """Returns the branches among `extra` of which the model has nothing, such as a modality
        that it is without, with the number of their parameters.
        """
        own = {name[:at] for name in self._of_the_model()
               for at, letter in enumerate(name) if letter == "/"}
        return collections.Counter(
            part for name in self.extra if (part := _absent(name, own)) is not None)

    def _of_the_model(self) -> tuple[str, ...]:
        return (*self.matched, *self.missing, *self.dropped,
                *(name for name, *_ in self.mismatched))


def _absent(name: str, own: Collection[str]) -> str | None:
    """The shortest branch of a parameter that is not among `own`; a layer is no branch."""
    words = name.split("/")
    for count in range(1, len(words)):
        if "layers_" in words[count - 1]:
            return None
        if (branch := "/".join(words[:count])) not in own:
            return branch
    return None


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    lines = [f"  {what}:"] + [f"    {name}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"    … and {len(names) - _SHOWN} more")
    return lines


def open_source(path: str | os.PathLike, checksums: bool = True) -> tuple[Source, int | None, str]:
    """Opens what `path` means and returns (parameters in it, its step, its full path).

    Of a folder of checkpoints the newest undamaged one is taken, and said. One of T5X or Hugging
    Face is known by what lies in it; its parameters have our names.

    Raises:
        UserError: nothing is there that is known, or it is damaged.
    """
    place = directories.find(path)
    if storage.is_file(place) or directories.several_files(place):
        from vishwam_t5x.checkpointing.convert import files

        return files.open_files(place), None, str(place)
    if not directories.is_ours(place):
        from vishwam_t5x.checkpointing.convert import foreign

        if (theirs := foreign.open_foreign(place)) is not None:
            return theirs
        raise foreign.unknown(path, place)
    if manifests.exists(place):
        return _open_one(place, checksums)
    found = directories.newest_good(place, checksums)
    if found is None:
        raise UserError("this folder holds no checkpoint", got=str(place),
                        fix="give the MODEL_DIR of a run that has saved")
    step, manifest = found
    source = CheckpointSource(place / str(step), manifest)
    return Subtree(source, "params"), step, str(place / str(step))


def _open_one(place: epath.Path, checksums: bool) -> tuple[Source, int | None, str]:
    try:
        manifest = directories.verify_together(place, checksums)
    except DamagedCheckpoint as damage:
        others = [step for step in directories.steps_in(place.parent)
                  if str(step) != place.name]
        raise UserError("this checkpoint is damaged", got=f"{place}: {damage.why}",
                        fix="others beside it: " + (", ".join(map(str, others)) or "none")
                        ) from damage
    return Subtree(CheckpointSource(place, manifest), "params"), manifest.step, str(place)


def restore_params(path: str | os.PathLike, abstract_params: Any, *,
                   assignment_map: AssignmentMap | None = None, dtype: Any = None,
                   allow_missing: bool = False, checksums: bool = True
                   ) -> tuple[Any, RestoreReport]:
    """Restores parameters, each straight to where and what the model wants it to be.

    Layers may be stacked in the checkpoint and not in the model, or the other way round.

    Args:
        path: MODEL_DIR, MODEL_DIR/checkpoints/STEP, either with '/latest', or a flat `.npz` of
            '/'-joined names; or several such files, joined by commas.
        abstract_params: the model's parameters: `jax.ShapeDtypeStruct`s with shardings, or arrays.
        assignment_map: T5X's: (pattern, replacement) pairs; the first pattern that matches a whole
            parameter name, ours or T5X's, gives the name looked for in the checkpoint (with
            '\\1' …), or leaves the parameter out where the replacement is None.
        dtype: floating-point parameters are cast to it; None: to the model's own dtypes.
        allow_missing: leave what the checkpoint has not as it is in `abstract_params`.
        checksums: compare every byte of a checkpoint with what was written.

    Returns:
        The parameters and the report. What was missing or left out is the very leaf of
        `abstract_params`, so give arrays there to fall back on them.

    Raises:
        UserError: nothing is there, it is damaged, a shape differs, or a parameter is missing.
    """
    source, step, where = open_source(path, checksums)
    wanted = flatten_names(abstract_params)
    available = {name: leaf.shape for name, leaf in source.leaves.items()}
    renamed, dropped = _assign(list(wanted), assignment_map or (), available)
    shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items() if name not in dropped}
    plan = make_plan(shapes, available, renamed)
    report = RestoreReport(
        where, step, tuple(plan.recipes), plan.missing, dropped, plan.mismatched, plan.extra,
        tuple(name for name, recipe in plan.recipes.items() if recipe.axis is not None))
    _refuse(plan, report, source.leaves, allow_missing)
    requests = {name: request_of(wanted[name], dtype) for name in plan.recipes}
    try:
        arrays = assemble(source, plan.recipes, requests)
    except DamagedCheckpoint as damage:
        raise UserError("this checkpoint is damaged", got=str(damage)) from damage
    leaves = [arrays.get(name, leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_params), leaves), report


def restore_state(place: epath.Path, abstract_state: Any, checksums: bool = True) -> Any:
    """Restores all of one checkpoint, which may be another's: nothing in its folder is touched.

    The optimizer state of parameters that are frozen now is left unread, and said; parameters that
    were frozen and are to learn now are refused.

    Args:
        place: MODEL_DIR/checkpoints/STEP.
        abstract_state: see `Checkpoints.restore`.
        checksums: compare every byte with what was written.

    Raises:
        DamagedCheckpoint: it is.
        UserError: it is of another model.
    """
    manifest = directories.verify_together(place, checksums)
    wanted = flatten_names(abstract_state)
    plan = make_plan({name: tuple(leaf.shape) for name, leaf in wanted.items()},
                     {name: leaf.shape for name, leaf in manifest.leaves.items()})
    plan, frozen = leave_state_of_frozen(plan)
    refuse_other_model(place, plan)
    if frozen:
        log.warning("%s has optimizer state of parameters that are frozen now: %s. It is left "
                    "unread, and the next checkpoint has none", place, by_branch(frozen))
    arrays = assemble(CheckpointSource(place, manifest), plan.recipes,
                      {name: request_of(leaf) for name, leaf in wanted.items()})
    return jax.tree.unflatten(jax.tree.structure(abstract_state),
                              [arrays[name] for name in wanted])


def _assign(names: Sequence[str], assignment_map: AssignmentMap, available: Mapping[str, Any]
            ) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns {parameter: name in the checkpoint} where it differs, and parameters left out."""
    renamed, dropped = {}, []
    for name in names:
        # T5X's maps know its own names only, with the root of its parameters.
        known = (name, *sorted(t5x_names.spellings(name)))
        for pattern, new in assignment_map:
            try:
                match = next((match for word in known for match in (
                    re.fullmatch(_ROOT.sub("", pattern), word),
                    re.fullmatch(pattern, f"target/{word}")) if match), None)
                target = match.expand(new) if match and new is not None else None
            except re.error as error:
                raise UserError("the assignment map has a bad regular expression",
                                got=f"({pattern!r}, {new!r}): {error}") from error
            if match:
                if target is None:
                    dropped.append(name)
                else:
                    target = _ROOT.sub("", target)
                    if target not in available:
                        target = t5x_names.parameter_from_t5x(target)
                    if target != name:
                        renamed[name] = target
                break
    return renamed, tuple(dropped)


def _refuse(plan: Plan, report: RestoreReport, leaves: Mapping[str, Leaf], allow_missing: bool
            ) -> None:
    if plan.mismatched:
        raise OtherModel("parameters of the checkpoint have other shapes than the model's",
                         report.table(), "use the model's own gin file, or leave them out: "
                         "assignment_map = [('NAME', None)]", leaves)
    if not plan.recipes and not report.dropped:
        raise OtherModel("no parameter of the model is in the checkpoint", report.table(),
                         "rename them with assignment_map = [('MODEL NAME', 'ITS NAME')]", leaves)
    if plan.missing and not allow_missing:
        hint = did_you_mean(plan.missing[0], leaves)
        raise OtherModel("parameters of the model are missing in the checkpoint", report.table(),
                         "fallback_to_scratch = True starts them afresh"
                         + (f"; {hint}" if hint else ""), leaves)
