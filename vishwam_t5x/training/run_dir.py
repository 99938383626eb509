"""The files of one run: what is in MODEL_DIR and under which name."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
from collections.abc import Iterator

from absl import logging

from vishwam_t5x.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths inside a model directory.

    Attributes:
        path: MODEL_DIR.
    """

    path: pathlib.Path

    @classmethod
    def open(cls, model_dir: str | os.PathLike) -> RunDir:
        """Creates the directory if it is new.

        Raises:
            UserError: it is empty, a file, or cannot be written.
        """
        if not str(model_dir):
            raise UserError("MODEL_DIR is empty", fix="--gin.MODEL_DIR='\"runs/my_run\"'")
        if "://" in str(model_dir):
            # Taken for a path, it would become a folder called 'gs:' in the current one.
            raise UserError("MODEL_DIR must be a folder of a file system, not a bucket",
                            got=str(model_dir),
                            fix="mount the bucket (gcsfuse), and give the folder")
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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the directory for one process: two that train into it would undo each other's work.

        The lock dies with its process, however that ends. A file system without locks has none.

        Raises:
            UserError: another process holds it.
        """
        with (self.path / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    "another process is training into this MODEL_DIR", got=str(self.path),
                    fix="wait for it, stop it, or choose another MODEL_DIR") from None
            except OSError as error:
                logging.info("%s cannot be locked: %s", self.path, error)
            yield

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
    def checkpoints(self) -> pathlib.Path:
        """One folder a checkpoint, named by its step."""
        return self.path / "checkpoints"

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
        """Writes a whole file or, if killed, none of it."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)
