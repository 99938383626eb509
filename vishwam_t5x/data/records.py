"""Cached clean examples: ArrayRecord shards, a manifest, and a table of lengths, read without TF.

A split of a task is one directory::

    CACHE_DIR/tasks/<task>/<split>/shard-00000-of-00002.array_record …  one msgpack dict a record
                                   lengths.npy    int32 [num_records, num_columns]
                                   manifest.json  what the above must contain

The lengths are all that packing needs, so a plan of a batch opens no shard.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.feature_info import META_PREFIX as META_PREFIX
from vishwam_t5x.data.feature_info import FeatureInfo as FeatureInfo
from vishwam_t5x.data.feature_info import explain_mismatch as explain_mismatch
from vishwam_t5x.data.feature_info import is_history as is_history
from vishwam_t5x.data.feature_info import length_columns as length_columns
from vishwam_t5x.data.feature_info import modality_of as modality_of
from vishwam_t5x.objectives.masking import PatchSpec

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
LENGTHS_NAME = "lengths.npy"


class DamagedRecord(Exception):
    """One record cannot be used; training goes on without it.

    Attributes:
        task: the task's name.
        record: the record's number in the split.
        why: what is wrong with it.
    """

    def __init__(self, task: str, record: int, why: str) -> None:
        self.task, self.record, self.why = task, record, why
        super().__init__(f"{task} record {record}: {why}")

    def __reduce__(self) -> tuple:
        return type(self), (self.task, self.record, self.why)


class TaskRecords(Protocol):
    """What a mixture asks of a task: a cache on disk, or records made up for a test."""

    name: str

    @property
    def num_records(self) -> int: ...

    @property
    def features(self) -> Mapping[str, FeatureInfo]: ...

    @property
    def length_table(self) -> tuple[tuple[str, ...], np.ndarray]: ...

    def clean_lengths(self, record: int) -> dict[str, int]: ...

    def read(self, record: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One shard as it was when the cache was finished: file name, records, bytes, sha256."""

    file: str
    num_records: int
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cached split contains.

    Attributes:
        task: the task's name.
        split: the split's name.
        features: name -> shape and dtype.
        length_columns: (feature, axis) of each column of lengths.npy.
        shards: in record order.
        lengths_sha256: of lengths.npy.
        metadata: whatever the task wants remembered (vocabulary, codebook); JSON values.
        bad_examples: [{'example': number, 'why': text}] left out when the cache was written.
        largest_ids: the largest id that occurs, by feature of ids (text and codes).
        format_version: of this layout.
    """

    task: str
    split: str
    features: dict[str, FeatureInfo]
    length_columns: tuple[tuple[str, int], ...]
    shards: tuple[ShardInfo, ...]
    lengths_sha256: str
    metadata: dict[str, Any]
    bad_examples: tuple[dict[str, Any], ...] = ()
    largest_ids: dict[str, int] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def num_records(self) -> int:
        return sum(shard.num_records for shard in self.shards)

    def to_json(self) -> str:
        """Returns the text of manifest.json."""
        values = dataclasses.asdict(self)
        values["features"] = {name: {"shape": list(info.shape), "dtype": info.dtype}
                              for name, info in self.features.items()}
        values["num_records"] = self.num_records
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: the text is no manifest.
        """
        values = json.loads(text)
        num_records = values.pop("num_records")
        values["features"] = {name: FeatureInfo(tuple(info["shape"]), info["dtype"])
                              for name, info in values["features"].items()}
        values["length_columns"] = tuple((name, axis) for name, axis in values["length_columns"])
        values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
        values["bad_examples"] = tuple(values["bad_examples"])
        manifest = cls(**values)
        if manifest.num_records != num_records:
            raise ValueError(f"{num_records} records, but its shards hold {manifest.num_records}")
        return manifest


