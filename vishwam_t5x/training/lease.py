"""Who trains into a MODEL_DIR in a bucket: an object that its holder writes anew every few seconds.

No two clocks are compared. Whoever finds the object watches it: if it is renewed, somebody holds
it; if not for `EXPIRES` seconds, its holder is gone. A holder that died on this very machine is
known to be gone at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import EXIT_FAILURE, UserError

FILE_NAME = "holder.json"
RENEWED, EXPIRES = 10.0, 45.0  # seconds

log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(url: str, renewed: float = RENEWED, expires: float = EXPIRES,
         lost: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a folder of a bucket for this process.

    Args:
        url: the folder.
        renewed: seconds between renewals.
        expires: seconds without one after which a holder counts as gone; the same for all.
        lost: called when another process has taken over; None: this one ends at once, since two
            would undo each other's work.

    Raises:
        UserError: another process holds it.
        OSError: the object cannot be read or written.
    """
    path, mine = storage.join(url, FILE_NAME), _self()
    _wait_until_free(path, url, expires)
    storage.write_text(path, json.dumps({**mine, "renewed": 0}))
    # Of several that came at once the last one to write has it; they all look after a moment.
    time.sleep(min(1.0, renewed / 2))
    _refuse(_read(path), mine, url)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, mine, renewed, ended, lost or _end),
                              name="vishwam-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):  # then it expires
            found = _read(path)
            if found is not None and found.get("token") == mine["token"]:
                storage.remove(path)


def _self() -> dict[str, Any]:
    return {"token": uuid.uuid4().hex, "host": socket.gethostname(), "boot": _boot(),
            "process": os.getpid(), "began": _began(os.getpid())}


def _boot() -> str:
    """Tells machines apart, and containers that share a name: '' where it is not known."""
    try:
        return (pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                + os.readlink("/proc/self/ns/pid"))
    except OSError:
        return ""


def _began(process: int) -> str:
    """When a process of this machine began, so that a number used again is another one."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(path: str) -> dict[str, Any] | None:
    """What the object says: None if there is none, {} if it is not what a holder writes."""
    try:
        found = json.loads(storage.read_text(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "token" in found else {}


def _wait_until_free(path: str, url: str, expires: float) -> None:
    first = _read(path)
    if first is None or _died_here(first):
        return
    log.warning("%s was last held by process %s on %s: waiting up to %.0f s to see whether it is "
                "gone", url, first.get("process"), first.get("host"), expires)
    deadline = time.monotonic() + expires
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(2.0, left))
        now = _read(path)
        if now is None:
            return
        if now and now != first:
            _refuse(now, {}, url)


def _died_here(holder: dict[str, Any]) -> bool:
    boot = _boot()
    return bool(boot) and holder.get("boot") == boot and bool(holder.get("began")) and (
        _began(int(holder["process"])) != holder["began"])


def _refuse(holder: dict[str, Any] | None, mine: dict[str, Any], url: str) -> None:
    if holder and holder.get("token") != mine.get("token"):
        raise UserError("another process is training into this MODEL_DIR",
                        got=f"{url}, held by process {holder.get('process')} on "
                            f"{holder.get('host')}",
                        fix="wait for it, stop it, or choose another MODEL_DIR")


def _renew(path: str, mine: dict[str, Any], renewed: float, ended: threading.Event,
           lost: Callable[[], None]) -> None:
    count = 0
    while not ended.wait(renewed):
        count += 1
        try:
            found = _read(path)
            # What cannot be read is nobody's: it is written anew.
            if found and found.get("token") != mine["token"]:
                log.critical("%s was taken over by process %s on %s", path, found.get("process"),
                             found.get("host"))
                lost()
                return
            storage.write_text(path, json.dumps({**mine, "renewed": count}))
        except OSError as error:
            log.error("%s could not be renewed: %s", path, error)


def _end() -> None:
    # Not by an exception: a save that is under way in another thread must not be finished either.
    os._exit(EXIT_FAILURE)
