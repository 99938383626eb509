"""Parameters written as a Hugging Face folder that `from_pretrained` loads.

A part of an array is in memory at a time, where the source reads parts: where each lies in its
file follows from the shapes alone. (The safetensors package wants a file's arrays together.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from vishwam_t5x.checkpointing.convert import t5_network
from vishwam_t5x.checkpointing.convert.huggingface import CONFIG, INDEX, ONE, VOCABULARY
from vishwam_t5x.checkpointing.convert.report import (
    PART_BYTES,
    ConversionReport,
    PartSource,
    Slices,
)
from vishwam_t5x.checkpointing.convert.t5_network import T5Network
from vishwam_t5x.checkpointing.layers import Recipe, make_plan
from vishwam_t5x.checkpointing.sources import Request, Source
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError

MAX_SHARD_BYTES = 4 << 30
GENERATION_CONFIG = "generation_config.json"
_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an array goes: file, offset of its first byte in the data, and how it looks there."""

    file: str
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool


def write_huggingface(source: Source, place: epath.Path, network: T5Network | None = None, *,
                      dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES,
                      vocabulary: str | None = None, origin: str = "") -> ConversionReport:
    """Writes the parameters of `source` as a Hugging Face folder.

    Args:
        source: parameters under our names, layers stacked or not.
        place: a new or empty folder.
        network: what config.json shall say; None: what shapes tell, see `t5_network.from_leaves`.
        dtype: what parameters are cast to; None: each keeps its own.
        max_shard_bytes: a safetensors file gets no more arrays than these bytes hold; a larger
            model gets several files and an index.
        vocabulary: path of a SentencePiece model to copy into the folder.
        origin: what the report calls the source.

    Returns:
        The report; its note names the files, and what config.json says that nobody said.

    Raises:
        UserError: the parameters are not this network's, or the folder is not empty.
    """
    if storage.names(place):
        raise UserError("the folder to write to is not empty", got=place,
                        fix="name a new one, or delete it first")
    network = network or t5_network.from_leaves(source.leaves)
    recipes = _recipes(source, network)
    dtypes = {name: np.dtype(dtype or source.leaves[recipe.sources[0]].dtype)
              for name, recipe in recipes.items()}
    places = _lay_out(network, dtypes, max_shard_bytes)
    shown = sorted({str(found) for found in dtypes.values()})
    config = t5_network.to_config_json(network, shown[0] if len(shown) == 1 else "float32")
    with _local_folder(place) as folder:
        _write_arrays(folder, source, recipes, places)
    files = list(dict.fromkeys(where.file for where in places.values()))
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(map(_num_bytes, places.values()))},
                 "weight_map": {where.name: where.file for where in places.values()}}
        storage.write_text(place / INDEX, json.dumps(index, indent=2) + "\n")
        files.append(INDEX)
    if vocabulary is not None:
        storage.write_bytes(place / VOCABULARY, storage.read_bytes(vocabulary))
        files.append(VOCABULARY)
    storage.write_text(place / GENERATION_CONFIG, json.dumps(t5_network.GENERATION) + "\n")
    files.append(GENERATION_CONFIG)
    # Last: a folder with a config.json is whole.
    storage.write_text(place / CONFIG, json.dumps(config, indent=2) + "\n")
    notes = [f"files: {', '.join([*files, CONFIG])}"]
    if network.assumed:
        notes.append("assumed, as no parameter tells it: " + "; ".join(network.assumed))
    return ConversionReport(
        origin, str(place), tuple((name, where.name) for name, where in places.items()),
        note="\n".join(notes))


def _recipes(source: Source, network: T5Network) -> dict[str, Recipe]:
    plan = make_plan({name: network.shape(name) for name in network.places()},
                     {name: leaf.shape for name, leaf in source.leaves.items()})
    lines = [f"{name}: {wanted} wanted, {found} found" for name, wanted, found in plan.mismatched]
    lines += [f"{name}: missing" for name in plan.missing]
    lines += [f"{name}: nothing is made of it" for name in plan.extra]
    if lines:
        more = [f"… and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise UserError(f"these parameters are not those of the {network.kind} to be written",
                        got="\n       ".join(lines[:8] + more),
                        fix="give the gin file of the model they were trained with")
    return plan.recipes


