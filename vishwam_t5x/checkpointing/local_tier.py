"""Frequent checkpoints on the disk of each host, for the restart that finds the hosts as they were.

Each process writes the shards that its own devices hold, one file a step, and talks to nobody. A
step counts only if every process finds its file whole, made for its devices, and of the same line:
the steps from one restore to the next. Otherwise the checkpoint in MODEL_DIR, which needs no
particular host, is what the run goes on from.

    LOCAL_FOLDER/RUN/process-3/1200.LINE.shards   magic, length of the header, header (JSON), bytes
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint
from vishwam_t5x.core import storage
from vishwam_t5x.core.coordination import exchange
from vishwam_t5x.core.distributed import any_process, from_primary, is_primary

log = logging.getLogger(__name__)

_MAGIC = b"vishwam-shards-1\n"
_KEEP = 2
_ABANDONED = 7 * 24 * 3600.0  # seconds after which what nobody touches is nobody's

Index = tuple[tuple[int, int], ...]


def run_id(model_dir: epath.Path) -> str:
    """Returns the name of the run in MODEL_DIR, made up by process 0 where there is none yet.

    Another run that was in the same place has another name, so its shards are not taken for ours.
    """
    name = ""
    if is_primary():
        file = model_dir / "run_id"
        with contextlib.suppress(FileNotFoundError):
            name = storage.read_text(file).strip()
        if not name:
            name = uuid.uuid4().hex
            storage.write_text(file, name)
    return from_primary("run id", name)


class LocalTier:
    """The shards of this process, of the last few steps."""

    def __init__(self, folder: str | os.PathLike, run: str, period: int) -> None:
        """Removes what killed writes and runs long over have left; all processes call it together.

        Args:
            folder: on a local disk; may be shared by several processes and runs.
            run: see `run_id`.
            period: steps between saves.
        """
        root = pathlib.Path(folder).expanduser().absolute()
        self._folder = root / run / f"process-{jax.process_index()}"
        self._period = period
        self._line = _new_line()
        self._agreed: dict[int, str] = {}
        _sweep(root, self._folder)
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
        temporary = self._folder / f"{step}.tmp"
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
            header = json.dumps({"step": step, "line": self._line, "processes": jax.process_count(),
                                 "crc32": crc, "bytes": offset, "leaves": leaves}).encode()
            self._keep_newest(_KEEP)
            # Hosts that lag need the one before the last; a full disk needs the room more.
            if shutil.disk_usage(self._folder).free < offset + len(header):
                self._keep_newest(1)
            with temporary.open("wb") as file:
                file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
                file.writelines(blocks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(step, self._line))
            self._keep_newest(_KEEP)
            log.info("local checkpoint of step %d: %.1f MB in %.2f s", step, offset / 1e6,
                     time.monotonic() - start)
        except OSError as error:
            log.error("local checkpoint of step %d not written: %s", step, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _keep_newest(self, count: int) -> None:
        for step, line in self._found()[:-count]:
            self._path(step, line).unlink(missing_ok=True)

    def agreed_steps(self) -> list[int]:
        """Returns the steps of which every process has a file, rising; all call it together."""
        self.wait()
        have = [{(step, line) for step, line in json.loads(found)} for found in exchange(
            "local checkpoints listed", json.dumps(self._found()))]
        self._agreed = dict(sorted(set.intersection(*have)))
        return sorted(self._agreed)

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
            raise DamagedCheckpoint(self._path(step, self._agreed[step]),
                                    why or "another process says so")
        assert found is not None
        return found

    def _read(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        line = self._agreed[step]
        data = self._path(step, line).read_bytes()
        begin = len(_MAGIC) + 8
        if not data.startswith(_MAGIC):
            raise ValueError("not a file of shards")
        body = begin + int.from_bytes(data[len(_MAGIC):begin], "little")
        header = json.loads(data[begin:body])
        content = memoryview(data)[body:]
        if len(content) != header["bytes"] or zlib.crc32(content) != header["crc32"]:
            raise ValueError("it differs from what was written")
        if (header["step"], header["line"]) != (step, line):
            raise ValueError("it is of another step or another line of the run")
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

    def begin_line(self, step: int) -> None:
        """What is saved from now on comes after `step`; all processes call it together.

        This process's files of later steps are of another future, and deleted.
        """
        self._line = _new_line()
        for newer, line in self._found():
            if newer > step:
                try:
                    self._path(newer, line).unlink(missing_ok=True)
                except OSError as error:  # of another line, so it harms nobody
                    log.error("an old local checkpoint could not be deleted: %s", error)

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self, saved: int | None = None) -> None:
        """Waits, ends the thread, and deletes what is not needed any more.

        Args:
            saved: the newest step that is in MODEL_DIR; None if the last save there failed.
        """
        self.wait()
        self._pool.shutdown()
        if saved is not None and all(step <= saved for step, _ in self._found()):
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other processes have theirs in it
                self._folder.parent.rmdir()

    def _path(self, step: int, line: str) -> pathlib.Path:
        return self._folder / f"{step}.{line}.shards"

    def _found(self) -> list[tuple[int, str]]:
        """(step, line) of this process's files, rising."""
        if not self._folder.is_dir():
            return []
        return sorted((int(entry.name.split(".")[0]), entry.name.split(".")[1])
                      for entry in self._folder.iterdir()
                      if re.fullmatch(r"\d+\.[0-9a-f]+\.shards", entry.name))


def _new_line() -> str:
    return from_primary("line of local checkpoints", uuid.uuid4().hex[:12])


def _sweep(root: pathlib.Path, own: pathlib.Path) -> None:
    """Deletes remains: of our killed writes, of processes we have no more, of runs long over."""
    now = time.time()
    try:
        for file in own.glob("*.tmp"):
            file.unlink(missing_ok=True)
        for folder in root.glob("*/process-*"):
            number = folder.name.removeprefix("process-")
            if folder.parent == own.parent:
                over = number.isdigit() and int(number) >= jax.process_count()
            else:
                over = now - folder.stat().st_mtime > _ABANDONED
            if over:
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty
                    folder.parent.rmdir()
    except OSError as error:  # another process sweeps too
        log.info("old local checkpoints could not all be deleted: %s", error)


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
