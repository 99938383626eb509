"""Where the time of a run went: `MODEL_DIR/ledger.jsonl`.

One line when a process starts, one now and then, one when it ends; of a killed process the last
line stands for its end. Written by process 0, whose time is everybody's: the steps keep them equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from vishwam_t5x.core.coordination import exchange, process_name

PHASES = ("init", "cache", "compile", "data_wait", "step", "host", "eval", "save")
"""init: until the first state; cache: writing examples that were missing; step:
dispatching and waiting for the devices; host: the rest of the loop. Compiling counts as far as the
loop waits for it."""

_WRITE_EVERY = 30.0  # seconds between lines of a running process, at least
_SLOW = 0.2  # share of the time that one process may keep the others waiting before it is named


class Ledger:
    """The time of this process by phase; `phase` and `since` are what the watchdog looks at."""

    def __init__(self, path: pathlib.Path | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
            path: where lines are appended; None: nowhere.
            clock: seconds.
        """
        self._path, self._clock = path, clock
        self.phase, self.since = "init", clock()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._session = f"{time.time():.3f}-{os.getpid()}"
        self._wrote, self._started, self._closed = clock(), False, False
        self._step = 0
        self._lost = {"steps": 0, "seconds": 0.0}
        self._reported = dict(self.seconds)

    def enter(self, phase: str) -> None:
        """From now on the time is that phase's."""
        now = self._clock()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    @contextlib.contextmanager
    def spend(self, phase: str) -> Iterator[None]:
        """The time inside is that phase's; afterwards the one before goes on."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def start(self, step: int, records: Sequence[Mapping[str, Any]] = (),
              microbatches: int | None = None) -> None:
        """Writes that this process begins at `step`.

        Args:
            step: what was restored, or 0.
            records: of `metrics.jsonl`, before those after `step` are dropped: work that was done
                and must be done again.
            microbatches: parts that each batch is cut into.
        """
        self._step, self._started = step, True
        again = [record for record in records if record["step"] > step]
        if again:
            each = [record["seconds_per_step"] for record in again if "seconds_per_step" in record]
            self.lost(max(record["step"] for record in again) - step,
                      sum(each) / len(each) if each else 0.0)
        self._write("start", processes=jax.process_count(), devices=jax.device_count(),
                    microbatches=microbatches)

    def lost(self, steps: int, seconds_each: float) -> None:
        """Counts steps that were taken and are to be taken again."""
        self._lost["steps"] += steps
        self._lost["seconds"] += steps * seconds_each

    def progress(self, step: int) -> None:
        """Writes how far the process is, if the last line is old enough."""
        self._step = step
        if self._clock() - self._wrote >= _WRITE_EVERY:
            self._write("progress")

    def close(self, why: str) -> None:
        """Writes the end, once, if the start was written."""
        if self._started and not self._closed:
            self._closed = True
            self._write("stop", why=why)

    def slowest(self) -> dict[str, float]:
        """Returns which process kept the others waiting since the last call, and how long.

        All processes call it together; {} in a run of one. The slowest is the one that waited
        least for the devices: the others waited for it, inside the step.
        """
        self.enter(self.phase)
        mine = {name: self.seconds[name] - self._reported[name] for name in PHASES}
        self._reported = dict(self.seconds)
        if jax.process_count() == 1:
            return {}
        with self.spend("step"):  # waiting for the others, as in a step
            all_times = [json.loads(text) for text in exchange("step times", json.dumps(mine))]
        own = [times["data_wait"] + times["host"] for times in all_times]
        slowest = max(range(len(own)), key=own.__getitem__)
        behind = own[slowest] - sorted(own)[len(own) // 2 - (len(own) % 2 == 0)]
        if behind > _SLOW * sum(all_times[slowest].values()):
            logging.warning("%s keeps the others waiting: %.1f s of its own since the last report, "
                            "%.1f s of them for data", process_name(slowest), own[slowest],
                            all_times[slowest]["data_wait"])
        return {"slowest_process": slowest, "slowest_seconds": behind}

    def _write(self, event: str, **more: Any) -> None:
        self.enter(self.phase)
        self._wrote = self._clock()
        if self._path is None:
            return
        record = {"event": event, "session": self._session, "time": round(time.time(), 3),
                  "step": self._step, **more, "lost_steps": self._lost["steps"],
                  "lost_seconds": round(self._lost["seconds"], 3),
                  "seconds": {name: round(value, 3) for name, value in self.seconds.items()}}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk loses the line, not the run
            logging.error("the ledger was not written: %s", error)


@dataclasses.dataclass
class Session:
    """One process of a run, from its start to its end.

    Attributes:
        start: seconds since 1970.
        end: of its last line.
        first_step: what it began from.
        last_step: how far it came.
        processes: how many ran together.
        devices: of all of them.
        seconds: time by phase.
        lost_steps: steps of earlier work that it had to take again.
        lost_seconds: how long those had taken.
        why: how it ended; 'killed' if it could not say.
        microbatches: parts that each batch was cut into; None where that is not known.
    """

    start: float
    end: float
    first_step: int
    last_step: int
    processes: int
    devices: int
    seconds: dict[str, float]
    lost_steps: int
    lost_seconds: float
    why: str = "killed"
    microbatches: int | None = None


def read(path: str | pathlib.Path) -> list[Session]:
    """Returns the sessions of a ledger, in order; half-written lines are left out."""
    path = pathlib.Path(path)
    sessions: dict[str, Session] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            key = record["session"]
            if record["event"] == "start":
                sessions[key] = Session(
                    record["time"], record["time"], record["step"], record["step"],
                    record["processes"], record["devices"], {}, 0, 0.0,
                    microbatches=record.get("microbatches"))
            session = sessions[key]
            session.end, session.last_step = record["time"], record["step"]
            session.seconds = dict(record["seconds"])
            session.lost_steps, session.lost_seconds = record["lost_steps"], record["lost_seconds"]
            session.why = record.get("why", session.why)
        except (ValueError, KeyError, TypeError):
            continue  # what a killed writer leaves
    return list(sessions.values())


def goodput(sessions: Sequence[Session]) -> dict[str, float]:
    """Returns {'total', 'down', 'lost', phases…} in seconds and 'goodput', a share of 0 to 1.

    Total is from the first start to the last end; good are the steps that did not have to be taken
    again.
    """
    if not sessions:
        return {"total": 0.0, "goodput": 0.0}
    phases = {name: sum(s.seconds.get(name, 0.0) for s in sessions) for name in PHASES}
    spent = sum(phases.values())
    # The first line comes after the start: a session began that much earlier.
    total = max(sessions[-1].end - sessions[0].start + sessions[0].seconds.get("init", 0.0), spent)
    lost = sum(session.lost_seconds for session in sessions)
    return {"total": total, "down": total - spent, "lost": lost, **phases,
            "goodput": max(phases["step"] - lost, 0.0) / total if total else 0.0}
