"""Parameters of a checkpoint, placed on the mesh for a model that is only run, not trained."""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax.core import meta
from jax.sharding import Mesh

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.parallelism import sharding
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules

if TYPE_CHECKING:
    from vishwam_t5x.checkpointing.restore import RestoreReport

LATEST = "latest"
_SHOWN = 12


def abstract_params(model: Any, mesh: Mesh, rules: LogicalAxisRules | None = None) -> Any:
    """Returns shape, dtype and sharding of every parameter, allocating nothing.

    Args:
        model: Flax module with `init(key)`.
        mesh: devices.
        rules: logical axis rules; the standard ones by default.

    Raises:
        UserError: a dimension does not divide over its mesh axes.
    """
    boxed = jax.eval_shape(model.init, jax.random.key(0))["params"]
    places = sharding.parameter_shardings(boxed, mesh, rules)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        meta.unbox(boxed), places)


def load_params(model: Any, path: str | os.PathLike, mesh: Mesh,
                rules: LogicalAxisRules | None = None) -> tuple[Any, RestoreReport]:
    """Restores every parameter of the model, each straight to its devices.

    Args:
        model: Flax module with `init(key)`.
        path: MODEL_DIR, a checkpoint folder, or a flat `.npz`; see `restore_params`.
        mesh: devices.
        rules: logical axis rules; the standard ones by default.

    Raises:
        UserError: nothing is there, it is damaged, or it is another model's: then the first
            differences are shown side by side.
    """
    # Imported late: a training recipe that includes gin/runs/evaluate.gin imports this file, and
    # must not wait for orbax.
    from vishwam_t5x.checkpointing.restore import OtherModel, restore_params

    wanted = abstract_params(model, mesh, rules)
    try:
        return restore_params(path, wanted)
    except storage.StorageError:
        raise
    except UserError as error:
        differences = _differences(wanted, path)
        if not differences:
            raise
        raise OtherModel(error.problem, differences,
                         "give the gin file the checkpoint was trained with (its MODEL_DIR has "
                         "it: config.gin)", getattr(error, "checkpoint_leaves", None)) from error


def identity(path: str | os.PathLike) -> str:
    """Returns what tells the contents of a checkpoint from others that had its path.

    No array is read: ours has a manifest of checksums, a local `.npz` keeps a CRC-32 of each array,
    a bucket one of each object. Files of others are known by size and time of change.

    Args:
        path: a checkpoint folder or a file, as `RestoreReport.path` gives it.

    Raises:
        FileNotFoundError: there is none.
    """
    from vishwam_t5x.checkpointing import manifest

    place = storage.place(path)
    if storage.is_file(own := place / manifest.FILE_NAME):
        return _digest([storage.read_bytes(own)])
    if storage.is_remote(place):
        if storage.is_file(place):
            return _digest([storage.fingerprint(place)])
        return _digest([(name, storage.fingerprint(place / name))
                        for name in storage.files_below(place)])
    if (file := pathlib.Path(place)).is_file():
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return _digest([(entry.filename, entry.file_size, entry.CRC)
                                for entry in archive.infolist()])
        return _digest([(file.stat().st_size, file.stat().st_mtime_ns)])
    if not file.exists():
        raise FileNotFoundError(os.fspath(path))
    return _digest([(below.relative_to(file).as_posix(), below.stat().st_size,
                     below.stat().st_mtime_ns)
                    for below in sorted(file.rglob("*")) if below.is_file()])


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def checkpoint_place(checkpoint: str | None, model_dir: str) -> str:
    """Returns the path that `--checkpoint` means: 'latest' (or None), a step, or a path.

    Raises:
        UserError: the run has no such checkpoint.
    """
    if checkpoint in (None, "", LATEST):
        return model_dir
    if not checkpoint.isdigit():
        return checkpoint
    folder = storage.join(os.path.expanduser(model_dir), "checkpoints")
    there = sorted(int(name) for name in storage.names(folder) if name.isdigit())
    if int(checkpoint) not in there:
        raise UserError(f"{model_dir} has no checkpoint of step {checkpoint}",
                        got="steps " + ", ".join(map(str, there)) if there else "no checkpoints",
                        fix="--checkpoint=latest, or one of these steps, or a path")
    return storage.join(folder, checkpoint)


def kind_of(path: str | os.PathLike) -> str:
    """Returns in words what this process sees at a path; no other process is asked.

    Raises:
        UserError: nothing is there.
    """
    from vishwam_t5x.checkpointing import directory

    place = directory.find(path)
    if storage.is_file(place):
        return "a file"
    if directory.is_ours(place):
        return "a checkpoint, or some, of this program"
    if not storage.exists(place):
        from vishwam_t5x.checkpointing.convert import foreign

        raise foreign.unknown(path, place)
    return "a folder of another program"


def _differences(wanted: Any, path: str | os.PathLike) -> str:
    """The first parameters that differ, model on the left, checkpoint on the right; '' if none."""
    from vishwam_t5x.checkpointing.restore import open_source

    try:
        source, _, where = open_source(path, checksums=False)
    except UserError:
        return ""  # It cannot be opened: the first error says why.
    mine = {name: tuple(leaf.shape) for name, leaf in flatten_names(wanted).items()}
    theirs = {name: tuple(leaf.shape) for name, leaf in source.leaves.items()}
    extra = {name: shape for name, shape in theirs.items() if name not in mine}
    rows = []
    for name, shape in mine.items():
        if theirs.get(name) == shape:
            continue
        if name in theirs:
            rows.append((f"{name} {shape}", f"{name} {theirs[name]}"))
            continue
        near = difflib.get_close_matches(name, extra, n=1, cutoff=0.7)
        rows.append((f"{name} {shape}", f"{near[0]} {extra.pop(near[0])}" if near else "-"))
    rows += [("-", f"{name} {shape}") for name, shape in extra.items()]
    if not rows or all(left == "-" for left, _ in rows):
        return ""
    width = max(len(left) for left, _ in [("model", ""), *rows[:_SHOWN]])
    lines = [f"{len(rows)} of {len(mine)} parameters differ from {where}",
             f"       {'model':<{width}}   checkpoint"]
    lines += [f"       {left:<{width}}   {right}" for left, right in rows[:_SHOWN]]
    if len(rows) > _SHOWN:
        lines.append(f"       … and {len(rows) - _SHOWN} more")
    return "\n".join(lines)
