"""Trying again what an object store did not answer, with back-off and for a bounded time."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from vishwam_t5x.core.errors import UserError

T = TypeVar("T")

PATIENCE_VARIABLE = "VISHWAM_STORAGE_SECONDS"
_PATIENCE = 300.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Libraries whose errors mean that a request did not get through.
_CARRIERS = frozenset({"aiohttp", "requests", "urllib3", "botocore", "aiobotocore"})

log = logging.getLogger(__name__)


class StorageError(OSError, UserError):
    """An object store did not answer, or refused; says which path and what to do.

    It is an OSError, so that a run goes on without what could not be written, and a UserError, so
    that at a start it is told on one screen.
    """

    def __init__(self, problem: str, got: object = None, fix: str | None = None) -> None:
        UserError.__init__(self, problem, got, fix)

    __str__ = UserError.__str__
    __reduce__ = UserError.__reduce__  # type: ignore[assignment]


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


def _refused(error: Exception) -> bool:
    return (isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403)
            or str(error).startswith("Forbidden")
            or type(error).__name__ in ("DefaultCredentialsError", "NoCredentialsError",
                                        "RefreshError"))


def _passing(error: Exception) -> bool:
    """Whether trying again may help."""
    if isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError
                  | NotADirectoryError | PermissionError) or _refused(error):
        return False
    code = getattr(error, "code", None)
    if str(code).isdigit():
        return int(str(code)) >= 500 or int(str(code)) in (408, 429)
    if isinstance(error, OSError | TimeoutError):
        return True
    return any(kind.__module__.split(".")[0] in _CARRIERS for kind in type(error).__mro__)


def patiently(what: str, path: str | os.PathLike, call: Callable[[], T]) -> T:
    """Calls `call` until it succeeds, waiting longer each time a passing fault stops it.

    Args:
        what: for the message: 'read', 'written', ….
        path: for the message.
        call: may be called several times.

    Raises:
        StorageError: `patience()` seconds are over, or access was refused.
        FileNotFoundError, FileExistsError: as `call` does, at once.
    """
    begin, pause, tries = time.monotonic(), _FIRST_PAUSE, 0
    while True:
        tries += 1
        try:
            return call()
        except Exception as error:
            if isinstance(error, UserError):
                raise
            if _refused(error):
                raise StorageError(
                    f"access was refused: {path} could not be {what}", got=_brief(error),
                    fix="log in (gcloud auth application-default login) as someone who may read "
                        "and write there, e.g. with the role storage.objectAdmin") from error
            if not _passing(error):
                raise
            left = begin + patience() - time.monotonic()
            if left <= pause:
                raise StorageError(
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