def _num_bytes(where: _Place) -> int:
    return int(np.prod(where.shape, dtype=np.int64)) * where.dtype.itemsize


def _lay_out(network: T5Network, dtypes: Mapping[str, np.dtype], limit: int) -> dict[str, _Place]:
    shards: list[int] = [0]
    found: dict[str, tuple[int, _Place]] = {}
    for name, (theirs, transposed) in network.places().items():
        shape = network.shape(name)[::-1] if transposed else network.shape(name)
        where = _Place("", theirs, 0, shape, dtypes[name], transposed)
        if shards[-1] and shards[-1] + _num_bytes(where) > limit:
            shards.append(0)
        found[name] = (len(shards), dataclasses.replace(where, offset=shards[-1]))
        shards[-1] += _num_bytes(where)
    count = len(shards)
    return {name: dataclasses.replace(where, file=ONE if count == 1 else
                                      f"model-{number:05}-of-{count:05}.safetensors")
            for name, (number, where) in found.items()}


@contextlib.contextmanager
def _local_folder(place: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a folder to write into; what lies in it then goes to `place`, if that is remote."""
    if not storage.is_remote(place):
        folder = storage.local(place)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vishwam-") as name:
        folder = pathlib.Path(name)
        yield folder
        for file in sorted(folder.iterdir()):
            storage.upload(file, place / file.name)


def _write_arrays(folder: pathlib.Path, source: Source, recipes: Mapping[str, Recipe],
                  places: Mapping[str, _Place]) -> None:
    with contextlib.ExitStack() as stack:
        files: dict[str, tuple[BinaryIO, int]] = {}
        for file in dict.fromkeys(where.file for where in places.values()):
            handle = stack.enter_context(open(folder / file, "wb"))
            header = _header([where for where in places.values() if where.file == file])
            handle.write(header)
            files[file] = handle, len(header)
        for name, names in _by_sources(recipes).items():
            read = _reader(source, name)
            for made in names:
                handle, start = files[places[made].file]
                handle.seek(start + places[made].offset)
                for block in _blocks(read, recipes[made], places[made]):
                    handle.write(block.tobytes())


def _reader(source: Source, name: str) -> Callable[[Slices], np.ndarray]:
    """Reads parts of an array; one that can only be read whole is read once."""
    if isinstance(source, PartSource):
        return lambda part: source.read_part(name, part)
    dtype = np.dtype(source.leaves[name].dtype)
    whole = source.read({name: Request(dtype, None)})[name]
    return lambda part: whole[part]


def _blocks(read: Callable[[Slices], np.ndarray], recipe: Recipe, where: _Place
            ) -> Iterator[np.ndarray]:
    """An array as it goes into the file, a block of rows at a time."""
    row = max(1, _num_bytes(where) // where.shape[0])
    rows = max(1, PART_BYTES // row)
    for start in range(0, where.shape[0], rows):
        block = [slice(start, min(start + rows, where.shape[0])),
                 *(slice(0, size) for size in where.shape[1:])]
        part = block[::-1] if where.transposed else block
        if recipe.axis is not None:
            part.insert(recipe.axis, slice(recipe.index, recipe.index + 1))
        array = read(tuple(part))
        if recipe.axis is not None:
            array = np.squeeze(array, recipe.axis)
        yield np.ascontiguousarray(array.T if where.transposed else array, where.dtype)


def _by_sources(recipes: Mapping[str, Recipe]) -> dict[str, list[str]]:
    """What is made of each array: a stacked one is read once for all its layers."""
    groups: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        (source,) = recipe.sources
        groups.setdefault(source, []).append(name)
    return groups


def _header(places: list[_Place]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON padded to 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for where in places:
        entries[where.name] = {"dtype": _CODES[str(where.dtype)], "shape": list(where.shape),
                               "data_offsets": [where.offset, where.offset + _num_bytes(where)]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
