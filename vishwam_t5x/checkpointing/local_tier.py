"""Frequent checkpoints on the disk of each host, for the restart that finds the hosts as they were.

Each process writes the shards that its own devices hold, one file a step, and talks to nobody. A
step counts only if every process finds its file whole and made for its devices; otherwise the
checkpoint in MODEL_DIR, which needs no particular host, is what the run goes on from.

    LOCAL_FOLDER/RUN/process-3/1200.shards     magic, length of the header, header (JSON), bytes
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import re
import time
import uuid
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint
from vishwam_t5x.core.coordination import exchange
from vishwam_t5x.core.distributed import any_process, from_primary, is_primary

log = logging.getLogger(__name__)

_MAGIC = b"vishwam-shards-1\n"
_KEEP = 2

Index = tuple[tuple[int, int], ...]


def run_id(model_dir: epath.Path) -> str:
    """Returns the name of the run in MODEL_DIR, made up by process 0 where there is none yet.

    Another run that was in the same place has another name, so its shards are not taken for ours.
    """
    name = ""
    if is_primary():
        file = model_dir / "run_id"
        if not file.exists():
            model_dir.mkdir(parents=True, exist_ok=True)
            file.write_text(uuid.uuid4().hex)
        name = file.read_text().strip()
    return from_primary("run id", name)


class LocalTier:
    """The shards of this process, of the last few steps."""

    def __init__(self, folder: str | os.PathLike, run: str, period: int) -> None:
        """Args:
            folder: on a local disk; may be shared by several processes and runs.
            run: see `run_id`.
            period: steps between saves.
        """
        self._folder = (pathlib.Path(folder).expanduser().absolute() / run
                        / f"process-{jax.process_index()}")
        self._period = period
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "local-checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

    def due(self, step: int) -> bool:
        """Returns whether a save is due after `step` steps."""
        return step % self._period == 0

    def save(self, step: int, flat: Mapping[str, Any]) -> None:
        """Copies the shards to the host and writes them in the background; never raises.

        Left out, and said, if the one before is still being written.
        """
        if self._writing is not None and not self._writing.done():
            log.warning("local checkpoint of step %d left out: the one before is still being "
                        "written; raise local_period", step)
            return
        shards = {name: _shards_of(leaf) for name, leaf in flat.items()}
        self._writing = self._pool.submit(self._write, step, shards)

    def _write(self, step: int, shards: Mapping[str, tuple[Any, dict[Index, np.ndarray]]]) -> None:
        start = time.monotonic()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            leaves, blocks, offset, crc = {}, [], 0, 0
            for name, (whole, parts) in shards.items():
                entry = []
                for index, array in parts.items():
                    data = np.ascontiguousarray(array).tobytes()
                    entry.append([index, offset, len(data)])
                    offset, crc = offset + len(data), zlib.crc32(data, crc)
                    blocks.append(data)
                leaves[name] = [list(whole.shape), np.dtype(whole.dtype).name, entry]
            header = json.dumps({"step": step, "processes": jax.process_count(), "crc32": crc,
                                 "bytes": offset, "leaves": leaves}).encode()
            temporary = self._folder / f"{step}.tmp"
            with temporary.open("wb") as file:
                file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
                file.writelines(blocks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(step))
            for old in self._steps()[:-_KEEP]:
                self._path(old).unlink(missing_ok=True)
            log.info("local checkpoint of step %d: %.1f MB in %.2f s", step, offset / 1e6,
                     time.monotonic() - start)
        except OSError as error:
            log.error("local checkpoint of step %d not written: %s", step, error)
            with contextlib.suppress(OSError):
                (self._folder / f"{step}.tmp").unlink(missing_ok=True)

    def agreed_steps(self) -> list[int]:
        """Returns the steps of which every process has a file, rising; all call it together."""
        self.wait()
        have = [set(json.loads(steps)) for steps in exchange(
            "local checkpoints listed", json.dumps(self._steps()))]
        return sorted(set.intersection(*have))

    def restore(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arrays of a step; all processes call it together.

        Args:
            step: one of `agreed_steps`.
            wanted: {name: `jax.ShapeDtypeStruct` with a sharding, or a NumPy array}.

        Raises:
            DamagedCheckpoint: in every process: some file is not whole, or is of other devices.
        """
        found: dict[str, Any] | None = None
        why = ""
        try:
            found = self._read(step, wanted)
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = str(error) or type(error).__name__
        if any_process(found is None, "local checkpoint read"):
            raise DamagedCheckpoint(self._path(step), why or "another process says so")
        assert found is not None
        return found

    def _read(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        data = self._path(step).read_bytes()
        begin = len(_MAGIC) + 8
        if not data.startswith(_MAGIC):
            raise ValueError("not a file of shards")
        body = begin + int.from_bytes(data[len(_MAGIC):begin], "little")
        header = json.loads(data[begin:body])
        content = memoryview(data)[body:]
        if len(content) != header["bytes"] or zlib.crc32(content) != header["crc32"]:
            raise ValueError("it differs from what was written")
        if header["processes"] != jax.process_count() or header["leaves"].keys() != wanted.keys():
            raise ValueError("it is of another number of processes, or of another model")
        arrays = {}
        for name, leaf in wanted.items():
            shape, dtype, entries = header["leaves"][name]
            if tuple(shape) != tuple(leaf.shape) or np.dtype(dtype) != np.dtype(leaf.dtype):
                raise ValueError(f"{name} has another shape or dtype")
            parts = {_index(index): (offset, size) for index, offset, size in entries}
            arrays[name] = _place(leaf, lambda index, parts=parts, dtype=dtype: _array(
                content, parts, index, dtype))
        return arrays

    def forget_after(self, step: int) -> None:
        """Deletes this process's files of later steps: they are of another future now."""
        for newer in self._steps():
            if newer > step:
                self._path(newer).unlink(missing_ok=True)

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Waits, and ends the thread."""
        self.wait()
        self._pool.shutdown()

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / f"{step}.shards"

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(entry.name.partition(".")[0]) for entry in self._folder.iterdir()
                      if re.fullmatch(r"\d+\.shards", entry.name))


def _index(pairs: Any) -> Index:
    return tuple((int(first), int(last)) for first, last in pairs)


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Index:
    assert index is not None
    return _index(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _shards_of(leaf: Any) -> tuple[Any, dict[Index, np.ndarray]]:
    """Returns (shape and dtype, {place: part}) of what this process holds, each part once.

    Copied, since the arrays are about to be donated.
    """
    whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if not isinstance(leaf, jax.Array):
        return whole, {_bounds((slice(None),) * leaf.ndim, leaf.shape): np.array(leaf)}
    parts: dict[Index, np.ndarray] = {}
    for shard in leaf.addressable_shards:
        place = _bounds(shard.index, leaf.shape)
        if place not in parts:
            parts[place] = np.array(shard.data)
    return whole, parts


def _array(content: memoryview, parts: Mapping[Index, tuple[int, int]], index: Index, dtype: str
           ) -> np.ndarray:
    offset, size = parts[index]
    shape = [last - first for first, last in index]
    return np.frombuffer(content[offset:offset + size], np.dtype(dtype)).reshape(shape)


def _place(leaf: Any, part: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return part(_bounds((slice(None),) * leaf.ndim, leaf.shape)).copy()
    sharding = leaf.sharding
    for index in sharding.addressable_devices_indices_map(tuple(leaf.shape)).values():
        part(_bounds(index, leaf.shape))  # KeyError: these devices held other shards
    return jax.make_array_from_callback(
        tuple(leaf.shape), sharding, lambda index: part(_bounds(index, leaf.shape)))
