"""Processes of a test's own: waited for with a deadline, and ended with all they started."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

DEADLINE = 60.0


class Started:
    """A process whose stderr is read as it comes."""

    def __init__(self, words: Sequence[str], **options: Any) -> None:
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **options)
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def until(self, happened: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
        """Waits until something has happened; fails when the process ends or time is up first."""
        end = time.monotonic() + seconds
        while not happened():
            alive = self.process.poll() is None
            # What it did last may have been the very thing.
            assert happened() or alive, f"it ended before {what}:\n{self.said[-4000:]}"
            assert time.monotonic() < end, f"no {what} in {seconds} s:\n{self.said[-4000:]}"
            time.sleep(0.02)

    def until_said(self, text: str, seconds: float = DEADLINE) -> None:
        """Waits until stderr holds a text."""
        self.until(lambda: text in self.said, text, seconds)

    def until_there(self, path: pathlib.Path) -> None:
        """Waits until a file exists."""
        self.until(path.exists, str(path))

    def wait(self, seconds: float = DEADLINE) -> int:
        """Returns its exit code; all that it said is in `said` then."""
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=seconds)
        return code

    def end(self) -> None:
        """Kills what is left of it and of its children, which have sessions of their own."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid)
            for process in [*found.children(recursive=True), found]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait(timeout=DEADLINE)


@contextlib.contextmanager
def started(words: Sequence[str], **options: Any) -> Iterator[Started]:
    """A process for as long as the block; afterwards nothing of it is left."""
    process = Started(words, **options)
    try:
        yield process
    finally:
        process.end()
