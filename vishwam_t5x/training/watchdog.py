"""Ends a run that cannot go on: a process that is gone or frozen, a step that hangs; exit code 76.

A step of several processes waits for all of them, for ever if one is gone. Each process therefore
says from a thread that it lives; process 0 listens to all of them, they listen to it. Whoever ends
writes the stacks of all threads, so that a hang can be understood afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType

import jax

from vishwam_t5x.core import coordination
from vishwam_t5x.core.coordination import process_name
from vishwam_t5x.core.errors import EXIT_ABORTED, EXIT_OK, EXIT_PREEMPTED, PeersLost, UserError
from vishwam_t5x.training import maintenance
from vishwam_t5x.training.ledger import Ledger

_GOOD_ENDS = {str(EXIT_OK), str(EXIT_PREEMPTED)}
_GRACE = 15.0  # seconds for all to end by themselves when one has refused to go on
_LOOK = 0.25  # seconds between looks at the clock
_LAST_WORDS = 10.0  # seconds for stacks and ledger to be written


def _end_process(why: str, last: Callable[[], None] = lambda: None) -> None:
    """Says why, dumps all stacks, does the last thing, and ends the process.

    Nothing may keep it from ending: not a closed stderr, not the file system that hangs and that
    the last thing writes to.
    """
    threading.Thread(target=_end_after, args=(_LAST_WORDS,), daemon=True).start()
    try:
        print(f"vishwam: aborted by the watchdog: {why}\n  run the same command to resume; "
              "what each thread was doing:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
    except (OSError, ValueError, RuntimeError):
        pass  # nobody reads it
    try:
        last()
    finally:
        os._exit(EXIT_ABORTED)


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(EXIT_ABORTED)


@contextlib.contextmanager
def limited(what: str, seconds: float) -> Iterator[None]:
    """Ends the process if what is inside takes longer; for what comes before a `Watchdog` can."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(seconds):
            _end_process(f"{what}: not done in {seconds:g} s")

    threading.Thread(target=watch, daemon=True, name="vishwam-watchdog").start()
    try:
        yield
    finally:
        done.set()


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """How long nothing may happen.

    Attributes:
        step_seconds: in the loop, from one step to the next; None: no limit.
        phase_seconds: until the first state is there, and while compiling, evaluating or saving;
            None: no limit. Filling a cache has none.
        peer_seconds: how long another process may be silent. Less than 100: then jax gives it up.
        held_seconds: how long to wait for a MODEL_DIR that another process holds: where it ran on
            another host, that may be gone and its lock not yet.
        metadata_server: asked whether this machine is about to be taken away, e.g.
            'http://metadata.google.internal'; None: only SIGTERM says so.
    """

    step_seconds: float | None = 1800.0
    phase_seconds: float | None = 4 * 3600.0
    peer_seconds: float = 60.0
    held_seconds: float = 100.0
    metadata_server: str | None = None

    def __post_init__(self) -> None:
        for name in ("step_seconds", "phase_seconds", "peer_seconds", "held_seconds"):
            value = getattr(self, name)
            if value is None and name in ("step_seconds", "phase_seconds"):
                continue
            if not value > 0:
                raise UserError(f"WatchdogConfig.{name} must be more than 0 seconds", got=value)
        if self.peer_seconds > 90:
            raise UserError("WatchdogConfig.peer_seconds must be at most 90",
                            got=self.peer_seconds, fix="jax ends a run after 100 s of silence")


