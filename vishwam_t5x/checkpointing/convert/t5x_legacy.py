"""T5X's legacy checkpoints: a msgpack file `checkpoint`, and a folder for each larger array.

    checkpoint                         the tree: small arrays themselves, of others where they are
    target.encoder.encoder_norm.scale/ a zarr v2 array: gzip level 1, chunks of at most 64 MiB
    state.param_states.….v/            the same, of the optimizer's moments

Arrays inside the msgpack file are Flax's: extension 1 holds (shape, dtype, bytes). Nothing else is
decoded, and no object is ever made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

from vishwam_t5x.checkpointing.convert.report import parts_of, read_part
from vishwam_t5x.checkpointing.convert.stores import (
    Spec,
    StoredSource,
    dtype_named,
    key_value_store,
    zarr_folder,
)
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint, Leaf
from vishwam_t5x.checkpointing.sources import Source
from vishwam_t5x.core import storage
from vishwam_t5x.core.trees import unflatten_names

FILE = "checkpoint"
_VERSION = 3  # of the layout, since 2021
_ARRAY, _NUMBER = 1, 3  # Flax's extension types that hold numbers; 2 are Python's complex ones
_PLACEHOLDER = "PLACEHOLDER://"  # Orbax, while it still wrote such a file
_CHUNKED = "__msgpack_chunked_array__"  # Flax cuts arrays of more than 1 GiB
_CHUNK_BYTES = 64 * 2**20


def unpack(data: bytes) -> dict[str, Any]:
    """Returns the tree in a file `checkpoint`; its leaves are arrays, dictionaries or strings.

    Raises:
        ValueError: it is something else, or is cut short.
    """
    try:
        tree = msgpack.unpackb(data, ext_hook=_extension, raw=False, strict_map_key=False)
    except (msgpack.UnpackException, TypeError, OverflowError) as error:
        raise ValueError(f"no msgpack: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError("no tree of arrays")
    return tree


def _extension(code: int, data: bytes) -> np.ndarray:
    if code not in (_ARRAY, _NUMBER):
        raise ValueError(f"msgpack extension {code}, which is no array")
    shape, dtype, content = msgpack.unpackb(data, raw=False)
    if not isinstance(dtype, str | bytes) or not isinstance(content, bytes):
        raise ValueError(f"msgpack extension {code}, which is no array")
    kind = dtype_named(dtype if isinstance(dtype, str) else dtype.decode())
    if len(content) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array {dtype}{shape} of {len(content)} bytes")
    return np.frombuffer(content, kind).reshape(shape)


def _leaves(tree: Mapping[Any, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        below = f"{name}/{key}" if name else str(key)
        if isinstance(value, dict) and value.get(_CHUNKED):
            parts = value["chunks"]
            flat = np.concatenate([np.ravel(parts[key]) for key in sorted(parts, key=int)])
            shape = value["shape"]
            yield below, flat.reshape([shape[key] for key in sorted(shape, key=int)]
                                      if isinstance(shape, dict) else shape)
        elif isinstance(value, dict) and not isinstance(value.get("driver"), str):
            yield from _leaves(value, below)
        else:
            yield below, value


def open_legacy(place: epath.Path) -> StoredSource:
    """Opens a folder that holds a file `checkpoint`; names are T5X's ('target/…', 'state/…').

    Raises:
        DamagedCheckpoint: the file, or an array that it names, is not what T5X writes.
        StorageAway: the object store does not answer.
    """
    try:
        tree = unpack(storage.read_bytes(place / FILE))
        # Flax's mutable variables lie beside the optimizer; so does all in Orbax's older files.
        branches = {**tree, **tree.get("optimizer", {})}
        found = [(name, leaf) for name, leaf in _leaves(
            {key: value for key, value in branches.items() if key not in ("version", "optimizer")}
        ) if leaf is not None]
        arrays: dict[str, Spec | np.ndarray] = {}
        expected: dict[str, Leaf] = {}
        for name, leaf in found:
            arrays[name], said = _place_of(place, name, leaf)
            if said is not None:
                expected[name] = said
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(place, f"file '{FILE}' is not as T5X writes it ({error})"
                                ) from error
    return StoredSource(place, arrays, expected)


def _place_of(place: epath.Path, name: str, leaf: Any) -> tuple[Spec | np.ndarray, Leaf | None]:
    """An array, or where it lies; and its shape and dtype, if the file says."""
    if isinstance(leaf, np.ndarray):
        return leaf, None
    if isinstance(leaf, bool | int | float):
        return np.asarray(leaf), None
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return zarr_folder(place, _folder(leaf.removeprefix(_PLACEHOLDER))), None
    if not isinstance(leaf, dict) or leaf["driver"] != "zarr":
        raise ValueError(f"'{name}' is no array")
    # Of the path only its last part: the checkpoint may have been copied since.
    path = leaf.get("kvstore", {}).get("path") or leaf["path"]
    said = leaf.get("metadata") or {}
    known = Leaf(tuple(said["shape"]), dtype_named(leaf["dtype"]).name) if (
        "shape" in said and "dtype" in leaf) else None
    return zarr_folder(place, _folder(path)), known


def _folder(path: str) -> str:
    name = path.rstrip("/").rsplit("/", 1)[-1]
    if name in ("", ".", ".."):
        raise ValueError(f"an array lies in {path!r}")
    return name


def chunk_shape(shape: tuple[int, ...], itemsize: int, most: int = _CHUNK_BYTES
                ) -> tuple[int, ...]:
    """Returns the shape of the pieces that T5X cuts an array into: whole divisors, the longest axis
    made shorter, divisor by divisor, until a piece has at most `most` bytes.
    """
    chunk = list(shape)
    while math.prod(chunk) * itemsize > most and max(chunk) > 1:
        axis = chunk.index(max(chunk))
        chunk[axis] = next(size for size in range(chunk[axis] - 1, 0, -1)
                           if shape[axis] % size == 0)
    return tuple(chunk)


def write_legacy(source: Source, names: Mapping[str, str], folder: epath.Path,
                 dtypes: Mapping[str, str]) -> None:
    """Writes a legacy checkpoint, array by array; the file `checkpoint`, which makes one, last.

    Args:
        source: where the arrays are.
        names: T5X's name ('target/…', 'state/…') -> the source's, in the order to read.
        folder: new.
        dtypes: T5X's name -> dtype to write.
    """
    tree: dict[str, Any] = {}
    for name in names:
        leaf = source.leaves[names[name]]
        dtype = dtype_named(dtypes[name])
        if _is_inline(name, leaf, names, source):
            tree[name] = _inline(np.asarray(read_part(
                source, names[name], tuple(slice(0, n) for n in leaf.shape)), dtype))
            continue
        chunks = chunk_shape(leaf.shape, dtype.itemsize)
        spec = {"driver": "zarr", "dtype": dtype.name,
                "kvstore": key_value_store(folder / name.replace("/", ".")),
                "metadata": {"shape": list(leaf.shape), "chunks": list(chunks),
                             "compressor": {"id": "gzip", "level": 1}}}
        store = ts.open(spec, create=True, open=False).result()
        for part in parts_of(leaf.shape, dtype.itemsize, grid=chunks):
            store[part].write(np.asarray(read_part(source, names[name], part), dtype)).result()
        tree[name] = {"driver": "zarr", "dtype": dtype.name,
                      "kvstore": {"driver": "file", "path": name.replace("/", ".") + "/"},
                      "metadata": {"chunks": list(chunks), "compressor": {
                          "id": "gzip", "level": 1}, "shape": list(leaf.shape)}}
    by_name = unflatten_names({name: tree[name] for name in sorted(tree)})
    storage.write_bytes(folder / FILE, msgpack.packb(
        {"version": _VERSION, "optimizer": by_name}, use_bin_type=True))


def _is_inline(name: str, leaf: Leaf, names: Mapping[str, str], source: Source) -> bool:
    """Whether T5X keeps an array in the msgpack file: all that have no axes of a parameter."""
    if name.startswith("target/"):
        return False
    # Moments that have their parameter's shape lie in a folder, rows, columns and unused ones not.
    param = "target/" + name.removeprefix("state/param_states/").rpartition("/")[0]
    return param not in names or source.leaves[names[param]].shape != leaf.shape


def _inline(array: np.ndarray) -> msgpack.ExtType:
    return msgpack.ExtType(_ARRAY, msgpack.packb(
        (list(array.shape), array.dtype.name, array.tobytes("C")), use_bin_type=True))
