"""Arrays that lie in zarr folders or an OCDBT database, read through TensorStore.

Each device's part is read alone where an array is wanted sharded, and parts of arrays where asked.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import math
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from vishwam_t5x.checkpointing.convert.report import Slices, read_part
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint, Leaf
from vishwam_t5x.checkpointing.sources import Request, Source, place
from vishwam_t5x.core import storage
from vishwam_t5x.core.distributed import any_process

log = logging.getLogger(__name__)

_THREADS = 8  # arrays read at the same time
_ALONE = 256 * 2**20  # bytes of an array that is read with no other beside it

Spec = dict[str, Any]


def key_value_store(folder: epath.Path | str) -> Spec:
    """Returns TensorStore's description of a folder, local or in gs://."""
    text = str(folder).rstrip("/") + "/"
    if not storage.is_remote(text):
        return {"driver": "file", "path": text}
    bucket, _, path = text.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": path}


def zarr_folder(folder: epath.Path, name: str, driver: str = "zarr") -> Spec:
    """Returns the description of the array in the subfolder `name`."""
    return {"driver": driver, "kvstore": key_value_store(folder / name)}


def in_database(folder: epath.Path, name: str, driver: str = "zarr") -> Spec:
    """Returns the description of the array `name` of the OCDBT database in `folder`."""
    return {"driver": driver, "kvstore": {
        "driver": "ocdbt", "base": key_value_store(folder), "path": f"{name}/"}}


def dtype_named(name: str) -> np.dtype:
    """Returns the dtype of numbers called `name`; never one of Python objects.

    Raises:
        ValueError: there is none.
    """
    if name in ("bfloat16", "int4", "uint4") or name.startswith("float8_"):
        return np.dtype(getattr(ml_dtypes, name, None) or _unknown(name))
    try:
        dtype = np.dtype(name)
    except TypeError:
        return _unknown(name)
    return dtype if dtype.kind in "biufc" else _unknown(name)


def _unknown(name: str) -> Any:
    raise ValueError(f"{name!r} is no dtype of numbers")


