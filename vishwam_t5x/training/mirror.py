"""A scratch folder and its copy in a bucket: files that grow, where nothing can be appended to.

Changed files are written whole, every half minute, or more seldom where that takes long: a kill
loses at most what came since. What a checkpoint's step has logged is written before the checkpoint
is one, so that no resume goes on from a step whose records are missing.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

from vishwam_t5x.core import storage

FLUSH_SECONDS = 30.0
_SHARE = 20  # of the time at most one part in so many is spent on writing
_TEMPORARY = (".tmp", ".lock")

log = logging.getLogger(__name__)


class Mirror:
    """Copies the files of a folder that have changed; a context while which it does so by itself.

    Files that were there when it was made count as copied.
    """

    def __init__(self, folder: pathlib.Path, url: str, flush_seconds: float = FLUSH_SECONDS
                 ) -> None:
        """Copies nothing yet.

        Args:
            folder: where files are written.
            url: the folder in a bucket that gets them, under the same names.
            flush_seconds: between two copies.
        """
        self._folder, self._url, self._seconds = folder, url, flush_seconds
        self._copied = self._found()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self.check: Callable[[], None] = lambda: None
        """Raises `OSError` where the folder in the bucket may be another's now."""

    def __enter__(self) -> Mirror:
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="vishwam-mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.try_flush()

    @contextlib.contextmanager
    def guarded(self, check: Callable[[], None]) -> Iterator[None]:
        """Before anything is copied `check` is called, which raises `OSError` if it must not be."""
        before, self.check = self.check, check
        try:
            yield
        finally:
            self.check = before

    def flush(self) -> None:
        """Copies what has changed.

        Raises:
            OSError: it could not be written; what could not is tried again by the next flush.
        """
        self.check()
        with self._lock:  # two at a time could bring an older copy last
            for path, state in self._found().items():
                if self._copied.get(path) != state:
                    # Bytes that are appended meanwhile change its state: they come next time.
                    storage.write_bytes(storage.join(self._url, path),
                                        (self._folder / path).read_bytes())
                    self._copied[path] = state

    def try_flush(self) -> bool:
        """As `flush`, but logs a failure and returns whether all went well."""
        try:
            self.flush()
        except Exception as error:  # noqa: BLE001 - whatever it was, the next flush tries again
            log.error("files of the run are not yet in %s: %s", self._url, error)
            return False
        return True

    def _run(self) -> None:
        pause = self._seconds
        while not self._ended.wait(pause):
            begin = time.monotonic()
            self.try_flush()
            pause = max(self._seconds, _SHARE * (time.monotonic() - begin))

    def _found(self) -> dict[str, tuple[int, int]]:
        """{path below the folder: (bytes, time of the last change)} of what is to be copied."""
        found = {}
        for path in sorted(self._folder.rglob("*")):
            if path.is_file() and not path.name.endswith(_TEMPORARY):
                state = path.stat()
                found[path.relative_to(self._folder).as_posix()] = (
                    state.st_size, state.st_mtime_ns)
        return found
