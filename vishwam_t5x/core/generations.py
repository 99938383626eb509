"""One object of a bucket, written only where nobody else has written it since it was last seen.

Google's storage numbers what an object's name holds: each write makes a new generation, 0 stands
for no object. A write that names the generation it replaces is refused if that is not there any
more, however late the request arrives: what a lock needs and a plain write cannot give.
"""

from __future__ import annotations

import contextlib
from typing import Any

from vishwam_t5x.core import buckets

_TRIES = 5  # to read an object that is being replaced


class Changed(Exception):
    """The object is not any more what it was when it was last seen."""


class GuardedObject:
    """An object by its path; each request is tried once."""

    def __init__(self, path: str, seconds: float) -> None:
        """Asks for credentials, and nothing of the bucket.

        Args:
            path: gs://BUCKET/NAME.
            seconds: without a byte after which a request counts as lost.

        Raises:
            UserError: no gs:// path, no client library, or no credentials.
        """
        bucket = buckets.bucket_of(path)
        self._bucket = buckets.make_client().bucket(bucket)
        self._name = path.removeprefix(f"gs://{bucket}/")
        self._how: dict[str, Any] = {"timeout": seconds, "retry": None}

    def read(self) -> tuple[bytes | None, int]:
        """Returns what it holds and which generation that is; (None, 0) where there is none."""
        from google.api_core import exceptions

        for _ in range(_TRIES):
            found = self._bucket.get_blob(self._name, **self._how)
            if found is None:
                return None, 0
            generation = int(found.generation)
            try:
                return found.download_as_bytes(if_generation_match=generation,
                                               **self._how), generation
            except (exceptions.NotFound, exceptions.PreconditionFailed):
                continue  # replaced between the two requests
        raise TimeoutError(f"{self._name} is written without pause")

    def write(self, data: bytes, generation: int) -> int:
        """Replaces that generation and returns the new one.

        Raises:
            Changed: another is there. Perhaps one's own, if an answer was lost: read it.
        """
        from google.api_core import exceptions

        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(data, if_generation_match=generation, **self._how)
        except exceptions.PreconditionFailed as error:
            raise Changed(self._name) from error
        return int(blob.generation)

    def remove(self, generation: int) -> None:
        """Deletes that generation; does nothing where another one is there, or none."""
        from google.api_core import exceptions

        with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
            self._bucket.blob(self._name).delete(if_generation_match=generation, **self._how)
