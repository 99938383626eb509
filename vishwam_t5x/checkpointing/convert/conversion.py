"""One checkpoint into another layout: what goes where, the writing, and the comparison after it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.checkpointing.convert import (
    files,
    foreign,
    huggingface,
    names,
    native,
    t5x,
    unified_io2,
    unified_io2_torch,
)
from vishwam_t5x.checkpointing.convert.huggingface_writing import write_huggingface
from vishwam_t5x.checkpointing.convert.new_folder import new_folder
from vishwam_t5x.checkpointing.convert.report import (
    ConversionReport,
    compiled,
    named,
    parts_of,
    read_part,
)
from vishwam_t5x.checkpointing.convert.stores import Renamed, dtype_named, is_floating, scalar
from vishwam_t5x.checkpointing.convert.t5_network import T5Network
from vishwam_t5x.checkpointing.convert.unrolled import Unrolled, has_stacks
from vishwam_t5x.checkpointing.layers import make_plan
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint
from vishwam_t5x.checkpointing.sources import Request, Source, assemble
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, one_of

OURS, HUGGINGFACE, NPZ, TORCH = "vishwam", "huggingface", "npz", "unified_io2_torch"
FORMATS = (t5x.LEGACY, t5x.ORBAX, HUGGINGFACE, TORCH, OURS)
UNROLLED, STACKED = LAYERS = ("unrolled", "stacked")
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of any layout.

    Attributes:
        kind: one of `FORMATS`, or NPZ.
        place: the checkpoint's folder or file.
        source: its arrays under the names of a `TrainState`: 'params/…', 'opt_state/…', 'step'.
        own: our name -> its own name.
        homeless: its own names of arrays that have none of ours.
        step: of training; None if it does not say.
        remarks: what a report must say of it.
    """

    kind: str
    place: epath.Path
    source: Renamed
    own: Mapping[str, str]
    homeless: tuple[str, ...] = ()
    step: int | None = None
    remarks: tuple[str, ...] = ()


def open_any(path: str | os.PathLike) -> Opened:
    """Opens whatever checkpoint `path` means, of a folder of them the newest whole one.

    Raises:
        UserError: nothing is there that is known, or it is damaged.
    """
    place = directories.find(path)
    try:
        if storage.is_file(place) or directories.several_files(place):
            return _of_file(place)
        if directories.is_ours(place):
            source, step = native.open_native(place)
            same = {name: name for name in source.leaves}
            return Opened(OURS, source.place, Renamed(source, same), same, (), step)
        if (port := foreign.find_port(place)) is not None:
            return _of_file(port)
        if (found := t5x.find_t5x(place)) is not None:
            theirs = t5x.open_t5x(found)
            ours, homeless = t5x.under_our_names(theirs)
            kind = t5x.layout_of(found) or t5x.LEGACY
            return Opened(kind, found, ours, ours.names, homeless, t5x.step_of(theirs))
        if (model := huggingface.open_huggingface(place)) is not None:
            return dataclasses.replace(_of_parameters(HUGGINGFACE, place, model),
                                       remarks=tuple(model.remarks()))
    except DamagedCheckpoint as damage:
        raise foreign.damaged(damage) from damage
    raise foreign.unknown(path, place)


def _of_file(place: epath.Path) -> Opened:
    source = files.open_files(place)
    opened = _of_parameters(NPZ, place, source)
    return dataclasses.replace(opened, own={
        name: source.made[own][0] for name, own in opened.own.items()})


