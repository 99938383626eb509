"""Being asked to stop: SIGTERM from a scheduler, or a cloud's preemption notice."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
from absl import logging

from vishwam_t5x.core.errors import Preempted


class StopRequest:
    """Listens for SIGTERM; `agreed(step)` says whether all processes stop after `step`.

    Until `wait_for_steps` is called there is nothing to save, and compiling or filling a cache may
    take longer than a scheduler waits: `Preempted` is raised in the main thread at once.

    With several processes jax's preemption service carries the notice from the one that got it to
    the others and picks a step that none has passed; a signal handler here would hide it.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._previous: Any = None
        self._installed = self._steps = False

    def install(self) -> StopRequest:
        """Starts listening; only the main thread may."""
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle)
            self._installed = True
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._asked.set()
        if not self._steps:
            raise Preempted(None, "asked to stop")

    def wait_for_steps(self) -> None:
        """From now on a request waits for the end of a step, which `agreed` reports."""
        self._steps = True

    def ask(self) -> None:
        """Asks for a stop from inside the program."""
        self._asked.set()

    def agreed(self, step: int) -> bool:
        """Whether the run stops after `step`: the same answer on every process."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))

    def restore(self) -> None:
        """Gives SIGTERM back to whoever had it."""
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
            self._installed = False
            logging.debug("SIGTERM handler removed")
