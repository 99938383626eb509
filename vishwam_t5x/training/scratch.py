"""Scratch folders that stand for a MODEL_DIR in a bucket; those of processes that were killed go.

Each holds a file that its process has locked for as long as it lives. A process that is killed, or
that the watchdog ends, deletes nothing; the next one on the machine deletes what nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from typing import IO

_PREFIX = "vishwam-run-"
_LOCK = "alive.lock"


def make() -> tuple[pathlib.Path, IO[str]]:
    """Returns a new folder, and the file to keep open while it is used; deletes abandoned ones."""
    root = pathlib.Path(tempfile.gettempdir())
    for folder in root.glob(f"{_PREFIX}*"):
        if _is_abandoned(folder / _LOCK):
            shutil.rmtree(folder, ignore_errors=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX))
    file = (made / f"new.{_LOCK}").open("w", encoding="utf-8")
    with contextlib.suppress(OSError):  # no locks here: then nobody else can take it either
        fcntl.flock(file, fcntl.LOCK_EX)
    os.rename(file.name, made / _LOCK)  # from now on it can be found abandoned, and is locked
    return made, file


def remove(folder: pathlib.Path, file: IO[str]) -> None:
    """Deletes a folder that `make` returned."""
    shutil.rmtree(folder, ignore_errors=True)
    file.close()


def _is_abandoned(lock: pathlib.Path) -> bool:
    try:
        with lock.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:  # held, of another user, or not there yet
        return False
