"""Which program wrote what lies in a folder, and its parameters under our names."""

from __future__ import annotations

import os

from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.checkpointing.convert import files, huggingface, t5x, unified_io2_torch
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint
from vishwam_t5x.checkpointing.sources import Source, Subtree
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, did_you_mean

_LISTED = 12  # names shown of a folder

LOOKED_FOR = (
    "checkpoints/STEP/ with manifest.json (ours)",
    "checkpoint_STEP/ with a file 'checkpoint' (T5X) or a folder 'state' (T5X with Orbax)",
    "config.json with model.safetensors (Hugging Face)",
    f"{unified_io2_torch.FILE}, or config.json and model.safetensors (Unified-IO 2's PyTorch port)",
    "a flat .npz or .safetensors")


def open_foreign(place: epath.Path) -> tuple[Source, int | None, str] | None:
    """Opens another program's checkpoint: (parameters under our names, step, full path).

    Returns None if the folder holds none.

    Raises:
        UserError: it is damaged, or of a kind that is not read.
    """
    try:
        if (found := t5x.find_t5x(place)) is not None:
            source = t5x.open_t5x(found)
            ours, _ = t5x.under_our_names(source)
            return Subtree(ours, "params"), t5x.step_of(source), str(found)
        if (port := find_port(place)) is not None:
            return files.open_file(port), None, str(place)
        if (model := huggingface.open_huggingface(place)) is not None:
            return model, None, str(place)
    except DamagedCheckpoint as damage:
        raise damaged(damage) from damage
    return None


def find_port(place: epath.Path) -> epath.Path | None:
    """Returns the file in a folder that holds Unified-IO 2 as its PyTorch port has it, or None.

    It is one that we wrote, or that of a folder as the port saves it for Hugging Face's hub.

    Raises:
        UserError: it is such a folder, but without a `model.safetensors`.
    """
    found = storage.names(place)
    if unified_io2_torch.FILE in found:
        return place / unified_io2_torch.FILE
    if huggingface.CONFIG not in found or "t5_config" not in huggingface.read_json(
            place, huggingface.CONFIG):
        return None
    if huggingface.ONE not in found:
        raise UserError(
            f"this folder of Unified-IO 2's PyTorch port holds no {huggingface.ONE}; pickles are "
            "never loaded: they may run code", got=", ".join(sorted(found)),
            fix="in PyTorch: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
                f"'{huggingface.ONE}')")
    return place / huggingface.ONE


def damaged(damage: DamagedCheckpoint) -> UserError:
    """The error of a checkpoint of another program that cannot be read."""
    place = epath.Path(damage.path)
    others = [t5x.folder_name(step) for step in t5x.steps_in(place.parent)
              if t5x.folder_name(step) != place.name]
    return UserError("this checkpoint is damaged", got=f"{damage.path}: {damage.why}",
                     fix="copy it again" + (
                         f", or take another beside it: {', '.join(others)}" if others else ""))


def unknown(path: str | os.PathLike, place: epath.Path) -> UserError:
    """The error of a path at which no checkpoint of any known layout is."""
    looked = "looked for: " + "; ".join(LOOKED_FOR)
    if storage.exists(place):
        there = storage.names(place)
        more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
        return UserError("this folder holds no checkpoint of a known layout",
                         got=f"{path} with " + (", ".join(there[:_LISTED]) + more
                                                if there else "nothing in it"), fix=looked)
    steps = [str(step) for step in directories.steps_in(place.parent)]
    steps += [t5x.folder_name(step) for step in t5x.steps_in(place.parent)]
    near = did_you_mean(place.name, storage.names(place.parent))
    return UserError("there is no checkpoint", got=str(path), fix=(
        f"in {place.parent}: {', '.join(steps)}" if steps else near or looked))
