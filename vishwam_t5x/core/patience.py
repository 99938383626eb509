"""Trying again what an object store did not answer, with back-off and for a bounded time."""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from vishwam_t5x.core.errors import Resumable, UserError

T = TypeVar("T")

PATIENCE_VARIABLE = "VISHWAM_STORAGE_SECONDS"
_PATIENCE = 300.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Errors, by library, that mean that a request did not get through.
_LOST = {
    "aiohttp": {"ClientError"}, "requests": {"RequestException"}, "urllib3": {"HTTPError"},
    "botocore": {"HTTPClientError", "ConnectionError", "IncompleteReadError"},
    "gcsfs": {"ChecksumError"}, "google": {"TransportError", "TimeoutError"}}
_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# Said by the disk of this machine, never by a store.
_OWN_DISK = frozenset({errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG})
_BUGS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError, ImportError,
         MemoryError)

log = logging.getLogger(__name__)


class StorageError(OSError, UserError):
    """A storage did not do what was asked; says which path and what to do.

    It is an OSError, so that a run goes on without what could not be written, and a UserError, so
    that at a start it is told on one screen.
    """

    def __init__(self, problem: str, got: object = None, fix: str | None = None) -> None:
        UserError.__init__(self, problem, got, fix)

    __str__ = UserError.__str__
    __reduce__ = UserError.__reduce__  # type: ignore[assignment]


class StorageAway(StorageError, Resumable):
    """An object store did not answer in time: no mistake; the same command goes on."""


def patience() -> float:
    """Seconds for which one operation is tried: $VISHWAM_STORAGE_SECONDS, or 300."""
    text = os.environ.get(PATIENCE_VARIABLE)
    try:
        seconds = float(text) if text else _PATIENCE
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise UserError(f"${PATIENCE_VARIABLE} must be a positive number of seconds", got=text)
    return seconds


def _lost(error: BaseException) -> bool:
    """Whether a library says that a request did not get through."""
    return bool(getattr(error, "retryable", False)) or any(
        kind.__name__ in _LOST.get(kind.__module__.split(".")[0], ())
        for kind in type(error).__mro__) and not isinstance(error, ValueError)  # as for a bad URL


def _for_want_of_a_token(error: BaseException | None) -> bool:
    """Whether a refusal comes of a token server that did not answer: then it passes."""
    while error is not None:
        if _lost(error) or any(isinstance(part, Exception) and _lost(part) for part in error.args):
            return True
        error = error.__cause__
    return False


def _code(error: Exception) -> int | None:
    """The status of the answer, as the libraries name it: a number, or one in a string."""
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int):  # an `http.HTTPStatus` too
            return int(value)
        if isinstance(value, str) and value.isdigit():
            return int(value)
    return None


def _refused(error: Exception) -> bool:
    return not _for_want_of_a_token(error) and (
        isinstance(error, PermissionError) or _code(error) in (401, 403)
        or str(error).startswith("Forbidden")
        or type(error).__name__ in ("DefaultCredentialsError", "NoCredentialsError",
                                    "RefreshError"))


def _by_own_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and (error.errno in _OWN_DISK or isinstance(
        error, PermissionError) and error.filename is not None)


def _passing(error: Exception) -> bool:
    """Whether trying again may help, of what is no refusal."""
    if _for_want_of_a_token(error):
        return True
    code = _code(error)
    if code is not None:
        return code >= 500 or code in (408, 429)
    return isinstance(error, OSError | TimeoutError)


def patiently(what: str, path: str | os.PathLike, call: Callable[[], T]) -> T:
    """Calls `call` until it succeeds, waiting longer each time a passing fault stops it.

    Args:
        what: for the message: 'read', 'written', ….
        path: for the message.
        call: may be called several times.

    Raises:
        StorageAway: `patience()` seconds are over.
        StorageError: at once: the request was refused, or this machine's own disk is full.
        FileNotFoundError, FileExistsError: as `call` does, at once.
    """
    begin, pause, tries = time.monotonic(), _FIRST_PAUSE, 0
    while True:
        tries += 1
        try:
            return call()
        except Exception as error:
            if isinstance(error, (UserError, *_FILES, *_BUGS)):
                raise
            if _by_own_disk(error):
                raise StorageError(f"{path} could not be {what}: the disk of this machine refuses",
                                   got=_brief(error),
                                   fix="free space on it, or choose another folder") from error
            if _refused(error):
                raise StorageError(
                    f"access was refused: {path} could not be {what}", got=_brief(error),
                    fix="log in (gcloud auth application-default login) as someone who may read "
                        "and write there, e.g. with the role storage.objectAdmin") from error
            if not _passing(error):
                raise StorageError(f"the storage takes no such request: {path} could not be {what}",
                                   got=_brief(error), fix="look at the path") from error
            left = begin + patience() - time.monotonic()
            if left <= pause:
                raise StorageAway(
                    f"the storage does not answer: {path} could not be {what}",
                    got=f"{_brief(error)} (tried {tries} times in "
                        f"{time.monotonic() - begin:.0f} s)",
                    fix=f"look at the network and the storage's status, then run the same command "
                        f"again; {PATIENCE_VARIABLE}=SECONDS waits longer") from error
            log.warning("%s could not be %s (%s); trying again", path, what, _brief(error))
            # The half that is random keeps the hosts of a pod from coming back all at once.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
