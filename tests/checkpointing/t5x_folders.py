"""T5X's checkpoints for tests: some files as T5X wrote them, the rest in its layout."""

from __future__ import annotations

import contextlib
import functools
import pathlib

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vishwam_t5x.checkpointing.convert import t5x_legacy
from vishwam_t5x.checkpointing.convert.t5x_legacy import write_legacy
from vishwam_t5x.checkpointing.manifest import Leaf
from vishwam_t5x.core.trees import flatten_names, unflatten_names

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "t5x"


class Arrays:
    """A source of arrays in memory that keeps the size of the largest part it gave away."""

    def __init__(self, arrays):
        self.arrays, self.largest = dict(arrays), 0

    @property
    def leaves(self):
        return {name: Leaf(array.shape, array.dtype.name) for name, array in self.arrays.items()}

    def read_part(self, name, part):
        found = self.arrays[name][part]
        self.largest = max(self.largest, found.nbytes)
        return found


@functools.cache
def real_files() -> dict[str, bytes]:
    """Files of T5X's own checkpoint: the tree, and four of its ninety arrays."""
    with np.load(GOLDEN / "checkpoint_300_files.npz") as found:
        return {name: found[name].tobytes() for name in found.files}


@functools.cache
def state() -> dict[str, np.ndarray]:
    """The whole trained state under T5X's names.

    Parameters, step and what T5X keeps in the tree are T5X's numbers; of the moments that lie in
    folders of their own only one is, the others are made up.
    """
    with np.load(GOLDEN / "params_trained.npz") as found:
        arrays = {f"target/{name}": found[name] for name in found.files}
    tree = t5x_legacy.unpack(real_files()["checkpoint"])["optimizer"]["state"]
    random = np.random.default_rng(0)
    for name, leaf in t5x_legacy._leaves({"state": tree}):
        arrays[name] = leaf if isinstance(leaf, np.ndarray) else random.random(
            leaf["metadata"]["shape"], np.float32)
    return arrays


def write(arrays, folder: pathlib.Path) -> pathlib.Path:
    """Writes a legacy checkpoint."""
    folder.mkdir(parents=True)
    write_legacy(Arrays(arrays), {name: name for name in arrays}, epath.Path(folder),
                 {name: array.dtype.name for name, array in arrays.items()})
    return folder


def write_orbax(arrays, folder: pathlib.Path, *, database: bool, zarr3: bool = False
                ) -> pathlib.Path:
    """Writes what T5X writes with Orbax, by Orbax."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler(use_ocdbt=database, use_zarr3=zarr3)
                            ) as handler:
        handler.save(epath.Path(folder / "state"), args=ocp.args.PyTreeSave(
            unflatten_names(arrays)))
        handler.finalize(epath.Path(folder / "state"))  # what its manager does at the end
    return folder


def read_by_orbax(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays that Orbax itself finds."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(epath.Path(folder)).tree
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray)
                     for name in flatten_names(tree)}
        return flatten_names(handler.restore(epath.Path(folder), args=ocp.args.PyTreeRestore(
            restore_args=unflatten_names(arguments))))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns path below a folder -> content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}
