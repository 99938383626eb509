"""T5X's checkpoints, found and opened under our names, and written.

    MODEL_DIR/checkpoint_1000/checkpoint          legacy: see `t5x_legacy`
    MODEL_DIR/checkpoint_1000/state/_METADATA     Orbax: see `orbax_layout`
    MODEL_DIR/checkpoint_1000/state/checkpoint    Orbax of 2022: the legacy file, one folder deeper
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from etils import epath

from vishwam_t5x.checkpointing.convert import names as naming
from vishwam_t5x.checkpointing.convert import orbax_layout, t5x_legacy
from vishwam_t5x.checkpointing.convert.stores import Renamed, StoredSource, scalar
from vishwam_t5x.checkpointing.manifest import COMMITTED
from vishwam_t5x.checkpointing.sources import Source
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError

LEGACY, ORBAX = "t5x", "t5x_orbax"
"""The two layouts."""

_STATE = "state"
_FOLDER = re.compile(r"checkpoint_(\d+)")
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def folder_name(step: int) -> str:
    """Returns what T5X calls the folder of a checkpoint."""
    return f"checkpoint_{step}"


def steps_in(folder: epath.Path) -> list[int]:
    """Returns the steps of T5X's checkpoints in a MODEL_DIR, rising."""
    numbers = (_FOLDER.fullmatch(name) for name in storage.names(folder))
    return sorted(int(match[1]) for match in numbers if match)


def layout_of(place: epath.Path) -> str | None:
    """Returns which layout the checkpoint in a folder has: LEGACY, ORBAX, or None if it is none.

    Raises:
        UserError: it is one of TensorFlow's.
    """
    found = set(storage.names(place))
    _refuse_tensorflow(place, found)
    if t5x_legacy.FILE in found:
        return LEGACY
    if _STATE in found and {orbax_layout.TREE, t5x_legacy.FILE} & set(
            storage.names(place / _STATE)):
        return ORBAX
    return None


def _refuse_tensorflow(place: epath.Path, found: set[str]) -> None:
    indices = sorted(name for name in found if name.endswith(".index"))
    if not indices:
        return
    raise UserError(
        "this is a TensorFlow checkpoint (Mesh TensorFlow's T5), which is not read",
        got=f"{place}: {', '.join(indices[:3])}",
        fix="convert it once where T5X is installed, with its scripts/convert_tf_checkpoint.py, or "
            "take the checkpoint that T5X's documentation lists for the same model (t5x/docs/"
            "models.md) or Hugging Face's of the same name")


def find_t5x(place: epath.Path) -> epath.Path | None:
    """Returns the folder of the T5X checkpoint that `place` means; None if there is none.

    Args:
        place: the checkpoint itself, or a MODEL_DIR of T5X's, whose newest one is taken.

    Raises:
        UserError: it is one of TensorFlow's, or no checkpoint of the MODEL_DIR is whole.
    """
    if layout_of(place):
        return place
    steps = steps_in(place)
    for step in reversed(steps):
        if is_whole(place / folder_name(step)):
            return place / folder_name(step)
    if steps:
        raise UserError("no checkpoint in this folder is whole",
                        got=f"{place}: " + ", ".join(folder_name(step) for step in steps),
                        fix="each needs a file 'checkpoint' (legacy T5X) or a folder 'state' with "
                            f"'{orbax_layout.TREE}' (Orbax)")
    return None


def is_whole(place: epath.Path) -> bool:
    """Whether the save of a T5X checkpoint was finished."""
    layout = layout_of(place)
    if layout == ORBAX and storage.is_remote(place):  # elsewhere the folder is renamed at the end
        return COMMITTED in storage.names(place)
    return layout is not None


def open_t5x(place: epath.Path) -> StoredSource:
    """Opens the T5X checkpoint in a folder, under T5X's names.

    Raises:
        DamagedCheckpoint: a file of it is not what T5X writes.
        StorageAway: the object store does not answer.
    """
    if layout_of(place) == LEGACY:
        return t5x_legacy.open_legacy(place)
    if orbax_layout.TREE in storage.names(place / _STATE):
        return orbax_layout.open_orbax(place / _STATE)
    return t5x_legacy.open_legacy(place / _STATE)


def under_our_names(source: StoredSource) -> tuple[Renamed, tuple[str, ...]]:
    """Returns what is in a T5X checkpoint under our names, and T5X's names of what has none.

    The names are those of a `TrainState`: 'params/…', 'opt_state/…', 'step'.
    """
    ours: dict[str, str] = {}
    homeless = []
    for name in source.leaves:
        places = naming.from_t5x(name)
        if not places or any(place in ours for place in places):
            homeless.append(name)  # or another array has taken its place: two embedding tables
        else:
            ours.update(dict.fromkeys(places, name))
    if "opt_state/step" in ours and not any("/param_states/" in name for name in ours):
        del ours["opt_state/step"]  # a step and no moments: no state to go on with
    return Renamed(source, ours), tuple(homeless)


def step_of(source: StoredSource) -> int | None:
    """Returns the training step of a T5X checkpoint; None if it has none."""
    if "state/step" in source.leaves:
        return scalar(source, "state/step")
    match = _FOLDER.fullmatch(source.place.name) or _FOLDER.fullmatch(source.place.parent.name)
    return int(match[1]) if match else None


def write_t5x(source: Source, names: Mapping[str, str], folder: epath.Path,
              dtypes: Mapping[str, str], layout: str = LEGACY) -> None:
    """Writes a T5X checkpoint into a new folder; what makes it one is written last.

    Args:
        source: where the arrays are.
        names: T5X's name -> the source's.
        folder: new.
        dtypes: T5X's name -> dtype to write.
        layout: LEGACY or ORBAX.
    """
    if layout == LEGACY:
        t5x_legacy.write_legacy(source, names, folder, dtypes)
        return
    orbax_layout.write_orbax(source, names, folder / _STATE, dtypes)
    orbax_layout.commit(folder / _STATE, f"{folder}/{_STATE}")
    orbax_layout.write_step_metadata(folder, {_STATE: _HANDLER})
    orbax_layout.commit(folder, str(folder))