def _of_parameters(kind: str, place: epath.Path, source: Source) -> Opened:
    named = {f"params/{name}": name for name in source.leaves}
    return Opened(kind, place, Renamed(source, named), named)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is to be written.

    Attributes:
        opened: what is read.
        kind: layout to write, one of `FORMATS`.
        target: folder of the checkpoint to write.
        source: the arrays, and those begun anew.
        names: name in the target -> name in `source`; of Hugging Face's our own names.
        step: of training.
        dtype: floating-point parameters are written in it; None: as they are.
        report: what becomes of each array.
    """

    opened: Opened
    kind: str
    target: epath.Path
    source: Renamed
    names: Mapping[str, str]
    step: int
    dtype: str | None
    report: ConversionReport

    def dtypes(self) -> dict[str, str]:
        """Returns the dtype of each array to write, by its name in the target."""
        found = {}
        for name, ours in self.names.items():
            leaf = self.source.leaves[ours]
            cast = self.dtype if ours.startswith("params/") and is_floating(leaf) else None
            found[name] = cast or leaf.dtype
        return found


def plan(opened: Opened, kind: str, to: str | os.PathLike, drop: Sequence[str] = (),
         dtype: str | None = None, fresh: Mapping[str, np.ndarray] | None = None,
         layers: str | None = None) -> Conversion:
    """Finds the place of every array, and refuses what would be lost in silence.

    Args:
        opened: what is read.
        kind: layout to write.
        to: where; see `target_of`.
        drop: regular expressions of whole names, ours or the source's, that may be lost.
        dtype: floating-point parameters are written in it; None: as they are.
        fresh: arrays that a state of ours has and no other layout, by our name.
        layers: of stacked ones in T5X's layouts, UNROLLED or STACKED; None: as they are in a
            checkpoint of T5X's, else unrolled.

    Raises:
        UserError: an array has no place, there are no parameters, or the target is there already.
    """
    one_of(kind, FORMATS, "format to write")
    patterns = compiled(drop)
    dropped = [name for name in opened.own if named(patterns, name, opened.own[name])]
    opened, note = _with_layers(opened, kind, layers, dropped)
    dropped += [name for name in opened.own if named(patterns, name, opened.own[name])]
    dropped += [name for name in opened.homeless if named(patterns, name)]
    kept = [name for name in opened.own if name not in dropped]
    lost = [name for name in opened.homeless if name not in dropped]
    held: dict[str, np.ndarray] = {}
    bookkeeping: tuple[str, ...] = ()
    if kind == OURS:
        bookkeeping = tuple(filter(unified_io2.is_moment_of_codec, kept))
        places = {name: name for name in kept if name not in bookkeeping}
        if any(name.startswith("opt_state/") for name in kept):
            held = {name: array for name, array in (fresh or {}).items() if name not in places}
    elif kind == HUGGINGFACE:
        places = {name: name for name in kept if name.startswith("params/")}
        bookkeeping = tuple(name for name in kept if name not in places)
    elif kind == TORCH:
        found = {name: unified_io2_torch.parameter_to_torch(name.removeprefix("params/"))
                 for name in kept if name.startswith("params/")}
        places = {name: there[0] for name, there in found.items() if there is not None}
        bookkeeping = tuple(name for name in kept if name not in found)
        lost += [name for name in found if name not in places]
    else:
        places, bookkeeping, homeless = names.all_to_t5x(kept)
        lost += homeless
        note = "\n".join(filter(None, (note, _two_counts(opened.source, kept))))
    if lost:
        raise _refusal(kind, lost)
    if not any(name.startswith("params/") for name in places):
        raise UserError("there are no parameters to convert", got=str(opened.place))
    step = opened.step or 0
    if kind not in (HUGGINGFACE, TORCH) and "step" not in places:
        held["step"] = np.asarray(step, np.int32)
        places["step"] = "step" if kind == OURS else "state/step"
    places.update({name: name for name in held if name not in places})
    target = target_of(to, kind, step)
    matched = tuple((opened.own.get(ours, ours), there) for ours, there in places.items()
                    if ours not in held)
    report = ConversionReport(
        str(opened.place), str(target), matched, _missing(places, kind), tuple(dropped),
        bookkeeping, tuple(places[name] for name in held),
        "\n".join([*opened.remarks, *([note] if note else [])]))
    kept_names = {name: name for name in places if name not in held}
    return Conversion(opened, kind, target, Renamed(opened.source, kept_names, held),
                      {there: ours for ours, there in places.items()}, step, dtype, report)


def _with_layers(opened: Opened, kind: str, layers: str | None, dropped: Sequence[str]
                 ) -> tuple[Opened, str]:
    """The same with the layers of every stack apart, where they are to be written so, and what is
    to be said of it; in both cases without what is dropped.
    """
    theirs = kind in (t5x.LEGACY, t5x.ORBAX)
    if layers is not None:
        one_of(layers, LAYERS, "form of layers")
        if not theirs:
            raise UserError("--layers says how T5X's layouts hold stacked layers", got=kind,
                            fix="leave it out: ours reads both, the others know no stacks")
    own = {name: there for name, there in opened.own.items() if name not in dropped}
    rest = dataclasses.replace(opened, own=own)
    as_it_is = opened.kind in (t5x.LEGACY, t5x.ORBAX) and layers is None
    if not theirs and kind != TORCH or theirs and as_it_is:
        return rest, ""
    named_so = Renamed(opened.source, {name: name for name in own})
    stacks = has_stacks(named_so.leaves)
    if layers is not None and not stacks:
        raise UserError("this checkpoint has no stacked layers", got=str(opened.place),
                        fix="leave --layers out")
    if layers == STACKED:
        return rest, ""
    single = Unrolled(named_so, moments=theirs)
    note = ("stacked layers are written one by one, as T5X's t5.network and the published "
            "checkpoints have them; --layers=stacked keeps the stacks, as scalable_t5 has them"
            ) if theirs and stacks and layers is None else ""
    return dataclasses.replace(rest, own=single.own(own), source=Renamed(
        single, {name: name for name in single.leaves})), note


def _two_counts(source: Source, kept: Sequence[str]) -> str:
    """What to say where steps and updates differ: T5X has one number for both."""
    counts = {name: scalar(source, name) for name in kept
              if name == "step" or re.fullmatch(r"opt_state/(\d+/)*step", name)}
    if len(set(counts.values())) < 2:
        return ""
    return "T5X has one count of steps: of " + ", ".join(
        f"{name} = {count}" for name, count in counts.items()) + " it gets 'step'"


def _refusal(kind: str, lost: Sequence[str]) -> UserError:
    branches = {name.split("/")[0] for name in lost}
    shown = ", ".join(lost[:_SHOWN]) + (
        f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
    pattern = f"{branches.pop()}/.*" if len(branches) == 1 else "REGEX"
    if pattern == "params/.*":
        pattern = re.escape(lost[0]).replace("\\/", "/") if len(lost) == 1 else "REGEX"
    return UserError(
        f"{len(lost)} arrays have no place in the layout '{kind}' and would be lost", got=shown,
        fix=f"--drop='{pattern}' leaves out by name what may be lost")


def _missing(places: Mapping[str, str], kind: str) -> tuple[str, ...]:
    if kind in (HUGGINGFACE, TORCH) or any(name.startswith("opt_state/") for name in places):
        return ()
    return ("opt_state",) if kind == OURS else ("state/param_states",)


def target_of(to: str | os.PathLike, kind: str, step: int) -> epath.Path:
    """Returns the folder of the checkpoint to write: `to` itself, or below it as a MODEL_DIR.

    Raises:
        UserError: the name of `to` says another step.
    """
    place = directories.absolute(to)
    named = re.fullmatch(r"checkpoint_(\d+)", place.name) if kind != OURS else (
        re.fullmatch(r"(\d+)", place.name) if place.parent.name == directories.FOLDER else None)
    if named and kind not in (HUGGINGFACE, TORCH) and int(named[1]) != step:
        raise UserError("the name of the target says another step than the checkpoint's",
                        got=f"{place.name}, step {step}", fix=f"--to={place.parent}")
    if kind == OURS and not (place.parent.name == directories.FOLDER and place.name.isdigit()):
        place = place if place.name == directories.FOLDER else place / directories.FOLDER
        return place / str(step)
    if kind in (t5x.LEGACY, t5x.ORBAX) and not re.fullmatch(r"checkpoint_\d+", place.name):
        return place / t5x.folder_name(step)
    return place


def write(conversion: Conversion, network: T5Network | None = None,
          vocabulary: str | None = None,
          check: Callable[[Conversion], None] = lambda written: None,
          meanwhile: contextlib.AbstractContextManager[None] | None = None) -> ConversionReport:
    """Writes what was planned, array by array, and returns the report.

    Args:
        conversion: what `plan` returned.
        network: for Hugging Face's config.json, what parameters do not tell; None: as published.
        vocabulary: SentencePiece model for a Hugging Face folder.
        check: called with the conversion as it was written, its target the folder where it lies so
            far; what it raises is raised, and nothing is left.
        meanwhile: entered when nobody else can write there, left when the target is whole or gone.

    Raises:
        UserError: the target is there already.
        DamagedCheckpoint: an array cannot be read.
    """
    report = conversion.report
    with new_folder(conversion.target, meanwhile or contextlib.nullcontext()) as folder:
        if conversion.kind == OURS:
            native.write_native(conversion.source, conversion.names, folder, conversion.dtypes(),
                                conversion.step)
        elif conversion.kind == HUGGINGFACE:
            parameters = Renamed(conversion.source, {
                name.removeprefix("params/"): name for name in conversion.names})
            written = write_huggingface(
                parameters, folder, network, vocabulary=vocabulary,
                dtype=conversion.dtype and dtype_named(conversion.dtype))
            report = dataclasses.replace(report, matched=tuple(
                (conversion.opened.own.get(f"params/{ours}", ours), theirs)
                for ours, theirs in written.matched), note="\n".join(filter(
                    None, (report.note, written.note))))
        elif conversion.kind == TORCH:
            unified_io2_torch.write_torch(conversion.source, conversion.names, folder,
                                          conversion.dtypes())
        else:
            t5x.write_t5x(conversion.source, conversion.names, folder, conversion.dtypes(),
                          conversion.kind)
        check(dataclasses.replace(conversion, target=folder))
    return report


def verify(conversion: Conversion) -> int:
    """Reads what was written and compares every array bit by bit; returns how many there are.

    Raises:
        DamagedCheckpoint: an array is not what was to be written.
    """
    again = open_any(conversion.target).source
    dtypes = conversion.dtypes()
    wanted = {ours: dtype_named(dtypes[there]) for there, ours in conversion.names.items()}
    if conversion.kind == HUGGINGFACE and conversion.dtype:
        wanted = dict.fromkeys(wanted, dtype_named(conversion.dtype))
    made = make_plan({name: conversion.source.leaves[name].shape for name in wanted},
                     {name: leaf.shape for name, leaf in again.leaves.items()})
    for name, recipe in made.recipes.items():
        leaf = conversion.source.leaves[name]
        if recipe.axis is None:
            itemsize = wanted[name].itemsize
            equal = all(_same(read_part(conversion.source, name, part),
                              read_part(again, recipe.sources[0], part), wanted[name])
                        for part in parts_of(leaf.shape, itemsize))
        else:
            whole = assemble(again, {name: recipe}, {name: Request(wanted[name], None)})[name]
            part = tuple(slice(0, length) for length in leaf.shape)
            equal = _same(read_part(conversion.source, name, part), whole, wanted[name])
        if not equal:
            raise DamagedCheckpoint(conversion.target, f"'{name}' is not what was to be written")
    absent = (*made.missing, *(name for name, *_ in made.mismatched))
    if absent:
        raise DamagedCheckpoint(conversion.target, f"'{absent[0]}' is not there")
    return len(made.recipes)


def _same(before: Any, after: Any, dtype: np.dtype) -> bool:
    """Whether `before`, cast, has the bits of `after` (NaNs are like any other)."""
    cast = np.ascontiguousarray(np.asarray(before, dtype))
    got = np.ascontiguousarray(after)
    return cast.dtype == got.dtype and cast.shape == got.shape and (
        cast.tobytes() == got.tobytes())
