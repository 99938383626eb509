"""The folder that a conversion writes: one writer, whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError

log = logging.getLogger(__name__)

TEMPORARY = ".convert-tmp"
"""What the name of a folder ends with while it is written."""


@contextlib.contextmanager
def new_folder(target: epath.Path, meanwhile: contextlib.AbstractContextManager[None]
               ) -> Iterator[epath.Path]:
    """Yields the folder to write to: another one, which is renamed if all went well; in an object
    store the very one, where what makes a checkpoint of it is written last. Removed if not.
    """
    taken = UserError("there is something already, and nothing is overwritten", got=str(target),
                      fix="give another --to, or move it away")
    if storage.names(target) or storage.is_file(target):
        raise taken
    if storage.is_remote(target):
        with meanwhile:
            try:
                yield target
            except BaseException:
                with contextlib.suppress(storage.StorageError):  # what has failed is raised
                    directories.remove(target)
                raise
        return
    temporary = target.parent / (target.name + TEMPORARY)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{temporary}.lock", "w", encoding="utf-8") as lock:
        try:  # ends with the process, however that ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another conversion is writing there", got=str(target),
                            fix="wait for it, or give another --to") from None
        try:
            with meanwhile:
                yield from _renamed(temporary, target, taken)
        finally:
            os.unlink(lock.name)


def _renamed(temporary: epath.Path, target: epath.Path, taken: UserError) -> Iterator[epath.Path]:
    if temporary.exists():
        log.warning("removing what an interrupted conversion had left: %s", temporary)
        temporary.rmtree()
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, target)
        except OSError as error:
            raise taken from error
    finally:
        temporary.rmtree(missing_ok=True)
