"""Chunks of a split's examples, or of a file's lines, answered by a model: what `infer` writes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
from absl import logging

from vishwam_t5x.core import storage
from vishwam_t5x.data.records import TaskCache, TaskRecords
from vishwam_t5x.evaluation import answers, input_file, together
from vishwam_t5x.evaluation.answers import Answer, DecodeText
from vishwam_t5x.evaluation.chunks import Chunk, ChunkedFile, Summary
from vishwam_t5x.evaluation.evaluator import Evaluator
from vishwam_t5x.evaluation.generator import Generator
from vishwam_t5x.evaluation.input_file import BadLine, InputLine, InputReader
from vishwam_t5x.evaluation.predictions import Prediction
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.evaluation.task_metrics import PREDICT, PREDICT_WITH_AUX, SCORE
from vishwam_t5x.evaluation.together import LeftOut

Said = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class How:
    """What is wanted of each example.

    Attributes:
        mode: one of `answers.MODES`.
        all_decodes: record everything that was sampled, or every beam.
    """

    mode: str = PREDICT
    all_decodes: bool = False


class Source(Protocol):
    """Numbered examples that can be answered chunk by chunk, in rising order."""

    name: str

    @property
    def size(self) -> int:
        """How many examples there are."""
        ...

    def facts(self) -> dict[str, Any]:
        """What tells these examples from others; JSON values."""
        ...

    def answer(self, params: Any, chunk: Chunk, how: How) -> tuple[list[Prediction], list[Any]]:
        """Returns what was made of a chunk's examples, and what could not be used."""
        ...


def facts_of(task: TaskRecords) -> dict[str, Any]:
    """Returns what tells the examples of a task from others: JSON values. Of a cache, the hash of
    its content too."""
    found: dict[str, Any] = {"task": task.name, "examples": task.num_records}
    if isinstance(task, TaskCache):
        shards = "".join(shard.sha256 for shard in task.manifest.shards)
        found["content"] = hashlib.sha256(shards.encode()).hexdigest()[:16]
    return found


class TaskSource:
    """The examples of a task's split."""

    def __init__(self, evaluator: Evaluator, task: TaskRecords, max_examples: int | None) -> None:
        self.name, self._evaluator, self._task = task.name, evaluator, task
        self.size = task.num_records if max_examples is None else min(
            max_examples, task.num_records)

    def facts(self) -> dict[str, Any]:
        """See `Source.facts`."""
        return facts_of(self._task) | {"examples": self.size}

    def answer(self, params: Any, chunk: Chunk, how: How) -> tuple[list[Prediction], list[Any]]:
        """See `Source.answer`; what could not be used are records, damaged, too long or left
        nothing to write, in words."""
        lines, left_out = self._evaluator.answer(
            params, self._task, range(chunk.first, chunk.end), how.mode, chunk.number,
            how.all_decodes)
        for error in left_out:
            logging.warning("left out: %s", error)
        return lines, [str(error) for error in left_out]


