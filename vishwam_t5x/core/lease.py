"""Who writes into a folder of a bucket: an object that its holder writes anew every few seconds.

No two clocks are compared. Whoever finds the object watches it: if it is renewed, somebody holds
it; if not for `EXPIRES` seconds, its holder is gone. A holder that died on this very machine is
known to be gone at once. Each write names the generation it replaces: of several that come at once
one has it, and what a holder that was cut off wrote late does not count.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from vishwam_t5x.core import holder, storage
from vishwam_t5x.core.errors import EXIT_ABORTED, Resumable, UserError
from vishwam_t5x.core.generations import Changed, GuardedObject
from vishwam_t5x.core.patience import patiently

FILE_NAME = "holder.json"
RENEWED, EXPIRES = 10.0, 45.0  # seconds
WAITS = 100.0  # seconds for a holder that is ending, as one that was just told to stop
_REQUEST = 5.0  # seconds without a byte after which a request is lost
_LOOK = 2.0  # seconds between looks, and between tries to renew while that fails

Refusal = Callable[[dict[str, Any], str], Exception]
log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(url: str, renewed: float = RENEWED, expires: float = EXPIRES, waits: float = WAITS,
         lost: Callable[[], None] | None = None, refusal: Refusal | None = None
         ) -> Iterator[Lease]:
    """Holds a folder of a bucket for this process; yields what says whether it still does.

    Args:
        url: the folder, in gs://.
        renewed: seconds between renewals.
        expires: seconds without one after which a holder counts as gone; the same for all.
        waits: seconds to wait for a holder that is there.
        lost: called when another process has taken over; None: this one ends at once, since two
            would undo each other's work.
        refusal: (what its holder has signed, the folder) -> what is raised while it is held.
            None: as of a MODEL_DIR.

    Raises:
        UserError: another process of this machine holds it.
        Resumable: one of another machine does.
        StorageError: the object cannot be read or written.
    """
    lease = Lease(url, renewed, expires, lost or _end, refusal or _of_model_dir)
    lease.take(waits)
    ended = threading.Event()
    thread = threading.Thread(target=lease.keep_up, args=(ended,), name="vishwam-lease",
                              daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        lease.let_go()


class Lease:
    """A folder of a bucket, as its holder knows it."""

    def __init__(self, url: str, renewed: float, expires: float, lost: Callable[[], None],
                 refusal: Refusal) -> None:
        """Takes nothing yet; for the arguments see `held`."""
        self._url, self._path = url, storage.join(url, FILE_NAME)
        self._renewed, self._expires, self._lost = renewed, expires, lost
        self._refusal = refusal
        self._object = GuardedObject(self._path, _REQUEST)
        self._mine, self._count = _self(), 0
        self._generation, self._confirmed = 0, 0.0
        self._gone = False
        self._lock = threading.Lock()

    def take(self, waits: float) -> None:
        """Waits until it is free and takes it; raises as `held`."""
        begin = time.monotonic()
        found, generation = self._look()
        changed, live, said = begin, False, False
        while True:
            now = time.monotonic()
            if found is None or _died_here(found) or now - changed >= self._expires:
                if self._took(generation):
                    return
            elif (live or holder.lives_here(found)) and now - begin >= waits:
                raise self._refusal(found, self._url)
            elif not said:
                said = True
                log.warning(
                    "%s was last held by %s: waiting up to %.0f s to see whether it is gone or "
                    "ends", self._url, holder.name(found), max(waits, self._expires))
            time.sleep(min(_LOOK, self._expires / 10))
            latest, number = self._look()
            if number != generation:
                found, generation, changed, live = latest, number, time.monotonic(), True

    def _look(self) -> tuple[dict[str, Any] | None, int]:
        data, generation = patiently("read", self._path, self._object.read)
        return _parsed(data), generation

    def _took(self, generation: int) -> bool:
        begin = time.monotonic()

        def write() -> int | None:
            try:
                return self._object.write(self._content(), generation)
            except Changed:
                return None

        new = patiently("written", self._path, write)
        if new is None:  # by another process, or by a try of ours whose answer was lost
            found, new = self._look()
            if not self._is_mine(found):
                return False
        self._generation, self._confirmed = new, begin
        return True

    def keep_up(self, ended: threading.Event) -> None:
        """Renews it until `ended` is set or it is lost."""
        pause, failed = self._renewed, False
        while not ended.wait(pause):
            try:
                self._renew()
            except Exception as error:  # noqa: BLE001 - whatever it was, it may pass
                if not failed:
                    log.error("%s could not be renewed: %s", self._path, error)
                pause, failed = min(self._renewed, _LOOK), True
            else:
                pause, failed = self._renewed, False
            if self._gone:
                return

    def _renew(self) -> None:
        with self._lock:
            begin = time.monotonic()
            try:
                self._generation = self._object.write(self._content(), self._generation)
            except Changed:
                data, generation = self._object.read()
                found = _parsed(data)
                # What is not there, or cannot be read, is nobody's.
                if found and not self._is_mine(found):
                    log.critical("%s was taken over by %s", self._path, holder.name(found))
                    self._gone = True
                    self._lost()
                    return
                begin = time.monotonic()
                self._generation = self._object.write(self._content(), generation)
            self._confirmed = begin

    def check(self) -> None:
        """Makes sure that nobody has taken over: before what another process would see.

        Raises:
            StorageAway: somebody has, or it cannot be known.
        """
        if time.monotonic() - self._confirmed >= self._expires - self._renewed and not self._gone:
            try:
                self._renew()
            except Exception as error:
                raise storage.StorageAway(
                    f"nobody can tell whether {self._url} is still held by this process",
                    got=error) from error
        if self._gone:
            raise storage.StorageAway(f"{self._url} was taken over by another process")

    def let_go(self) -> None:
        """Lets others take it; does nothing if one has."""
        with self._lock, contextlib.suppress(Exception):  # then it expires
            self._object.remove(self._generation)

    def _content(self) -> bytes:
        self._count += 1
        return json.dumps({**self._mine, "renewed": self._count}).encode()

    def _is_mine(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("token") == self._mine["token"]


def _self() -> dict[str, Any]:
    return {"token": uuid.uuid4().hex, **holder.sign()}


def _parsed(data: bytes | None) -> dict[str, Any] | None:
    """What the object says: None if there is none, {} if it is not what a holder writes."""
    if data is None:
        return None
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "token" in found else {}


def _died_here(found: dict[str, Any]) -> bool:
    return holder.is_of_here(found) and not holder.lives_here(found)


def _of_model_dir(found: dict[str, Any], url: str) -> Exception:
    who = f"{url}, held by {holder.name(found)}"
    if holder.is_of_here(found):
        return UserError("another process is training into this MODEL_DIR", got=who,
                         fix="wait for it, stop it, or choose another MODEL_DIR")
    # Perhaps an attempt before this one, which nobody has told to stop.
    return Resumable(f"another process is training into this MODEL_DIR: {who}; wait for it, stop "
                     "it, or choose another MODEL_DIR")


def _end() -> None:
    # Not by an exception: a save that is under way in another thread must not be finished either.
    os._exit(EXIT_ABORTED)