class StoredSource:
    """Arrays by '/'-joined name, each in a store of its own or small enough to be at hand.

    Attributes:
        place: the checkpoint.
    """

    def __init__(self, place: epath.Path, arrays: Mapping[str, Spec | np.ndarray],
                 expected: Mapping[str, Leaf] | None = None, every_chunk: bool = False) -> None:
        """Opens every array's header.

        Args:
            place: the checkpoint, for messages.
            arrays: name -> TensorStore's description of where it lies, or the array itself.
            expected: what the checkpoint says of some of them.
            every_chunk: its writer left no chunk out, so that one that is not there is lost. Else
                chunks of an array with a fill value may be missing: they read as that value, and
                a warning names the array.

        Raises:
            DamagedCheckpoint: one cannot be opened, or is not what is expected.
            StorageAway: the object store does not answer.
        """
        self.place = place
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._arrays: dict[str, Any] = {}
        self._specs: dict[str, Spec] = {} if every_chunk else {
            name: spec for name, spec in arrays.items() if isinstance(spec, dict)}
        self._leaves: dict[str, Leaf] = {}
        self._filling = threading.Lock()
        self.bytes_read = 0
        """Bytes of arrays read so far, as numbers (not as compressed)."""
        pending = {name: self._open(spec) for name, spec in arrays.items()
                   if isinstance(spec, dict)}
        for name, array in arrays.items():
            if isinstance(array, dict):
                array = self._opened(name, pending[name])
            self._arrays[name] = array
            dtype = array.dtype.numpy_dtype if isinstance(array, ts.TensorStore) else array.dtype
            self._leaves[name] = Leaf(tuple(array.shape), np.dtype(dtype).name)
        for name, leaf in (expected or {}).items():
            if self._leaves[name] != leaf:
                raise DamagedCheckpoint(
                    place, f"'{name}' is {self._leaves[name]}, {leaf} was written")

    def _open(self, spec: Spec) -> Any:
        # A chunk that is not there would otherwise read as zeros, in silence.
        return ts.open({**spec, "fill_missing_data_reads": False}, open=True, read=True,
                       context=self._context)

    def _opened(self, name: str, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise self._failure(f"array '{name}'", error) from error

    def _failure(self, what: str, error: Exception) -> Exception:
        if storage.is_remote(self.place) and storage_is_away(error):
            return storage.StorageAway(
                f"the storage does not answer: {self.place} could not be read", got=error,
                fix="run the same command again when it does")
        return DamagedCheckpoint(self.place, f"{what} cannot be read ({_short(error)})")

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return self._leaves

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`: of each array only what this process's devices need.

        Raises:
            DamagedCheckpoint: an array cannot be read by some process.
            StorageAway: the object store does not answer.
        """
        found: dict[str, Any] = {}
        failure: Exception | None = None
        try:
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                small = [name for name in requests if self._size(name) < _ALONE]
                found.update(zip(small, pool.map(
                    lambda name: self._array(name, requests[name]), small), strict=True))
            for name in requests:
                if name not in found:
                    found[name] = self._array(name, requests[name])
        except (DamagedCheckpoint, storage.StorageError) as error:
            failure = error
        if any_process(failure is not None, "arrays read"):
            raise failure or DamagedCheckpoint(self.place, "another process cannot read it")
        return {name: found[name] for name in requests}

    def read_part(self, name: str, part: Slices) -> np.ndarray:
        """See `PartSource.read_part`."""
        array = self._arrays[name]
        if isinstance(array, np.ndarray):
            return array[part]
        try:
            numbers = self._numbers(name, array, part)
        except (ValueError, OSError) as error:
            raise self._failure(f"array '{name}'", error) from error
        self.bytes_read += numbers.nbytes
        return numbers

    def _numbers(self, name: str, array: Any, part: Slices) -> np.ndarray:
        try:
            return (array[part] if part else array).read().result()
        except ValueError as error:
            if storage_is_away(error) or name not in self._specs or array.fill_value is None:
                raise
            filled = ts.open({**self._specs[name], "fill_missing_data_reads": True}, open=True,
                             read=True, context=self._context).result()
            numbers = (filled[part] if part else filled).read().result()  # or it is another fault
        with self._filling:
            if self._arrays[name] is array:
                self._say_filled(name, array)
                self._arrays[name] = filled
        return numbers

    def _say_filled(self, name: str, array: Any) -> None:
        chunk = array.chunk_layout.write_chunk.shape
        chunks = math.prod(-(-length // size) for length, size in
                           zip(array.shape, chunk, strict=True))
        there = sum(not key.rpartition(b"/")[2].startswith((b".z", b"zarr.json"))
                    for key in array.kvstore.list().result())
        log.warning("%s: %s of %d chunks of array '%s' are not there and read as %s: its writer "
                    "left out chunks of that value, as older versions of Orbax do. One that was "
                    "lost in copying would read the same", self.place,
                    max(chunks - there, 0) or "parts", chunks, name, array.fill_value)

    def _size(self, name: str) -> int:
        leaf = self._leaves[name]
        return math.prod(leaf.shape) * dtype_named(leaf.dtype).itemsize

    def _array(self, name: str, request: Request) -> Any:
        shape = self._leaves[name].shape
        if request.sharding is None:
            whole = self.read_part(name, tuple(slice(0, length) for length in shape))
            return np.asarray(whole, request.dtype)
        parts: dict[tuple, np.ndarray] = {}

        def part_of(index: Slices) -> np.ndarray:
            bounds = tuple(one.indices(length)[:2] for one, length in
                           zip(index, shape, strict=True))
            if bounds not in parts:  # devices that hold the same share one read
                parts[bounds] = np.asarray(self.read_part(
                    name, tuple(slice(*bound) for bound in bounds)), request.dtype)
            return parts[bounds]

        return jax.make_array_from_callback(shape, request.sharding, part_of)


def storage_is_away(error: Exception) -> bool:
    """Whether TensorStore gave up on the network; a damaged file is another matter."""
    return any(word in str(error) for word in (
        "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED"))


def _short(error: Exception) -> str:
    return str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]


class Renamed:
    """A source under other names, and with a few arrays more.

    Attributes:
        source: where the arrays are.
        names: our name -> its own; names left out are not there.
        held: further arrays by our name.
    """

    def __init__(self, source: Source, names: Mapping[str, str],
                 held: Mapping[str, np.ndarray] | None = None) -> None:
        self.source, self.names, self.held = source, dict(names), dict(held or {})
        own = source.leaves
        self._leaves = {name: own[there] for name, there in self.names.items()}
        self._leaves.update((name, Leaf(array.shape, array.dtype.name))
                            for name, array in self.held.items())

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return self._leaves

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`."""
        # One array may be asked for under two names, to be placed in two ways.
        groups: list[dict[str, str]] = []
        for name in requests:
            if (own := self.names.get(name)) is None:
                continue
            group = next((group for group in groups if own not in group), None)
            if group is None:
                groups.append(group := {})
            group[own] = name
        arrays: dict[str, Any] = {}
        for group in groups:
            found = self.source.read({own: requests[name] for own, name in group.items()})
            arrays.update({name: found[own] for own, name in group.items()})
        for name in set(requests) & set(self.held):
            arrays[name] = place(self.held[name].astype(requests[name].dtype),
                                 requests[name].sharding)
        return {name: arrays[name] for name in requests}

    def read_part(self, name: str, part: Slices) -> np.ndarray:
        """See `PartSource.read_part`."""
        if name in self.held:
            return self.held[name][part]
        return read_part(self.source, self.names[name], part)


def scalar(source: Source, name: str) -> int:
    """Returns a number of a source, such as its step."""
    whole = tuple(slice(0, length) for length in source.leaves[name].shape)
    return int(np.asarray(read_part(source, name, whole)).reshape(-1)[0])


def json_of(path: epath.Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        DamagedCheckpoint: it holds none.
    """
    try:
        return json.loads(storage.read_text(path))
    except ValueError as error:
        raise DamagedCheckpoint(path.parent, f"{path.name} is no JSON ({error})") from error


def is_floating(leaf: Leaf) -> bool:
    """Whether an array holds fractions, which a dtype given on the command line applies to."""
    return jnp.issubdtype(dtype_named(leaf.dtype), jnp.floating)
