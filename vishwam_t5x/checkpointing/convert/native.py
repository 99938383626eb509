"""Our own checkpoints, read part by part and written array by array."""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.checkpointing import manifest as manifests
from vishwam_t5x.checkpointing.convert import orbax_layout
from vishwam_t5x.checkpointing.convert.stores import StoredSource, dtype_named
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint, Leaf
from vishwam_t5x.checkpointing.sources import Source
from vishwam_t5x.core.errors import UserError

_HANDLER = "vishwam_t5x.checkpointing.writing._Handler"
_ON_HOST = "position/"


def open_native(place: epath.Path) -> tuple[StoredSource, int]:
    """Opens a checkpoint of ours, or the newest good one of a folder of them: all of its arrays.

    Returns:
        (the source, the training step).

    Raises:
        UserError: there is none.
        DamagedCheckpoint: a file is not what was written.
    """
    if not manifests.exists(place):
        if (found := directories.newest_good(place)) is None:
            raise UserError("this folder holds no checkpoint", got=str(place),
                            fix="give the MODEL_DIR of a run that has saved")
        place /= str(found[0])
        manifest = found[1]
    else:
        manifest = manifests.verify(place)
    source = orbax_layout.open_orbax(place)
    for name, leaf in manifest.leaves.items():
        if source.leaves.get(name) != leaf:
            raise DamagedCheckpoint(place, f"'{name}' is {source.leaves.get(name)}, {leaf} was "
                                           "written")
    return source, manifest.step


def write_native(source: Source, names: Mapping[str, str], folder: epath.Path,
                 dtypes: Mapping[str, str], step: int) -> None:
    """Writes a checkpoint of ours into a new folder; what makes it one is written last.

    Args:
        source: where the arrays are.
        names: name to write, as in a `TrainState` -> the source's.
        folder: new.
        dtypes: name to write -> dtype to write.
        step: of training.
    """
    on_host = frozenset(name for name in names if name.startswith(_ON_HOST))
    orbax_layout.write_orbax(source, names, folder, dtypes, on_host)
    orbax_layout.write_step_metadata(folder, _HANDLER)
    leaves = {name: Leaf(source.leaves[own].shape, dtype_named(dtypes[name]).name)
              for name, own in names.items()}
    manifests.write(folder, step, leaves, {})
    orbax_layout.commit(folder, str(folder))
