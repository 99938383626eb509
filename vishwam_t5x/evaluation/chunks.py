"""A long file of lines, written in chunks by several jobs that may be killed and started again.

    FILE.jsonl                        the lines of all chunks in order, once all are there
    FILE.jsonl.parts/manifest.json    what is being written: settings, and the number of chunks
    FILE.jsonl.parts/00003.jsonl      the lines of chunk 3, written in one piece
    FILE.jsonl.parts/done.json        all chunks were put together, and how many lines they had

Which examples are in a chunk depends on nothing but the settings, so that any number of jobs can
share the work, and a job that is killed loses the chunk it was at. A chunk's file may hold lines
{"left_out": …} besides: what could not be used. They are counted, and not put together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from vishwam_t5x.core import storage
from vishwam_t5x.core.distributed import from_primary, is_primary, refuse_together
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.predictions import plain

LEFT_OUT = "left_out"
_MANIFEST, _DONE = "manifest.json", "done.json"


class Chunk(NamedTuple):
    """Some examples that are written together.

    Attributes:
        number: of the chunk, from 0.
        source: number of the task, among those of the job.
        first: its first example.
        end: the example after its last.
    """

    number: int
    source: int
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What all chunks held together.

    Attributes:
        lines: in the file.
        left_out: what could not be used, in order, as it was given to `ChunkedFile.write`.
    """

    lines: int
    left_out: list[Any]


def plan(sizes: Sequence[int], chunk_size: int) -> list[Chunk]:
    """Cuts each of several sources of so many examples into chunks of `chunk_size` at most."""
    if chunk_size < 1:
        raise UserError("chunk_size must be at least 1 example", got=chunk_size)
    chunks: list[Chunk] = []
    for source, size in enumerate(sizes):
        for first in range(0, size, chunk_size):
            chunks.append(Chunk(len(chunks), source, first, min(first + chunk_size, size)))
    return chunks


