"""Where arrays are read from: a checkpoint of ours, or a flat `.npz`; nothing is unpickled.

A source names its arrays and reads those asked for, each straight to its devices and dtype.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from vishwam_t5x.checkpointing import manifest as manifests
from vishwam_t5x.checkpointing.layers import Recipe
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint, Leaf
from vishwam_t5x.checkpointing.writing import quiet_orbax
from vishwam_t5x.core import storage
from vishwam_t5x.core.distributed import any_process
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names, unflatten_names


class Request(NamedTuple):
    """How an array is wanted.

    Attributes:
        dtype: what it is cast to.
        sharding: where it goes; None: to the host, as a NumPy array.
    """

    dtype: np.dtype
    sharding: Sharding | None


class Source(Protocol):
    """Arrays by '/'-joined name."""

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """Shape and dtype of every array."""

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """Reads the arrays asked for; all processes call it together."""


class CheckpointSource:
    """A checkpoint directory with its manifest."""

    def __init__(self, directory: epath.Path, manifest: manifests.Manifest) -> None:
        quiet_orbax()
        self.directory, self.manifest = directory, manifest

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return self.manifest.leaves

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`.

        Raises:
            DamagedCheckpoint: its files do not hold what the manifest says, or cannot be read by
                some process: then all of them raise it.
            StorageAway: the object store they are in did not answer.
            StorageError: it refused.
        """
        if not requests:
            return {}
        item, arguments = {}, {}
        for name, request in requests.items():
            item[name] = jax.ShapeDtypeStruct(self.leaves[name].shape, request.dtype)
            if request.sharding is None:
                arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=request.dtype)
            else:
                arguments[name] = ocp.ArrayRestoreArgs(
                    dtype=request.dtype, sharding=request.sharding,
                    global_shape=self.leaves[name].shape)
        # The handler alone: Orbax's Checkpointer waits for all processes when it is done, and one
        # that could not read would leave the others there.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree, failure = None, None
            try:
                tree = handler.restore(self.directory, args=ocp.args.PyTreeRestore(
                    item=unflatten_names(item), restore_args=unflatten_names(arguments),
                    partial_restore=True))
            except Exception as error:  # noqa: BLE001 - raised again, once the others know
                failure = error
        if any_process(failure is not None, "checkpoint read"):
            if failure and storage.is_remote(self.directory) and _unanswered(failure):
                raise storage.StorageAway(
                    f"the storage does not answer: {self.directory} could not be read",
                    got=failure, fix="run the same command again when it does") from failure
            if failure and re.search(r"PERMISSION_DENIED|UNAUTHENTICATED", str(failure)):
                raise storage.StorageError(
                    f"access was refused: {self.directory} could not be read", got=failure,
                    fix="log in as someone who may read there") from failure
            # OSError and ValueError are what TensorStore raises for bad bytes.
            if failure is None or isinstance(failure, OSError | ValueError):
                why = failure or "by another process"
                raise DamagedCheckpoint(self.directory, f"it cannot be read ({why})") from failure
            raise failure
        return flatten_names(tree)


