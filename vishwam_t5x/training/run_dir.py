"""The files of one run: what is in MODEL_DIR and under which name.

Of a MODEL_DIR in gs:// the checkpoints are written straight into the bucket; all other files, most
of which grow line by line, live in a scratch folder of this process that `mirror` copies there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import time
import weakref
from collections.abc import Iterator
from typing import IO, Any

from absl import logging
from etils import epath

from vishwam_t5x.core import holder, lease, storage
from vishwam_t5x.core.errors import Resumable, UserError
from vishwam_t5x.training import scratch
from vishwam_t5x.training.mirror import Mirror

_ENDING = 5.0  # seconds for a process of this machine that is just ending
# What a resumed run reads.
_READ_BACK = ("config.gin", "data.json", "metrics.jsonl", "ledger.jsonl", "skipped_batches.jsonl")


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths inside a model directory.

    Attributes:
        path: MODEL_DIR, or the scratch folder that stands for it.
        url: MODEL_DIR in gs://, or None.
        mirror: copies `path` to `url`; None without.
    """

    path: pathlib.Path
    url: str | None = None
    mirror: Mirror | None = None

    @classmethod
    def open(cls, model_dir: str | os.PathLike) -> RunDir:
        """Creates the directory if it is new.

        Raises:
            UserError: it is empty, a file, or cannot be written.
        """
        if not str(model_dir):
            raise UserError("MODEL_DIR is empty", fix="--gin.MODEL_DIR='\"runs/my_run\"'")
        if storage.is_remote(model_dir):
            return cls._open_remote(os.fspath(model_dir).rstrip("/"))
        path = pathlib.Path(model_dir).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("MODEL_DIR cannot be made", got=f"{path}: {error.strerror}",
                            fix="choose a folder that can be written") from error
        if not os.access(path, os.W_OK):
            raise UserError("MODEL_DIR cannot be written", got=str(path),
                            fix="choose another folder, or change its permissions")
        return cls(path)

    @classmethod
    def _open_remote(cls, url: str) -> RunDir:
        if not url.startswith("gs://"):
            raise UserError("MODEL_DIR must be a folder, or in a bucket of Google Cloud Storage",
                            got=url, fix="a path, or gs://BUCKET/FOLDER")
        folder, alive = scratch.make()
        try:
            _read_back(url, folder)
        except BaseException:
            scratch.remove(folder, alive)
            raise
        found = cls(folder, url, Mirror(folder, url))
        weakref.finalize(found, scratch.remove, folder, alive)
        return found

    @contextlib.contextmanager
    def held(self, wait: float) -> Iterator[None]:
        """Holds the directory for one process: two that train into it would undo each other's work.

        The lock dies with its process, however that ends. A file system without locks has none.
        A bucket has none either: there see `lease`. While it is held, the mirror runs.

        Args:
            wait: seconds to wait for a holder; at most a few where it is alive on this machine.

        Raises:
            UserError: another process of this machine holds it.
            Resumable: one of another machine does, or did: its lock may outlive it.
        """
        if self.url is not None:
            assert self.mirror is not None
            with lease.held(self.url, waits=wait) as holding:
                _read_back(self.url, self.path)  # the last holder may have gone on until now
                with self.mirror.guarded(holding.check), self.mirror:
                    yield
            return
        with (self.path / ".lock").open("a+") as lock:
            try:
                self._take(lock, wait)
                lock.truncate(0)
                lock.write(json.dumps(holder.sign()))
                lock.flush()
            except OSError as error:
                logging.info("%s cannot be locked: %s", self.path, error)
            yield

    def _take(self, lock: IO[str], wait: float) -> None:
        begin, said = time.monotonic(), False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            found = _signed(lock)
            here = holder.lives_here(found)
            limit = min(wait, _ENDING) if here else wait
            if time.monotonic() - begin >= limit:
                break
            if not said:
                said = True
                logging.warning("%s is held by %s: waiting up to %g s for it", self.path,
                                holder.name(found), limit)
            time.sleep(min(0.5, limit))
        if here:
            raise UserError("another process is training into this MODEL_DIR",
                            got=f"{self.path}, held by {holder.name(found)}",
                            fix="wait for it, stop it, or choose another MODEL_DIR")
        raise Resumable(f"{self.path} is still held after {limit:g} s, by {holder.name(found)}: if "
                        "it is training, stop one of the two; if it is gone, its lock will go too")

    @property
    def place(self) -> str:
        """MODEL_DIR as the user gave it."""
        return self.url or str(self.path)

    @property
    def config(self) -> pathlib.Path:
        """The resolved gin configuration."""
        return self.path / "config.gin"

    @property
    def model_info(self) -> pathlib.Path:
        """Every parameter: shape, axes, bytes."""
        return self.path / "model-info.txt"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> pathlib.Path | epath.Path:
        """One folder a checkpoint, named by its step."""
        return (self.path if self.url is None else epath.Path(self.url)) / "checkpoints"

    @property
    def data(self) -> pathlib.Path:
        """Which examples the run reads: tasks, rates, hashes; see `same_data`."""
        return self.path / "data.json"

    @property
    def ledger(self) -> pathlib.Path:
        """Where the time went; see `ledger`."""
        return self.path / "ledger.jsonl"

    @property
    def profile(self) -> pathlib.Path:
        """Profiler traces."""
        return self.path / "profile"

    def write(self, path: pathlib.Path, text: str) -> None:
        """Writes a whole file or, if killed, none of it; in a bucket before this returns."""
        storage.write_text(path, text)
        if self.mirror is not None:
            self.mirror.flush()

    def shown(self, path: pathlib.Path) -> str:
        """Returns where a user finds a file of the run."""
        return str(path) if self.url is None else storage.join(
            self.url, path.relative_to(self.path).as_posix())

    def keep(self) -> None:
        """Brings all files to where MODEL_DIR is; a fault is logged, not raised.

        Raises:
            StorageAway: another process may hold MODEL_DIR by now: this one must commit nothing.
        """
        if self.mirror is not None:
            self.mirror.check()
            self.mirror.try_flush()

    def close(self) -> None:
        """As `keep`, without raising: for what is written while a run is being closed."""
        if self.mirror is not None:
            self.mirror.try_flush()


def _signed(lock: IO[str]) -> dict[str, Any]:
    try:
        lock.seek(0)
        found = json.loads(lock.read(4096))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_back(url: str, folder: pathlib.Path) -> None:
    there = storage.names(url)
    for name in _READ_BACK:
        if name in there:
            storage.download(storage.join(url, name), folder / name)
