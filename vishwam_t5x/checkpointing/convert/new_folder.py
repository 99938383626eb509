"""The folder that a conversion writes: one writer, whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator

from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.core import holder, lease, storage
from vishwam_t5x.core.errors import UserError

log = logging.getLogger(__name__)

TEMPORARY = ".convert-tmp"
"""What the name of a folder ends with while it is written."""


@contextlib.contextmanager
def new_folder(target: epath.Path, meanwhile: contextlib.AbstractContextManager[None]
               ) -> Iterator[epath.Path]:
    """Yields the folder to write to: another one, which is renamed if all went well; in an object
    store the very one, where what makes a checkpoint of it is written last. Removed if not.

    Args:
        target: not there yet.
        meanwhile: entered when nobody else writes there.

    Raises:
        UserError: the target is there, or another conversion writes it.
    """
    _refuse_taken(target)
    with alone(target):
        if not storage.is_remote(target):
            with meanwhile:
                yield from _renamed(target.parent / (target.name + TEMPORARY), target)
            return
        _refuse_taken(target)  # by now another may have finished
        with meanwhile:
            try:
                yield target
            except BaseException:
                with contextlib.suppress(storage.StorageError):  # what has failed is raised
                    directories.remove(target)
                raise


def _taken(target: epath.Path) -> UserError:
    return UserError("there is something already, and nothing is overwritten", got=str(target),
                     fix="give another --to, or move it away")


def _refuse_taken(target: epath.Path) -> None:
    if storage.names(target) or storage.is_file(target):
        raise _taken(target)


@contextlib.contextmanager
def alone(target: epath.Path | str) -> Iterator[None]:
    """Keeps other conversions out of a target, in whatever process; a kill ends it.

    In a bucket of Google's that takes some seconds to be known: see `core.lease`. What other stores
    have cannot keep anybody out: there what came between is found at the end.

    Raises:
        UserError: another conversion writes there, or has written there meanwhile.
    """
    beside = f"{target}{TEMPORARY}"
    if str(target).startswith("gs://"):
        with lease.held(beside, waits=0.0, refusal=lambda found, _: _busy(
                target, f", by {holder.name(found)}")):
            yield
    elif storage.is_remote(target):
        yield from _watched(f"{beside}/{lease.FILE_NAME}", target)
    else:
        os.makedirs(storage.parent(target), exist_ok=True)
        with _locked(f"{beside}.lock", target):
            yield


@contextlib.contextmanager
def _locked(path: str, target: object) -> Iterator[None]:
    held = False
    while not held:
        with open(path, "w", encoding="utf-8") as lock:
            try:  # ends with the process, however that ends
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _busy(target) from None
            with contextlib.suppress(FileNotFoundError):
                held = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
            if not held:  # whoever had it has removed the file since it was opened
                continue
            try:
                yield
            finally:
                os.unlink(path)


def _busy(target: object, who: str = "") -> UserError:
    return UserError("another conversion is writing there", got=f"{target}{who}",
                     fix="wait for it, or give another --to")


def _watched(mark: str, target: object) -> Iterator[None]:
    found = mine = uuid.uuid4().hex
    storage.write_text(mark, mine)
    try:
        yield
    finally:
        with contextlib.suppress(storage.StorageError):
            try:
                found = storage.read_text(mark)
            except FileNotFoundError:  # removed by another that has ended
                found = ""
            if found == mine:
                storage.remove(mark)
    if found != mine:
        raise UserError("another conversion has been writing there: what is there may be of both",
                        got=str(target), fix="delete it, and run one of them again")


def _renamed(temporary: epath.Path, target: epath.Path) -> Iterator[epath.Path]:
    if temporary.exists():
        log.warning("removing what an interrupted conversion had left: %s", temporary)
        temporary.rmtree()
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, target)
        except OSError as error:
            raise _taken(target) from error
    finally:
        temporary.rmtree(missing_ok=True)
