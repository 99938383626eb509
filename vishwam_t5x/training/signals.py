"""Being asked to stop: SIGTERM from a scheduler, or a cloud's preemption notice."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
from absl import logging

from vishwam_t5x.core import coordination, distributed
from vishwam_t5x.core.errors import EXIT_PREEMPTED, PeersLost, Preempted

_KEY = "stop asked"
_LOOK = 1.0  # seconds between looks whether another process was asked
_AGREEING = 300.0  # seconds for all processes to say how far they are
_UNWINDING = 5.0  # seconds for the main thread to end by itself; less than process 0 stays


class StopRequest:
    """Listens for SIGTERM; `agreed(step)` says whether all processes stop after `step`.

    Until `wait_for_steps` is called there is nothing to save, and compiling or filling a cache may
    take longer than a scheduler waits: `Preempted` is raised in the main thread at once.

    With several processes a thread of each carries the request from the one that got it to the
    others. Then all say how many steps they have begun, and while they do none goes on: they end
    at once if none has begun any, otherwise after the first that none has passed. A main thread
    that waits in C++ cannot be interrupted: its process ends without it.
    """

    def __init__(self) -> None:
        self._asked, self._ended = threading.Event(), threading.Event()
        self._previous: Any = None
        self._installed = self._steps = self._ending = self._told = False
        self._several = jax.process_count() > 1
        self._lock = threading.Lock()
        # 0 before the first step, then one more after each.
        self._passed, self._stop_at = 0, sys.maxsize
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def install(self) -> StopRequest:
        """Starts listening; only the main thread hears signals."""
        if threading.current_thread() is threading.main_thread():
            if self._several:
                # Python's own handler waits for the main thread, which may be in a barrier.
                self._pipe = os.pipe()
                os.set_blocking(self._pipe[1], False)
                self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._previous = signal.signal(signal.SIGTERM, self._handle)
            self._installed = True
        if self._several:
            threading.Thread(target=self._carry, daemon=True, name="vishwam-stop").start()
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._several:
            self._asked.set()
            self._ending = not self._steps
        if self._ending and not self._told:
            self._told = True
            raise Preempted(None, "asked to stop")

    def wait_for_steps(self) -> None:
        """From now on a request waits for the end of a step, which `agreed` reports."""
        with self._lock:
            if self._ending and not self._told:
                raise Preempted(None, "asked to stop")
            self._passed, self._steps = 1, True

    def ask(self) -> None:
        """Asks for a stop from inside the program."""
        self._asked.set()

    def agreed(self, step: int) -> bool:
        """Whether the run stops after `step`: the same answer on every process."""
        if not self._several:
            return self._asked.is_set()
        with self._lock:  # held by `_agree`
            self._passed += 1
            return self._passed >= self._stop_at

    def restore(self) -> None:
        """Gives SIGTERM back to whoever had it."""
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
            self._installed = False
            if self._pipe is not None:
                signal.set_wakeup_fd(self._wakeup)
                os.close(self._pipe[1])
            logging.debug("SIGTERM handler removed")
        self._ended.set()

    # --- several processes: what the thread does ---

    def _carry(self) -> None:
        try:
            self._listen()
        finally:
            if self._pipe is not None:
                self._ended.wait()  # until then a signal is written to it
                os.close(self._pipe[0])

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                if self._was_asked():
                    coordination.put(_KEY, "1")
                if coordination.get(_KEY) is not None:
                    self._agree()
                    break
            except jax.errors.JaxRuntimeError as error:
                logging.debug("whether to stop is not known: %s", error)  # the watchdog says more
        if self._ending and not self._ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not self._ended.wait(_UNWINDING):
                with contextlib.suppress(OSError):
                    print(f"vishwam: {Preempted(None, 'asked to stop')}", file=sys.stderr)
                distributed.leave(EXIT_PREEMPTED)

    def _was_asked(self) -> bool:
        """Waits a moment; whether this process has been asked to stop."""
        if self._pipe is None:
            self._ended.wait(_LOOK)
        elif select.select([self._pipe[0]], [], [], _LOOK)[0]:
            heard = os.read(self._pipe[0], 4096)
            if signal.SIGTERM in heard:
                self._asked.set()
            elif not heard:  # closed by `restore`
                self._ended.set()
        return self._asked.is_set()

    def _agree(self) -> None:
        with self._lock:
            try:
                said = coordination.exchange("stop", str(self._passed), _AGREEING)
            except PeersLost as lost:
                logging.warning("not agreed on a step to stop at: %s", lost)
                return
            furthest = max(map(int, said))
            self._ending = furthest == 0
            self._stop_at = furthest + 1
        logging.info("asked to stop: %s", "before the first step" if self._ending
                     else "after this step or the next")