class ChunkedFile:
    """Knows which chunks there are, which of them are written, and puts them together.

    Process 0 writes for all; what it sees, all processes of a job do.
    """

    def __init__(self, path: storage.PathLike, settings: Mapping[str, Any],
                 chunks: Sequence[Chunk], shard_id: int = 0, num_shards: int = 1) -> None:
        """Args:
            path: the file that is to be.
            settings: all that its lines depend on; another job with others must not go on with it.
            chunks: of `plan`.
            shard_id: number of this job, from 0: it writes each `num_shards`-th chunk.
            num_shards: jobs that share the work.

        Raises:
            UserError: there is no such job.
        """
        if num_shards < 1 or not 0 <= shard_id < num_shards:
            raise UserError("--shard_id counts the jobs from 0 to --num_shards - 1",
                            got=f"shard_id {shard_id}, num_shards {num_shards}")
        self.path, self._chunks = storage.place(path), list(chunks)
        self._folder = self.path.with_name(f"{self.path.name}.parts")
        self._settings = json.loads(json.dumps(plain(dict(settings))))
        self._shard, self._num_shards = shard_id, num_shards

    def begin(self, overwrite: bool = False) -> list[Chunk]:
        """Returns the chunks that this job is to write: its own, but for those that are there.

        Args:
            overwrite: forget what was written with other settings, or is finished; what these
                settings have begun goes on, so that the same command comes to an end however often
                it is killed.

        Raises:
            UserError: what is there has other settings, or nobody knows which; or one of several
                jobs would forget what another has just written. On all processes, if on one.
        """
        if overwrite and self._num_shards > 1:
            raise UserError("--overwrite would delete what the other shards write",
                            fix=f"delete {self._folder} and {self.path}, then start all shards "
                                "without it")
        mine: list[int] = []
        self._in_primary("output begun", lambda: mine.extend(self._begin(overwrite)))
        todo = from_primary("chunks to write", " ".join(map(str, mine)))
        numbers = set(map(int, todo.split()))
        return [chunk for chunk in self._chunks if chunk.number in numbers]

    def _begin(self, overwrite: bool) -> list[int]:
        there_is = storage.exists(self.path)
        found, done = self._read(_MANIFEST), self._read(_DONE)
        begun = (found is not None and found["settings"] == self._settings
                 and not (done is not None and there_is))
        if overwrite and not begun:
            self._clear()
        elif found is not None:
            self._refuse_others(found, done is not None and there_is)
            if done is not None and there_is:
                return []
            if done is not None:
                storage.remove(self._folder / _DONE)
        elif there_is:
            raise UserError(f"{self.path} is there, and nobody knows with what settings",
                            fix="--overwrite writes it anew; or give another --output_file")
        self._claim()
        there = set(storage.names(self._folder))
        mine = [chunk for chunk in self._chunks if chunk.number % self._num_shards == self._shard]
        todo = [chunk.number for chunk in mine if self._name(chunk.number) not in there]
        if len(todo) < len(mine):
            logging.info("%d of the %d chunks of this job are written: going on", len(mine) -
                         len(todo), len(mine))
        return todo

    def _claim(self) -> None:
        """Says what is being written; of several jobs that come at once the first one does."""
        text = json.dumps({"settings": self._settings, "chunks": len(self._chunks)}, indent=1)
        if storage.is_remote(self._folder):
            with contextlib.suppress(FileExistsError):
                storage.write_bytes(self._folder / _MANIFEST, text.encode(), new_only=True)
        else:
            folder = pathlib.Path(self._folder)
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{_MANIFEST}.{uuid.uuid4().hex}.tmp"
            try:
                temporary.write_text(text, encoding="utf-8")
                os.link(temporary, folder / _MANIFEST)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                storage.write_text(folder / _MANIFEST, text)
            finally:
                temporary.unlink(missing_ok=True)
        self._refuse_others(self._read(_MANIFEST), finished=False)

    def _in_primary(self, what: str, do: Callable[[], object]) -> None:
        """What process 0 does for all; if it cannot, all end alike."""
        refuse_together(what, lambda: do() if is_primary() else None)

    def write(self, chunk: Chunk, lines: Iterable[str], left_out: Sequence[Any] = ()) -> None:
        """Writes a chunk in one piece: a kill leaves all of it or nothing.

        Args:
            chunk: which.
            lines: JSON objects, without their ends; looked at in process 0 alone.
            left_out: what could not be used; JSON values.

        Raises:
            Exception: on every process, what went wrong in process 0: another job has begun the
                file anew, or it cannot be written.
        """
        def write() -> None:
            notes = [json.dumps({LEFT_OUT: item}, ensure_ascii=False) for item in left_out]
            text = "".join(f"{line}\n" for line in [*lines, *notes])
            self._refuse_others(self._read(_MANIFEST), finished=False)
            storage.write_text(self._folder / self._name(chunk.number), text)

        self._in_primary("chunk written", write)

    def finish(self) -> Summary | None:
        """Puts the file together if all chunks of all jobs are there; None if some are missing.

        Returns:
            What is in it, the same for whoever of several jobs comes last, or comes again.
        """
        made: list[Summary | None] = []
        self._in_primary("output finished", lambda: made.append(self._finish()))
        found = json.loads(from_primary("chunks put together", json.dumps(
            [dataclasses.asdict(summary) for summary in made if summary])))
        return Summary(**found[0]) if found else None

    def _finish(self) -> Summary | None:
        try:
            done = self._read(_DONE)
            if done is None and self.missing():
                done = self._read(_DONE)  # missing, or cleared up just now
                if done is None:
                    return None
            if done is None:
                done = self._put_together()
                storage.write_text(self._folder / _DONE, json.dumps(done, ensure_ascii=False))
        except FileNotFoundError:  # another job has just put it together, and cleared up
            done = self._read(_DONE)
            if done is None:
                raise
        for chunk in self._chunks:
            storage.remove(self._folder / self._name(chunk.number))
        return Summary(**done)

    def missing(self) -> int:
        """How many chunks, of whatever job, are not written yet."""
        there = set(storage.names(self._folder))
        return sum(self._name(chunk.number) not in there for chunk in self._chunks)

    def _put_together(self) -> dict[str, Any]:
        lines, left_out = 0, []
        with self._output() as file:
            for chunk in self._chunks:
                text = storage.read_text(self._folder / self._name(chunk.number))
                for line in text.split("\n")[:-1]:
                    if line.startswith(f'{{"{LEFT_OUT}": '):
                        left_out.append(json.loads(line)[LEFT_OUT])
                    else:
                        file.write(f"{line}\n".encode())
                        lines += 1
        return {"lines": lines, "left_out": left_out}

    @contextlib.contextmanager
    def _output(self) -> Iterator[Any]:
        """A file that appears at the path when it is whole."""
        if storage.is_remote(self.path):
            with tempfile.NamedTemporaryFile() as file:
                yield file
                file.flush()
                storage.upload(file.name, self.path)
            return
        path = pathlib.Path(self.path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _clear(self) -> None:
        # The manifest last: half-cleared chunks must not meet other settings.
        names = [name for name in storage.names(self._folder) if name != _MANIFEST]
        for name in [*names, _MANIFEST]:
            storage.remove(self._folder / name)

    def _read(self, name: str) -> Any:
        try:
            return json.loads(storage.read_text(self._folder / name))
        except FileNotFoundError:
            return None

    def _name(self, number: int) -> str:
        return f"{number:05d}.jsonl"

    def _refuse_others(self, found: Mapping[str, Any] | None, finished: bool) -> None:
        """Raises if what is being written, or was, has other settings than this job's."""
        if found is None:
            raise UserError(f"{self._folder} was deleted while it was written",
                            fix="run the same command again")
        before = found["settings"]
        if before == self._settings:
            return
        differing = [f"{name}: {_shown(before.get(name))} there, {_shown(value)} now"
                     for name, value in self._settings.items() if before.get(name) != value]
        differing += [f"{name}: {_shown(value)} there, not given now"
                      for name, value in before.items() if name not in self._settings]
        what = ("was written with other settings" if finished
                else "was begun with other settings and is not finished")
        raise UserError(f"{self.path} {what}", got="\n       ".join(differing),
                        fix=("" if finished else "the same settings go on; ")
                        + "--overwrite begins anew; or give another --output_file")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 70 else f"{text[:67]}…"
