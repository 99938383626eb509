"""Where metrics go: JSON lines always, TensorBoard files, and the terminal."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from absl import logging

Record = Mapping[str, float | int | None]


class Writer(Protocol):
    """Receives one record a logged step."""

    def write(self, step: int, record: Record) -> None: ...

    def rewind(self, step: int) -> None:
        """Told when the run goes back to `step`."""

    def close(self) -> None: ...


def _plain(value: Any) -> Any:
    # JSON has no NaN: a bad step is written as a string that says so.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_records(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`; half-written lines are left out, and said."""
    path = pathlib.Path(path)
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
            records.append(record)
        except (ValueError, KeyError, TypeError):
            # What a killed writer leaves.
            logging.warning("%s: half-written line dropped", path)
    return records


class JsonlWriter:
    """`metrics.jsonl`: one JSON object a line, `step` first.

    On opening, a half-written last line and records of steps after `resume_step` are dropped: the
    run is about to write those steps again.
    """

    def __init__(self, path: str | pathlib.Path, resume_step: int = 0) -> None:
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open(resume_step)

    def _open(self, last_step: int) -> None:
        kept = [record for record in read_records(self.path) if record["step"] <= last_step]
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)

    def write(self, step: int, record: Record) -> None:
        """Appends one line and hands it to the operating system."""
        self._file.write(json.dumps(
            {"step": step, **{name: _plain(value) for name, value in record.items()}}) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the records of steps after `step`, which are about to be written again."""
        self._file.close()
        self._open(step)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard event files, through tensorboardX (which needs no TensorFlow).

    Points of steps after `resume_step` are marked as superseded: the run writes them again.
    """

    def __init__(self, log_dir: str | pathlib.Path, resume_step: int = 0) -> None:
        self._log_dir, self._resume_step = str(log_dir), resume_step
        self._writer: Any = None

    def write(self, step: int, record: Record) -> None:
        """Writes every number of the record as a scalar."""
        if self._writer is None:
            # Imported late: protobuf costs start-up time that no first step should wait for.
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(self._log_dir, purge_step=self._resume_step + 1,
                                         flush_secs=30)
        for name, value in record.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Begins a new event file, which supersedes the points of steps after `step`."""
        self.close()
        self._writer, self._resume_step = None, step

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._writer.close()


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}"


class TerminalWriter:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total, self._bar = total_steps, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, unit="step",
                             dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, record: Record) -> None:
        """Shows the few numbers a person watches."""
        # Those of single tasks, one level deeper, are in the files.
        names = [name for name in record
                 if re.fullmatch(r"loss(/[^/]+)?|eval/loss(/[^/]+)?", name)]
        parts = [f"{name} {_number(record[name])}" for name in names]
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts), refresh=False)
            return
        for name, unit in (("seconds_per_step", "s/step"), ("tokens_per_second", "tokens/s"),
                           ("packing", "packed"), ("mfu", "MFU")):
            if record.get(name) is not None:
                parts.append(f"{_number(record[name])} {unit}")
        print(f"step {step}/{self._total}  " + "  ".join(parts), file=sys.stderr, flush=True)

    def rewind(self, step: int) -> None:
        """Moves the bar back."""
        self.advance(step)

    def close(self) -> None:
        """Leaves the bar where it is."""
        if self._bar is not None:
            self._bar.close()


class Writers:
    """Several writers as one; empty on processes other than the first."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write(self, step: int, record: Record) -> None:
        """Hands the record to each writer; a full disk loses the record, not the run."""
        for writer in self._writers:
            try:
                writer.write(step, record)
            except OSError as error:
                logging.error("metrics of step %d not written by %s: %s", step,
                              type(writer).__name__, error)

    def rewind(self, step: int) -> None:
        """Tells each writer that the run goes back to `step`."""
        for writer in self._writers:
            try:
                writer.rewind(step)
            except OSError as error:
                logging.error("%s: metrics of steps after %d not dropped: %s",
                              type(writer).__name__, step, error)

    def advance(self, step: int) -> None:
        """Tells the terminal, if there is one, that a step was dispatched."""
        for writer in self._writers:
            if isinstance(writer, TerminalWriter):
                writer.advance(step)

    def close(self) -> None:
        """Closes each writer."""
        for writer in self._writers:
            writer.close()