def file_sha256(path: str | os.PathLike) -> str:
    """Returns the hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TaskCache:
    """The records of one split of one task, readable in any order from several threads."""

    def __init__(self, directory: pathlib.Path, manifest: Manifest, lengths: np.ndarray,
                 patch_specs: Mapping[str, PatchSpec]) -> None:
        self.name = manifest.task
        self.directory = directory
        self.manifest = manifest
        self._sizes, self._patch_specs = lengths, dict(patch_specs)
        self._source: Any = None
        self._kept: dict[int, dict[str, Any]] | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: str | os.PathLike,
             patch_specs: Mapping[str, PatchSpec] | None = None) -> TaskCache:
        """Opens a finished cache; shards are opened at the first read.

        Args:
            directory: CACHE_DIR/tasks/<task>/<split>.
            patch_specs: how each modality with features of rank 2 and more is cut into patches;
                without them such a cache can be read, but its lengths are not known.

        Raises:
            UserError: there is no finished cache, it is of another format, or a file of it is
                missing or changed.
        """
        directory = pathlib.Path(directory)
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise UserError("no finished cache here", got=directory,
                            fix="write it with `vishwam cache --task_or_mixture=NAME`")
        try:
            manifest = Manifest.from_json(path.read_text())
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(directory, f"{MANIFEST_NAME} cannot be read: {error}") from error
        if manifest.format_version != FORMAT_VERSION:
            raise _broken(directory,
                          f"format version {manifest.format_version}, not {FORMAT_VERSION}")
        _check_files(directory, manifest)
        lengths = np.load(directory / LENGTHS_NAME)
        if lengths.shape != (manifest.num_records, len(manifest.length_columns)):
            raise _broken(directory, f"{LENGTHS_NAME} has shape {lengths.shape}")
        return cls(directory, manifest, lengths, patch_specs or {})

    @property
    def num_records(self) -> int:
        return self.manifest.num_records

    @property
    def features(self) -> dict[str, FeatureInfo]:
        return self.manifest.features

    @property
    def metadata(self) -> dict[str, Any]:
        return self.manifest.metadata

    @functools.cached_property
    def patch_grids(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """(feature, (rows, columns) of patches) of every size of pictures that occurs."""
        found: list[tuple[str, tuple[int, int]]] = []
        for first, (name, axis) in enumerate(self.manifest.length_columns):
            spec = self._patch_specs.get(modality_of(name))
            if axis or spec is None:
                continue
            if is_history(name) and len(shape := self.features[name].shape) > 2:
                height, width = (size or 0 for size in shape[1:3])
                found.append((name, (height // spec.height, width // spec.width)))
            elif len(self.features[name].shape) > 1:
                found += [(name, (int(height) // spec.height, int(width) // spec.width))
                          for height, width in np.unique(self._sizes[:, first:first + 2], axis=0)]
        return tuple(found)

    def clean_lengths(self, record: int) -> dict[str, int]:
        """Returns the length of each feature of a record: elements if 1-D, frames, or patches.

        Raises:
            UserError: a modality has no `PatchSpec`, or a size does not divide into its patches.
        """
        names, table = self.length_table
        return dict(zip(names, table[record].tolist(), strict=True))

    @functools.cached_property
    def length_table(self) -> tuple[tuple[str, ...], Int[np.ndarray, "records features"]]:
        """(feature names, int32 [num_records, num_features]) of `clean_lengths`."""
        names = tuple(dict.fromkeys(name for name, _ in self.manifest.length_columns))
        table = np.zeros((self.num_records, len(names)), np.int32)
        columns = [name for name, _ in self.manifest.length_columns]
        for index, name in enumerate(names):
            sizes = self._sizes[:, columns.index(name):][:, :columns.count(name)]
            table[:, index] = (sizes[:, 0] if sizes.shape[1] == 1
                               else self._num_patches(name, sizes))
        return names, table

    def _num_patches(self, name: str, sizes: np.ndarray) -> np.ndarray:
        spec = self._patch_specs.get(modality_of(name))
        if spec is None:
            raise UserError(
                f"task '{self.name}' has a feature '{name}' of pixels or spectrogram values, but "
                "it is not known how to cut it into patches",
                got=f"patch specs of {sorted(self._patch_specs) or 'nothing'}",
                fix=f"give a PatchSpec for '{modality_of(name)}', or leave the task out")
        distinct, which = np.unique(sizes, axis=0, return_inverse=True)
        rest = [size or 1 for size in self.features[name].shape[2:]]  # channels: always known
        try:
            counts = [spec.num_patches((int(height), int(width), *rest))
                      for height, width in distinct]
        except UserError as error:
            raise UserError(f"feature '{name}' of task '{self.name}': {error.problem}", error.got,
                            error.fix) from error
        return np.asarray(counts, np.int32)[which.reshape(-1)]

    @functools.cached_property
    def decoded_bytes(self) -> int:
        """Bytes of all records once decoded, without their string features."""
        columns = [name for name, _ in self.manifest.length_columns]
        total = 0
        for name, (shape, dtype) in self.features.items():
            if name in columns:
                first = columns.index(name)
                elements = self._sizes[:, first:first + columns.count(name)].astype(
                    np.int64).prod(axis=1).sum()
                rest = [size or 1 for size in shape[columns.count(name):]]
                total += int(elements * np.prod(rest, dtype=np.int64) * np.dtype(dtype).itemsize)
        return total

    def keep_in_memory(self) -> None:
        """From now on a record is read from disk once only: for tasks of many epochs."""
        self._kept = {} if self._kept is None else self._kept

    def read(self, record: int) -> dict[str, Any]:
        """Returns the clean example of a record: read-only arrays, bytes for string features.

        Raises:
            DamagedRecord: the bytes cannot be read, or hold other than what the manifest says.
        """
        if self._kept is not None and record in self._kept:
            return dict(self._kept[record])
        example = self._read(record)
        if self._kept is not None:
            self._kept[record] = example
        return dict(example)

    def _read(self, record: int) -> dict[str, Any]:
        source = self._open_shards()
        try:
            example = _decode(source[record])
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            # RuntimeError: ArrayRecord's checksum; the others: msgpack on wrong bytes.
            raise DamagedRecord(self.name, record, f"cannot be decoded: {error}") from error
        why = explain_mismatch(example, self.features)
        if why is None and self._sizes[record].tolist() != [
                example[name].shape[axis] for name, axis in self.manifest.length_columns]:
            why = f"its lengths differ from {LENGTHS_NAME}"
        if why is not None:
            raise DamagedRecord(self.name, record, why)
        return example

    def verify(self) -> None:
        """Reads every shard and compares its sha256 with the manifest.

        Raises:
            UserError: a shard's contents have changed.
        """
        for shard in self.manifest.shards:
            if file_sha256(self.directory / shard.file) != shard.sha256:
                raise _broken(self.directory, f"{shard.file} has changed since it was written")

    def _open_shards(self) -> Any:
        with self._lock:
            if self._source is None:
                # Not through grain: its import breaks other threads' (tests/test_laws.py).
                from array_record.python import array_record_data_source as array_records

                paths = [str(self.directory / shard.file) for shard in self.manifest.shards]
                try:
                    self._source = array_records.ArrayRecordDataSource(paths)
                except RuntimeError as error:
                    raise _broken(self.directory, f"a shard cannot be opened: {error}") from error
            return self._source


def _check_files(directory: pathlib.Path, manifest: Manifest) -> None:
    """Sizes of shards, hash of the lengths: cheap, so done at every opening."""
    for shard in manifest.shards:
        if not (path := directory / shard.file).is_file():
            raise _broken(directory, f"{shard.file} is missing")
        if (size := path.stat().st_size) != shard.num_bytes:
            raise _broken(directory, f"{shard.file} has {size} bytes, not {shard.num_bytes}")
    if not (path := directory / LENGTHS_NAME).is_file():
        raise _broken(directory, f"{LENGTHS_NAME} is missing")
    if file_sha256(path) != manifest.lengths_sha256:
        raise _broken(directory, f"{LENGTHS_NAME} has changed since it was written")


def _broken(directory: pathlib.Path, why: str) -> UserError:
    task = directory.parent.name
    return UserError(f"the cache of task '{task}' cannot be used: {why}", directory,
                     f"write it again: vishwam cache --task_or_mixture={task} --overwrite")


def _decode(record: bytes) -> dict[str, Any]:
    from flax import serialization

    example = serialization.msgpack_restore(record)
    if not isinstance(example, dict):
        raise ValueError(f"holds a {type(example).__name__}, not a dict of features")
    return example
