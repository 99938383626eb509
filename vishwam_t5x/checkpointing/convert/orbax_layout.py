"""Orbax's folder of arrays, ours and T5X's: read whole, and written array by array.

    _METADATA                the names, as JSON; 'a.b.c' is where the array of ('a', 'b', 'c') lies
    manifest.ocdbt, d/, …    one database of all arrays, each in zarr's layout
    a.b.c/                   or, in older ones, a zarr folder for each array

Orbax itself writes a tree that is in memory; a conversion has only one array there at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from vishwam_t5x.checkpointing.convert.report import PART_BYTES, parts_of, read_part
from vishwam_t5x.checkpointing.convert.stores import (
    Spec,
    StoredSource,
    dtype_named,
    in_database,
    json_of,
    zarr_folder,
)
from vishwam_t5x.checkpointing.manifest import COMMITTED, DamagedCheckpoint
from vishwam_t5x.checkpointing.sources import Source
from vishwam_t5x.core import storage

TREE, DATABASE = "_METADATA", "manifest.ocdbt"
_FILE_BYTES = 256 * 2**20  # what the database puts into one file
_DICT_KEY = 2  # Orbax's number for the key of a dictionary


def open_orbax(folder: epath.Path) -> StoredSource:
    """Opens a folder with a file `_METADATA`; names are '/'-joined.

    Raises:
        DamagedCheckpoint: an array cannot be opened, or the names cannot be read.
        StorageAway: the object store does not answer.
    """
    metadata = json_of(folder / TREE)
    arrays: dict[str, Spec | np.ndarray] = {}
    try:
        database = metadata.get("use_ocdbt", storage.exists(folder / DATABASE))
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        for entry in metadata["tree_metadata"].values():
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            if any("/" in key or key in (".", "..") for key in keys):
                raise DamagedCheckpoint(folder, f"{TREE} has a name that leads elsewhere: {keys}")
            if entry["value_metadata"].get("skip_deserialize"):
                continue  # an empty branch
            where = in_database if database else zarr_folder
            arrays["/".join(keys)] = where(folder, ".".join(keys), driver)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(folder, f"{TREE} is not as Orbax writes it ({error!r})"
                                ) from error
    # Orbax's name of what its newer versions do; what older ones wrote lacks it.
    return StoredSource(folder, arrays, every_chunk=bool(
        metadata.get("store_array_data_equal_to_fill_value")))


def write_orbax(source: Source, names: Mapping[str, str], folder: epath.Path,
                dtypes: Mapping[str, str], on_host: frozenset[str] = frozenset()) -> None:
    """Writes a folder that Orbax restores, array by array; `_METADATA` last.

    Args:
        source: where the arrays are.
        names: name to write -> the source's, in the order to read.
        folder: new.
        dtypes: name to write -> dtype to write.
        on_host: arrays that Orbax shall take for NumPy's.
    """
    transactions = _Transactions()
    entries: dict[str, Any] = {}
    for name in names:
        shape, dtype = source.leaves[names[name]].shape, dtype_named(dtypes[name])
        keys = name.split("/")
        _write_array(folder, ".".join(keys), source, names[name], dtype, transactions)
        value: dict[str, Any] = {"value_type": "jax.Array", "skip_deserialize": False,
                                 "write_shape": list(shape)}
        if name in on_host:
            value = {"value_type": "np.ndarray", "skip_deserialize": False}
        entries[name] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": value}
    transactions.commit()
    storage.write_text(folder / TREE, json.dumps(
        {"tree_metadata": {repr(tuple(name.split("/"))): entries[name] for name in sorted(entries)},
         "use_ocdbt": True, "use_zarr3": False,
         "store_array_data_equal_to_fill_value": True, "custom_metadata": None}))


class _Transactions:
    """Parts written together: a database grows a new root with every write of its own."""

    def __init__(self) -> None:
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._open, self._bytes = ts.Transaction(), 0

    def write(self, spec: Spec, part: tuple[slice, ...], numbers: np.ndarray) -> None:
        """Writes a part of an array, now or with some of those that follow."""
        store = ts.open(spec, create=True, open=True, context=self._context,
                        transaction=self._open).result()
        (store[part] if part else store).write(numbers).result()
        self._bytes += numbers.nbytes
        if self._bytes >= PART_BYTES:
            self.commit()

    def commit(self) -> None:
        """Waits until all is written."""
        self._open.commit_async().result()
        self._open, self._bytes = ts.Transaction(), 0


def _write_array(folder: epath.Path, name: str, source: Source, own: str, dtype: np.dtype,
                 transactions: _Transactions) -> None:
    shape = source.leaves[own].shape
    chunks = _chunk_shape(shape, dtype.itemsize)
    spec = in_database(folder, name)
    spec["kvstore"]["target_data_file_size"] = _FILE_BYTES
    spec |= {"dtype": dtype.name, "store_data_equal_to_fill_value": True,
             "metadata": {"shape": list(shape), "chunks": list(chunks),
                          "compressor": {"id": "zstd", "level": 1}}}
    for part in parts_of(shape, dtype.itemsize, grid=chunks):
        transactions.write(spec, part, np.asarray(read_part(source, own, part), dtype))


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The whole array, or as many of its first rows as 64 MiB hold."""
    return tuple(max(1, one.stop) for one in next(parts_of(shape, itemsize)))


def write_step_metadata(folder: epath.Path, items: Mapping[str, str] | str) -> None:
    """Writes what Orbax's manager keeps of a finished checkpoint: `_CHECKPOINT_METADATA`.

    Args:
        folder: of the checkpoint.
        items: {item: class that wrote it}, or the class, where the folder itself is the item.
    """
    now = time.time_ns()
    storage.write_text(folder / "_CHECKPOINT_METADATA", json.dumps(
        {"item_handlers": items if isinstance(items, str) else dict(items), "metrics": {},
         "performance_metrics": {}, "init_timestamp_nsecs": now, "commit_timestamp_nsecs": now,
         "custom_metadata": {}}))


def commit(folder: epath.Path, name: str) -> None:
    """Writes the file that says, in an object store, that a checkpoint is whole.

    Args:
        folder: of the checkpoint.
        name: of the checkpoint.
    """
    storage.write_text(folder / COMMITTED, f"Checkpoint commit was successful to {name}")