class LinesSource:
    """The lines of a file of inputs; a chunk counts blank ones too."""

    def __init__(self, generator: Generator, reader: InputReader, decode_text: DecodeText,
                 path: str) -> None:
        self.name, self._generator = path, generator
        self._reader = dataclasses.replace(reader, read_bytes=self._noted)
        self._files: list[tuple[str, str]] = []
        self._decode_text = decode_text
        digest, self.size = hashlib.sha256(), 0
        for self.size, text in input_file.raw_lines(path):
            digest.update(text)
        self._sha256 = digest.hexdigest()
        self._lines: Iterator[tuple[int, bytes]] = input_file.raw_lines(path)
        self._at = 0

    def _noted(self, path: storage.PathLike) -> bytes:
        data = storage.read_bytes(path)
        if jax.process_count() > 1:
            self._files.append((str(path), f"{len(data)} bytes, sha256 "
                                           f"{hashlib.sha256(data).hexdigest()[:16]}"))
        return data

    def _files_of_line(self) -> list[tuple[str, str]]:
        found, self._files = self._files, []
        return found

    def facts(self) -> dict[str, Any]:
        """See `Source.facts`."""
        found = {"file": self.name, "lines": self.size, "sha256": self._sha256[:16],
                 "ends": list(self._reader.ends)}
        # Left out as it was before there was a choice: what was begun then goes on.
        return found if self._reader.resize == "exact" else {
            **found, "resize": self._reader.resize}

    def answer(self, params: Any, chunk: Chunk, how: How) -> tuple[list[Prediction], list[Any]]:
        """See `Source.answer`; what could not be used are [number of the line, why]."""
        raw = itertools.islice(self._lines, chunk.first - self._at, chunk.end - self._at)
        self._at = chunk.end
        found: dict[int, Answer] = {}
        fields: dict[int, dict[str, Any]] = {}
        bad: list[BadLine] = []
        modality = None if how.mode == SCORE else self._reader.target

        def one(numbered: tuple[int, bytes]) -> tuple[InputLine, Request]:
            line = self._reader.line(self.name, *numbered)
            if isinstance(line, BadLine):
                raise LeftOut(line.why)
            request = dataclasses.replace(Request.from_example(line.example, line.number),
                                          options=line.option_ids)
            if (why := self._generator.misfit(request, modality)) is not None:
                raise LeftOut(why)
            return line, request

        def refused(number: int, why: str) -> None:
            bad.append(BadLine(number, why))
            logging.warning("%s: %s", self.name, bad[-1])

        def requests() -> Iterator[Request]:
            wanted = ((number, text) for number, text in raw if text.strip())
            for (number, _), read in together.read(f"lines of {self.name}", wanted, one,
                                                   self._files_of_line):
                if isinstance(read, LeftOut):
                    refused(number, read.why)
                    continue
                line, request = read
                found[number] = Answer.to(request, self._decode_text, line.fields.get("target"),
                                          line.options)
                fields[number] = _without_text(line)
                yield request

        if how.mode == SCORE:
            answers.score(self._generator, params, requests(), found)
        else:
            answers.write(self._generator, params, requests(), self._reader.target, found, refused,
                          chunk.number, how.mode == PREDICT_WITH_AUX)
        useless = {line.number: line.why for line in bad}
        return [found[number].prediction(self.name, number, how.mode, self._decode_text,
                                         how.all_decodes, fields[number])
                for number in sorted(found.keys() - useless.keys())
                ], [[number, useless[number]] for number in sorted(useless)]


def _without_text(line: InputLine) -> dict[str, Any]:
    """What is recorded of a line as it was given: text is there as the encoder read it."""
    return {name: value for name, value in line.fields.items()
            if name not in ("text", input_file.TARGET)}


def run(params: Any, sources: Sequence[Source], file: ChunkedFile, todo: Sequence[Chunk], how: How,
        changed: Callable[[Sequence[Prediction]], Iterable[Prediction]], said: Said
        ) -> Summary | None:
    """Answers the chunks that are to be done, each written as soon as it is answered.

    Args:
        params: of the model, on the devices; not looked at if nothing is to be done.
        sources: the examples.
        file: where the chunks go.
        todo: chunks of this job, in rising order; see `ChunkedFile.begin`.
        how: what is wanted.
        changed: what becomes of the lines of a chunk before they are written; called in process 0.
        said: called with (name, examples done, examples to do).

    Returns:
        What all chunks hold together; None if other jobs have not written theirs yet.
    """
    to_do = [0] * len(sources)
    for chunk in todo:
        to_do[chunk.source] += chunk.end - chunk.first
    done = [0] * len(sources)
    for chunk in todo:
        lines, left_out = sources[chunk.source].answer(params, chunk, how)
        file.write(chunk, _as_json(lines, changed), left_out)
        done[chunk.source] += chunk.end - chunk.first
        said(sources[chunk.source].name, done[chunk.source], to_do[chunk.source])
    return file.finish()


def _as_json(lines: Sequence[Prediction],
             changed: Callable[[Sequence[Prediction]], Iterable[Prediction]]) -> Iterator[str]:
    """Changes nothing before it is looked at: in process 0, inside what all wait for."""
    yield from (line.to_json() for line in changed(lines))
