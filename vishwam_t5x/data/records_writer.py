"""Writing a cached split so that a kill at any moment loses at most the shard being written.

The work happens in `<split>.incomplete/`. A piece is a shard's file, its lengths and a side file;
the side file is renamed into place last, so its presence is what makes the piece count. `finish`
writes the manifest and renames the directory: a reader sees a whole cache or none.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data import records

MAX_SHARD_RECORDS = 65_536
MAX_SHARD_BYTES = 256 * 2**20


class TaskCacheWriter:
    """Writes one split. Records come in numbered parts (the source's shards), each in order."""

    def __init__(self, directory: str | os.PathLike, task: str, split: str,
                 features: Mapping[str, records.FeatureInfo],
                 metadata: Mapping[str, Any] | None = None, *, num_parts: int = 1,
                 max_shard_records: int = MAX_SHARD_RECORDS,
                 max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Opens the work directory, keeping the finished pieces of an interrupted run.

        Args:
            directory: where the finished cache shall be.
            task: the task's name.
            split: the split's name.
            features: what every record must hold.
            metadata: JSON values to remember in the manifest.
            num_parts: independent streams of records that make up the split.
            max_shard_records: records after which a new shard is begun.
            max_shard_bytes: bytes of encoded records after which a new shard is begun.
        """
        self.directory = pathlib.Path(directory)
        self.work = work_directory(self.directory)
        self.task, self.split, self.features = task, split, dict(features)
        self.metadata = dict(metadata or {})
        self.num_parts = num_parts
        self.max_shard_records, self.max_shard_bytes = max_shard_records, max_shard_bytes
        self.columns = records.length_columns(self.features)
        self.id_features = [name for name, info in self.features.items() if info.dtype == "int32"
                            and len(info.shape) == 1 and not name.startswith(records.META_PREFIX)]
        self.resumed_pieces = 0
        self._open_work()

    def _open_work(self) -> None:
        """Keeps finished pieces if they are of the same task as now; removes everything else."""
        identity = {"format_version": records.FORMAT_VERSION, "task": self.task,
                    "features": {name: [list(info.shape), info.dtype]
                                 for name, info in self.features.items()},
                    "metadata": self.metadata, "num_parts": self.num_parts}
        identity = json.loads(json.dumps(identity))
        marker = self.work / "identity.json"
        try:
            same = json.loads(marker.read_text()) == identity
        except (OSError, ValueError):
            same = False
        if not same:
            if self.work.exists():
                shutil.rmtree(self.work)
            self.work.mkdir(parents=True)
            _write_atomically(marker, json.dumps(identity))
        keep = {marker.name}
        for _, _, _, files in self._pieces():
            keep.update(files)
            self.resumed_pieces += 1
        for path in self.work.iterdir():
            if path.name not in keep:
                path.unlink()

    def _pieces(self) -> Iterator[tuple[int, int, dict[str, Any], list[str]]]:
        """Yields (part, number, side file, file names) of the finished pieces, in order.

        The pieces of a part are numbered from 0 without gaps; one beyond a gap (its predecessor
        was damaged) would repeat records and is not counted.
        """
        for part in range(self.num_parts):
            number = 0
            while (path := self.work / f"{_stem(part, number)}.json").is_file():
                yield part, number, json.loads(path.read_text()), [
                    path.name, f"{_stem(part, number)}.npy",
                    f"{_stem(part, number)}.array_record"]
                number += 1

    def part(self, part: int) -> PartWriter | None:
        """Returns a writer that goes on where the part stopped; None if the part is complete."""
        assert 0 <= part < self.num_parts
        done = [(number, side) for at, number, side, _ in self._pieces() if at == part]
        if done and done[-1][1]["last"]:
            return None
        return PartWriter(self, part, len(done), sum(side["num_examples"] for _, side in done))

    def finish(self) -> records.Manifest:
        """Turns the complete parts into the cache and returns its manifest.

        An older cache in the same place is replaced; it stays readable until the new one is whole.
        """
        pieces = list(self._pieces())
        complete = {part for part, _, side, _ in pieces if side["last"]}
        assert complete == set(range(self.num_parts)), f"parts not written: {complete}"
        final = self.work.with_name(self.directory.name + ".finished")
        if final.exists():
            shutil.rmtree(final)
        final.mkdir()
        filled = [piece for piece in pieces if piece[2]["num_records"]]
        shards, lengths, bad = [], [], []
        for index, (part, number, side, _) in enumerate(filled):
            name = f"shard-{index:05d}-of-{len(filled):05d}.array_record"
            os.link(self.work / f"{_stem(part, number)}.array_record", final / name)
            lengths.append(np.load(self.work / f"{_stem(part, number)}.npy"))
            shards.append(records.ShardInfo(name, side["num_records"], side["num_bytes"],
                                            side["sha256"]))
        largest: dict[str, int] = {}
        for part, _, side, _ in pieces:
            bad += [{"part": part, **entry} for entry in side["bad"]]
            for name, value in side["largest_ids"].items():
                largest[name] = max(value, largest.get(name, value))
        table = (np.concatenate(lengths) if lengths
                 else np.zeros((0, len(self.columns)), np.int32))
        np.save(final / records.LENGTHS_NAME, table)
        manifest = records.Manifest(
            self.task, self.split, self.features, self.columns, tuple(shards),
            records.file_sha256(final / records.LENGTHS_NAME), self.metadata, tuple(bad),
            largest)
        _write_atomically(final / records.MANIFEST_NAME, manifest.to_json())
        _replace_directory(final, self.directory)
        shutil.rmtree(self.work)
        return manifest


class PartWriter:
    """Writes the records of one part; `num_examples` of them are already in finished pieces."""

    def __init__(self, cache: TaskCacheWriter, part: int, number: int, num_examples: int) -> None:
        self._cache, self._part, self._number = cache, part, number
        self.num_examples = num_examples
        self._begin()

    def _begin(self) -> None:
        from array_record.python import array_record_module

        self._path = self._cache.work / f"{_stem(self._part, self._number)}.array_record"
        self._writer = array_record_module.ArrayRecordWriter(str(self._path), "group_size:1")
        self._lengths: list[list[int]] = []
        self._bad: list[dict[str, Any]] = []
        self._largest_ids: dict[str, int] = {}
        self._num_examples = self._num_bytes = 0

    def write(self, example: Mapping[str, Any]) -> str | None:
        """Adds a record; returns None, or why the example was left out (and counts it as bad)."""
        why = records.explain_mismatch(example, self._cache.features)
        if why is not None:
            self.leave_out(why)
            return why
        data = encode(example)
        self._writer.write(data)
        self._num_bytes += len(data)
        self._lengths.append([example[name].shape[axis] for name, axis in self._cache.columns])
        for name in self._cache.id_features:
            if example[name].size:
                self._largest_ids[name] = max(int(example[name].max()),
                                              self._largest_ids.get(name, 0))
        self._count_example()
        return None

    def leave_out(self, why: str) -> None:
        """Counts an example that yields no record, with the reason."""
        self._bad.append({"example": self.num_examples, "why": why})
        self._count_example()

    def _count_example(self) -> None:
        self.num_examples += 1
        self._num_examples += 1
        if (len(self._lengths) >= self._cache.max_shard_records
                or self._num_bytes >= self._cache.max_shard_bytes):
            self._end(last=False)
            self._number += 1
            self._begin()

    def close(self) -> None:
        """The part is complete."""
        self._end(last=True)

    def _end(self, last: bool) -> None:
        self._writer.close()
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        np.save(self._path.with_suffix(".npy"),
                np.asarray(self._lengths, np.int32).reshape(-1, len(self._cache.columns)))
        side = {"num_records": len(self._lengths), "num_examples": self._num_examples,
                "num_bytes": self._path.stat().st_size,
                "sha256": records.file_sha256(self._path), "bad": self._bad, "last": last,
                "largest_ids": self._largest_ids}
        _write_atomically(self._path.with_suffix(".json"), json.dumps(side))


def work_directory(directory: str | os.PathLike) -> pathlib.Path:
    """Returns where a cache is written before it is finished."""
    path = pathlib.Path(directory)
    return path.with_name(path.name + ".incomplete")


def encode(example: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a record: a msgpack dict as flax.serialization writes it."""
    from flax import serialization

    return serialization.msgpack_serialize(dict(example))


def write_mixture(cache_dir: str | os.PathLike, name: str, rates: Mapping[str, float]) -> None:
    """Writes down the tasks of a mixture and their rates, in the mixture's order."""
    path = cache_directory.mixture_file(cache_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, json.dumps({"tasks": dict(rates)}, indent=1) + "\n")


def _stem(part: int, number: int) -> str:
    return f"part-{part:05d}-{number:05d}"


def _write_atomically(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _replace_directory(new: pathlib.Path, place: pathlib.Path) -> None:
    """Renames `new` to `place`; what was there is moved aside first and deleted after."""
    old = place.with_name(place.name + ".replaced")
    if old.exists():
        shutil.rmtree(old)
    if place.exists():
        os.rename(place, old)
    os.rename(new, place)
    if old.exists():
        shutil.rmtree(old)