class Watchdog:
    """Watches from `with` to its end; see `WatchdogConfig`."""

    def __init__(self, config: WatchdogConfig, ledger: Ledger,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
            config: how long nothing may happen.
            ledger: says what this process is doing, and since when; told how it ended.
            clock: seconds, as the ledger counts them.
        """
        self._config, self._ledger, self._clock = config, ledger, clock
        # When `hung` was last asked, of which time it counts, and how much of that was no time.
        self._looked, self._since, self._frozen = clock(), ledger.since, 0.0
        self._several = jax.process_count() > 1
        self._ended = threading.Event()
        self._once = threading.Lock()
        self._contact = time.monotonic()  # when process 0 was last heard
        self._trouble = ""
        self._lost: str | None = None
        self._heard: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> Watchdog:
        threads: list[Callable[[], None]] = [self._watch]
        if self._several:
            threads.append(self._beat)
            self._catch_aborts()
        if (server := self._config.metadata_server) is not None:
            threads.append(lambda: maintenance.watch(server, self._ended))
        for target in threads:
            threading.Thread(target=target, daemon=True, name="vishwam-watchdog").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._several and isinstance(error, jax.errors.JaxRuntimeError | PeersLost):
            self._judge(error)
        self._ended.set()
        why = "finished" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
        self._ledger.close(why)

    def _judge(self, error: BaseException) -> None:
        """A step or a barrier failed: if another process is gone, this one ends too."""
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            traceback.print_exception(error)
        if isinstance(error, PeersLost):
            self._abort(str(error))
        if (lost := self._verdict()) is not None:
            self._abort(lost)

    def _verdict(self) -> str | None:
        """Waits as long as a silent process may take to be noticed; who is lost, or None."""
        deadline = time.monotonic() + 1.5 * self._config.peer_seconds + 2 * self._period
        while time.monotonic() < deadline and (lost := self._who_is_lost()) is None:
            time.sleep(_LOOK)
        return lost

    # --- this process ---

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK):
            if (why := self._who_is_lost() or self.hung()) is not None:
                self._abort(why)

    def hung(self) -> str | None:
        """Returns what has taken too long, or None; asked every so often."""
        now, since = self._clock(), self._ledger.since
        if since != self._since:
            self._since, self._frozen = since, 0.0
        # Time in which this whole process was stopped (Ctrl-Z, a debugger) is no hang.
        self._frozen += max(now - self._looked - 20 * _LOOK, 0.0)
        self._looked = now
        phase, limit = self._ledger.phase, self._limit(self._ledger.phase)
        if limit is None or now - since - self._frozen <= limit:
            return None
        return f"nothing has happened for {limit:g} s (in phase '{phase}')"

    def _limit(self, phase: str) -> float | None:
        if phase == "cache":
            return None
        if phase in ("init", "compile", "eval", "save"):
            return self._config.phase_seconds
        return self._config.step_seconds

    def _abort(self, why: str) -> None:
        if not self._once.acquire(blocking=False):
            time.sleep(60.0)  # another thread is at it
        _end_process(why, lambda: self._ledger.close(f"watchdog: {why}"))

    # --- the other processes ---

    @property
    def _period(self) -> float:
        return min(self._config.peer_seconds / 6, 10.0)

    def _beat(self) -> None:
        number = 0
        me = jax.process_index()
        while not self._ended.is_set():
            number += 1
            try:
                coordination.put(f"alive/{me}", str(number))
                if (said := coordination.get("lost")) is not None:
                    self._lose(said)
                elif me == 0:
                    self._listen()
                elif (beat := coordination.get("alive/0")) is not None:
                    self._hear(0, beat)
                self._contact, self._trouble = time.monotonic(), ""
            except jax.errors.JaxRuntimeError as error:
                self._trouble = str(error).strip().splitlines()[0][:200]
            self._ended.wait(self._period)

    def _listen(self) -> None:
        """Process 0: who has not been heard for too long, or has ended otherwise than well?"""
        now = time.monotonic()
        left = coordination.get_all("left")
        beats = coordination.get_all("alive")
        for process in range(1, jax.process_count()):
            self._hear(process, beats.get(process, ""))
            code, silent = left.get(process), now - self._heard[process][1]
            if code in _GOOD_ENDS:
                continue
            if code is not None and silent > _GRACE:
                self._lose(f"{process_name(process)} ended with exit code {code}")
            elif code is None and silent > self._config.peer_seconds:
                self._lose(f"{process_name(process)} has been silent for "
                           f"{self._config.peer_seconds:g} s: killed, frozen, or cut off")

    def _hear(self, process: int, beat: str) -> None:
        if self._heard.get(process, ("no", 0.0))[0] != beat:
            self._heard[process] = beat, time.monotonic()

    def _lose(self, why: str) -> None:
        if jax.process_index() == 0:
            coordination.put("lost", why)
            # The service must outlive the news: the others ask for it once a period.
            time.sleep(2 * self._period + _LOOK)
        self._lost = why

    def _who_is_lost(self) -> str | None:
        if not self._several or self._lost is not None:
            return self._lost
        if jax.process_index() == 0:
            return None
        now, limit = time.monotonic(), self._config.peer_seconds
        if now - min(self._contact, self._heard.get(0, ("", self._contact))[1]) > limit:
            return (f"{process_name(0)} has been silent for {limit:g} s: killed, frozen, or cut "
                    "off" + (f" ({self._trouble})" if self._trouble else ""))
        return None

    def _catch_aborts(self) -> None:
        """The abort of `on_abort` waits, in a thread that is lost anyway, for our verdict."""
        def handle() -> None:
            if not self._ended.is_set() and (lost := self._verdict()) is not None:
                self._abort(lost)

        coordination.on_abort(handle)
