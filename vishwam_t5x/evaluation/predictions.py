"""What an evaluation leaves behind: predictions and metrics as JSON lines, and a table to read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vishwam_t5x.core import storage


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One example and what the model made of it.

    Attributes:
        task: name of the task, or of the file of inputs.
        example: number of the record in its split, or of the line in its file (from 1).
        inputs: the text the encoder read, extra tokens by name.
        input_slots: slots of each input modality, tokens or patches.
        target: the reference: text, or codes of an image; None where there is none.
        prediction: text, or a list of codes; {modality: that} if several modalities were written.
            None where only the target was scored: then the line has none.
        score: log-probability of what was written (or of the target), in nats, summed over its
            tokens.
        extra: further JSON values, e.g. the file a picture was written to.
        written: the modalities of `prediction`; no part of the line.
    """

    task: str
    example: int
    inputs: str
    input_slots: Mapping[str, int]
    target: Any
    prediction: Any
    score: float
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    written: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Returns one line, without its end."""
        values = dataclasses.asdict(self)
        extra, _ = values.pop("extra"), values.pop("written")
        if self.prediction is None:
            del values["prediction"]
        return json.dumps(plain({**values, **extra}), ensure_ascii=False)


def plain(value: Any) -> Any:
    """Returns `value` as JSON types: arrays as lists, bytes as text, no NaN (it becomes text)."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_lines(path: storage.PathLike, lines: Iterable[str]) -> storage.PathLike:
    """Writes a text file in one piece: a reader never sees half of it.

    Args:
        path: the file, in a folder, which is made, or in an object store.
        lines: without their ends.

    Returns:
        The path.
    """
    storage.write_text(path, "".join(f"{line}\n" for line in lines))
    return path


def read_lines(path: storage.PathLike) -> Iterator[dict[str, Any]]:
    """Yields the object of every line of a JSONL file."""
    for line in storage.read_text(path).split("\n"):  # not splitlines: text may hold U+2028
        if line:
            yield json.loads(line)


def file_name(task: str) -> str:
    """Returns the name of a task's file of predictions; a '/' in the task cannot be in it."""
    return f"predictions-{task.replace('/', '_').replace(os.sep, '_')}.jsonl"


def table(rows: Sequence[Mapping[str, Any]], first: str = "task") -> str:
    """Returns one line a metric: the value of `first`, the metric's name, the value.

    Args:
        rows: one mapping a task; numbers are shown to four digits, None and mappings not at all.
        first: the key that names a row.
    """
    lines = []
    for row in rows:
        name = str(row[first])
        for key, value in row.items():
            if key == first or value is None or isinstance(value, Mapping):
                continue
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append((name, key, shown))
            name = ""
    widths = [max((len(line[column]) for line in lines), default=0) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {key:<{widths[1]}}  {value}".rstrip()
                     for name, key, value in lines)