def _unanswered(error: Exception) -> bool:
    """Whether TensorStore gave up on the network; a damaged file is another matter."""
    return isinstance(error, OSError) or re.search(
        r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED", str(error)) is not None


_ROOTS = ("params/", "target/")


class NpzSource:
    """A flat `.npz`: '/'-joined names, with or without a leading 'params/' or 'target/'."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Reads the names, shapes and dtypes.

        Raises:
            UserError: no such file, no `.npz`, or one that holds Python objects.
        """
        self._path = os.fspath(path)
        self._copy = contextlib.ExitStack()  # of a remote file, as long as this object lives
        try:
            self._local = os.fspath(self._copy.enter_context(storage.as_local(self._path)))
            headers = _npz_headers(self._local)
        except FileNotFoundError:
            raise UserError("there is no such file", got=self._path) from None
        except storage.StorageError:
            raise
        except (ValueError, zipfile.BadZipFile, OSError, EOFError) as error:
            raise UserError("this file is not a flat .npz of arrays", got=f"{self._path}: {error}",
                            fix="write it with np.savez(path, **{'/'-joined name: array})"
                            ) from error
        self._keys = _without_root(list(headers))
        self._leaves = {name: headers[key] for name, key in self._keys.items()}

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return self._leaves

    @functools.cached_property
    def _file(self) -> Any:
        """The open file: to find its arrays anew for each of thousands would take minutes."""
        return self._copy.enter_context(np.load(self._local, allow_pickle=False))

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`."""
        arrays = {}
        for name, request in requests.items():
            array = self._file[self._keys[name]]
            if _is_raw_bfloat16(array.dtype):
                array = array.view(jnp.bfloat16)
            arrays[name] = place(array.astype(request.dtype), request.sharding)
        return arrays


def _npz_headers(path: str) -> dict[str, Leaf]:
    """Shape and dtype of each array of a `.npz`, without reading the arrays."""
    leaves = {}
    readers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version not in readers:
                    raise ValueError(f"array '{member}' has format {version}")
                shape, _, dtype = readers[version](file)
            if dtype.hasobject:
                raise ValueError(f"array '{member}' holds Python objects, which are never loaded")
            leaves[member.removesuffix(".npy")] = Leaf(
                tuple(shape), "bfloat16" if _is_raw_bfloat16(dtype) else dtype.name)
    return leaves


def _is_raw_bfloat16(dtype: np.dtype) -> bool:
    return dtype.kind == "V" and dtype.itemsize == 2  # as NumPy writes what it does not know


def _without_root(keys: list[str]) -> dict[str, str]:
    for root in _ROOTS:
        if keys and any(key.startswith(root) for key in keys):
            return {key.removeprefix(root): key for key in keys if key.startswith(root)}
    return {key: key for key in keys}


def place(array: np.ndarray, sharding: Sharding | None) -> Any:
    """Returns an array where it is wanted: on devices, or on the host if there is no sharding."""
    if sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Subtree:
    """The part of a source below one branch, named without it."""

    def __init__(self, source: Source, branch: str) -> None:
        self._source, self._prefix = source, f"{branch}/"

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return {name.removeprefix(self._prefix): leaf
                for name, leaf in self._source.leaves.items() if name.startswith(self._prefix)}

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`."""
        arrays = self._source.read({self._prefix + name: request
                                    for name, request in requests.items()})
        return {name.removeprefix(self._prefix): array for name, array in arrays.items()}


def assemble(source: Source, recipes: Mapping[str, Recipe], requests: Mapping[str, Request]
             ) -> dict[str, Any]:
    """Reads what the recipes name and makes the wanted arrays of it.

    Args:
        source: where to read.
        recipes: wanted name -> how to make it.
        requests: wanted name -> dtype and place.
    """
    reads: dict[str, Request] = {}
    for name, recipe in recipes.items():
        wanted = requests[name]
        part = Request(wanted.dtype, _without_stack(wanted.sharding, recipe))
        for source_name in recipe.sources:
            reads.setdefault(source_name, part)
    arrays = source.read(reads)
    return {name: _make(recipe, [arrays[part] for part in recipe.sources], requests[name])
            for name, recipe in recipes.items()}


def _without_stack(sharding: Sharding | None, recipe: Recipe) -> Sharding | None:
    """The sharding of a recipe's sources, given that of what is made of them."""
    if recipe.axis is None or not isinstance(sharding, NamedSharding):
        return sharding
    spec = list(sharding.spec) + [None] * (recipe.axis - len(sharding.spec))
    if recipe.index is None:
        spec = spec[:recipe.axis] + spec[recipe.axis + 1:]
    else:
        spec.insert(recipe.axis, None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _make(recipe: Recipe, arrays: list[Any], wanted: Request) -> Any:
    if recipe.axis is None:
        if wanted.sharding is not None and arrays[0].sharding != wanted.sharding:
            return jax.device_put(arrays[0], wanted.sharding)  # a source two recipes share
        return arrays[0]
    if wanted.sharding is None:
        return (np.stack(arrays, recipe.axis) if recipe.index is None
                else np.take(arrays[0], recipe.index, recipe.axis))
    if recipe.index is None:
        return _stacker(recipe.axis, wanted.sharding)(*arrays)
    return _taker(recipe.axis, wanted.sharding)(arrays[0], recipe.index)


@functools.lru_cache
def _stacker(axis: int, sharding: Sharding) -> Any:
    return jax.jit(lambda *parts: jnp.stack(parts, axis), out_shardings=sharding)


@functools.lru_cache
def _taker(axis: int, sharding: Sharding) -> Any:
    # The index is an argument, so that all layers share one compiled program.
    return jax.jit(lambda stacked, index: jax.lax.dynamic_index_in_dim(
        stacked, index, axis, keepdims=False), out_shardings=sharding)


def request_of(leaf: Any, dtype: Any = None) -> Request:
    """Returns how a leaf of an abstract (or real) tree wants to be read.

    NumPy leaves stay on the host; leaves without a sharding go to the first device.

    Args:
        leaf: `jax.ShapeDtypeStruct`, `jax.Array` or NumPy array.
        dtype: cast floating-point leaves to this one instead of their own.
    """
    if isinstance(leaf, np.ndarray | np.generic):
        return Request(np.dtype(leaf.dtype), None)
    own = np.dtype(leaf.dtype)
    if dtype is not None and jnp.issubdtype(own, jnp.floating):
        own = np.dtype(dtype)
    place = getattr(leaf, "sharding", None)
    return Request(own, place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
