"""Restarts a training command as long as that helps, and says why when it no longer does.

usage: supervise.py [--model-dir=DIR] [--restart-on=75,76,SIGKILL,SIGTERM] [--give-up-after=3]
                    [--backoff=5] [--max-backoff=300] [--ledger=FILE] -- COMMAND ...

Restarts when the command ends with a code or a signal of --restart-on: 75 is "stopped on request,
resumable", 76 "a host hangs or is dead". Exit 2, the user's own mistake, is never restarted. The
wait before a restart doubles from --backoff to --max-backoff seconds, less a random part, and
begins anew once there was progress: a step or a checkpoint in DIR that was not there before. The
same end --give-up-after times in a row without progress is final: exit 70, which is for no one to
start again. 75 does not count, for it is no failure.

SIGTERM, SIGHUP and the first Ctrl-C are handed to the command as SIGTERM; its save is waited for,
and its exit code is returned. The second Ctrl-C interrupts it, the third kills it.

DIR is MODEL_DIR, by default the one in the command (--gin.MODEL_DIR). DIR/supervisor.jsonl gets one
JSON object for each time the command ran: start, end, code, step reached, what was done about it.

Only the standard library is imported, so that this file works where nothing is installed; for a
bucket (gs://) it looks for etils, and without it sees no progress there.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO, Any

RESTART_ON = "75,76,SIGKILL,SIGTERM"
USER_ERROR = 2
PREEMPTED = "75"
GAVE_UP = 70  # EX_SOFTWARE; not the command's own code, which Slurm may be told to queue again.
# A shell between us and the trainer reports a death by signal as 128 + its number.
_SHELL_SIGNAL = 128
_TAIL_LINES, _TAIL_BYTES = 30, 1 << 16
# Different ends in turn are no progress either.
_ANY_END_FACTOR = 3


@dataclasses.dataclass(frozen=True)
class Policy:
    """When to start the command again.

    Attributes:
        restart_on: names of ends: exit codes in digits, and signals such as 'SIGKILL'.
        give_up_after: the same end so many times in a row without progress is final.
        backoff: seconds before the first restart without progress; doubles with each.
        max_backoff: seconds it does not exceed.
    """

    restart_on: frozenset[str]
    give_up_after: int = 3
    backoff: float = 5.0
    max_backoff: float = 300.0

    def wait_seconds(self, failures: int, uniform: Callable[[float, float], float]) -> float:
        """Returns the wait before a restart, after so many ends without progress in a row."""
        longest = min(self.max_backoff, self.backoff * 2.0 ** min(max(failures - 1, 0), 30))
        # At least half of it: many hosts that failed together must not return together.
        return uniform(longest / 2, longest)


@dataclasses.dataclass
class Progress:
    """How far a run has got, by its files; `advanced` compares with the furthest ever seen.

    Attributes:
        model_dir: MODEL_DIR, or None if it is not known: then there is never progress.
        step: the newest step seen in metrics.jsonl or as a checkpoint; None: none yet.
        checkpoint: the newest checkpoint seen; None: none yet.
    """

    model_dir: Any
    step: int | None = None
    checkpoint: int | None = None

    def advanced(self) -> bool:
        """Looks again and returns whether there is a step or a checkpoint further than before."""
        checkpoint = max(self._checkpoints(), default=None)
        steps = [step for step in (self._metrics_step(), checkpoint) if step is not None]
        # A run that goes back to a checkpoint and fails where it failed before made no progress.
        new_step = bool(steps) and (self.step is None or max(steps) > self.step)
        new_checkpoint = checkpoint is not None and (
            self.checkpoint is None or checkpoint > self.checkpoint)
        if new_step:
            self.step = max(steps)
        if new_checkpoint:
            self.checkpoint = checkpoint
        return new_step or new_checkpoint

    def _checkpoints(self) -> list[int]:
        if self.model_dir is None:
            return []
        try:
            # A bucket renames nothing: what is being written is in its place, and this comes last.
            whole = "commit_success.txt" if "://" in str(self.model_dir) else "."
            return [int(entry.name) for entry in (self.model_dir / "checkpoints").iterdir()
                    if entry.name.isdigit() and (entry / whole).exists()]
        except Exception as error:  # noqa: BLE001 - a bucket's library has errors of its own
            _unseen(error)
        return []

    def _metrics_step(self) -> int | None:
        if self.model_dir is None:
            return None
        try:
            lines = _last_bytes(self.model_dir / "metrics.jsonl").splitlines()
        except Exception as error:  # noqa: BLE001 - as above
            _unseen(error)
            return None
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue  # Half a line, of a writer that was killed or of the cut.
        return None


def _unseen(error: Exception) -> None:
    """Says why MODEL_DIR cannot be looked into, unless nothing is there yet."""
    if not isinstance(error, FileNotFoundError):
        _say(f"no progress can be seen: {type(error).__name__}: {error}")


def _last_bytes(path: Any) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return file.read()


def open_folder(name: str | None) -> Any:
    """Returns a path object for a folder or a bucket, or None where it cannot be looked into."""
    if not name:
        return None
    if "://" not in name:
        return pathlib.Path(name).expanduser()
    # TensorFlow would be loaded for it, wherever it is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    try:
        return importlib.import_module("etils.epath").Path(name)
    except ImportError:
        _say(f"{name} cannot be read without etils: no progress will be seen")
        return None


def model_dir_of(command: Sequence[str]) -> str | None:
    """Returns the MODEL_DIR that a `vishwam` command binds, or None. The last one counts."""
    found = None
    for index, word in enumerate(command):
        match = re.fullmatch(r"--?gin\.MODEL_DIR=(.*)", word, re.S)
        bound = match or re.fullmatch(r"--gin_bindings=\s*MODEL_DIR\s*=(.*)", word, re.S)
        if bound is None and word == "--gin_bindings" and index + 1 < len(command):
            bound = re.fullmatch(r"\s*MODEL_DIR\s*=(.*)", command[index + 1], re.S)
        if bound is not None:
            try:
                found = str(ast.literal_eval(bound[1].strip()))
            except (ValueError, SyntaxError):
                found = bound[1].strip()
    return found


def name_of_end(returncode: int) -> str:
    """Returns '75' for an exit code and 'SIGKILL' for a death by signal, a shell's or our own."""
    number = -returncode if returncode < 0 else returncode - _SHELL_SIGNAL
    if number > 0:
        try:
            return signal.Signals(number).name
        except ValueError:
            pass
    return str(returncode)


def exit_code(returncode: int) -> int:
    """Returns what a shell would report: 128 + signal for a death by signal."""
    return _SHELL_SIGNAL - returncode if returncode < 0 else returncode


class Tail:
    """Copies a child's stderr to ours as it comes and remembers its last lines."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._kept: collections.deque[bytes] = collections.deque()
        self._size = 0
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        while chunk := os.read(self._source.fileno(), 1 << 14):
            try:
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
            except OSError:
                pass  # Our own reader went away; the child must not block for that.
            self._kept.append(chunk)
            self._size += len(chunk)
            while self._size - len(self._kept[0]) > _TAIL_BYTES:
                self._size -= len(self._kept.popleft())

    def lines(self) -> list[str]:
        """Returns the last lines; waits a little for what is still in the pipe."""
        # A grandchild may hold the pipe open for ever.
        self._thread.join(timeout=5.0)
        text = b"".join(tuple(self._kept)).decode("utf-8", "replace")
        # A progress bar returns to the start of its line.
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()][-_TAIL_LINES:]


class Supervisor:
    """Runs one command until it is done, hopeless, or no longer wanted.

    Args:
        command: program and arguments.
        policy: when to start it again.
        progress: what the run's files say.
        ledger: file that gets a line for each time it ran (any path object), or None.
        environment: of the command; None: ours.
    """

    def __init__(self, command: Sequence[str], policy: Policy, progress: Progress,
                 ledger: Any = None, environment: Mapping[str, str] | None = None) -> None:
        self._command, self._policy, self._progress = list(command), policy, progress
        self._ledger, self._environment = ledger, environment
        self._child: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._interrupts = 0

    def run(self) -> int:
        """Returns the command's last exit code, or `GAVE_UP`; only the main thread may call."""
        handled = {number: signal.signal(number, self._handle)
                   for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        try:
            return self._run()
        finally:
            for number, handler in handled.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        self._progress.advanced()  # What earlier runs did is not progress of this one.
        attempt = same = failures = idle = 0
        last = ""
        while True:
            attempt += 1
            start = _now()
            code, tail = self._once()
            end, moved = name_of_end(code), self._progress.advanced()
            idle = 1 if moved else idle + 1
            if moved:
                same = failures = 0
            if end != PREEMPTED:  # Spot machines may be taken away before each first step.
                same, failures, last = same + 1 if end == last else 1, failures + 1, end
            again, why = self._decide(end)
            hopeless = again and self._hopeless(end, same, failures)
            again, why = again and not hopeless, hopeless or why
            self._write({"attempt": attempt, "start": start, "end": _now(),
                         "code": exit_code(code), "ended_by": end, "step": self._progress.step,
                         "progress": moved, "restart": again, "why": why})
            if not again:
                self._explain(code, why, tail)
                return GAVE_UP if hopeless else exit_code(code)
            seconds = self._policy.wait_seconds(idle, random.uniform)
            _say(f"{why}; restart in {seconds:.0f} s (step reached: {self._progress.step})")
            if self._stop.wait(seconds):
                _say("asked to stop while waiting; nothing is running")
                return exit_code(code)

    def _once(self) -> tuple[int, list[str]]:
        # In a session of its own: Ctrl-C on a terminal reaches us alone, and the child through us.
        with subprocess.Popen(self._command, stderr=subprocess.PIPE, env=self._environment,
                              start_new_session=True) as child:
            self._child = child
            if self._stop.is_set():
                child.send_signal(signal.SIGTERM)  # Asked between two runs.
            assert child.stderr is not None
            tail = Tail(child.stderr)
            code = child.wait()
            lines = tail.lines()
        self._child = None
        return code, lines

    def _decide(self, end: str) -> tuple[bool, str]:
        if self._stop.is_set():
            return False, f"asked to stop; the command ended with {end}"
        if end in ("0", str(USER_ERROR)):
            return False, "done" if end == "0" else (
                "exit 2 is a mistake in the command, which a restart repeats")
        if end not in self._policy.restart_on:
            return False, f"{end} is not among the ends to restart after"
        return True, f"ended with {end}"

    def _hopeless(self, end: str, same: int, failures: int) -> str:
        if same >= self._policy.give_up_after:
            return f"given up: {end} {same} times in a row without progress"
        if failures >= _ANY_END_FACTOR * self._policy.give_up_after:
            return f"given up: {failures} ends in a row without progress, the last {end}"
        return ""

    def _explain(self, code: int, why: str, tail: Sequence[str]) -> None:
        _say(f"{why} (step reached: {self._progress.step})")
        if code != 0 and not self._stop.is_set() and tail:
            _say(f"its last {len(tail)} lines on stderr:")
            for line in tail:
                print(f"  | {line}", file=sys.stderr)
        sys.stderr.flush()

    def _write(self, record: Mapping[str, object]) -> None:
        if self._ledger is None or (record["ended_by"] == str(USER_ERROR)
                                    and not self._ledger.parent.exists()):
            return  # A mistyped command must not make its folder.
        line, ledger = json.dumps(record) + "\n", self._ledger
        try:
            ledger.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(ledger, pathlib.Path):
                with ledger.open("a", encoding="utf-8") as file:
                    file.write(line)
            else:  # Objects in a bucket cannot be appended to.
                ledger.write_text((ledger.read_text() if ledger.exists() else "") + line)
        except Exception as error:  # noqa: BLE001 - the run matters more than its ledger
            _say(f"{self._ledger} not written: {error}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        if number == signal.SIGINT:
            self._interrupts += 1
        # The trainer saves on SIGTERM and loses steps on SIGINT: that only for the impatient.
        harder = {2: signal.SIGINT, 3: signal.SIGKILL}.get(min(self._interrupts, 3))
        sent = harder if harder and number == signal.SIGINT else signal.SIGTERM
        child = self._child
        if child is not None and child.returncode is None:
            child.send_signal(sent)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def parse_ends(text: str) -> frozenset[str]:
    """Returns the names of ends in a list such as '75,76,SIGKILL'.

    Raises:
        argparse.ArgumentTypeError: one is no exit code and no signal, or is never restarted.
    """
    ends = [word.strip() for word in text.split(",") if word.strip()]
    for end in ends:
        known = end.isdigit() and 0 < int(end) < 256 or end in signal.Signals.__members__
        if not known or end == str(USER_ERROR):
            raise argparse.ArgumentTypeError(
                f"{end!r} is no exit code to restart after, nor a signal like SIGKILL")
    return frozenset(ends)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `supervise.py ARGV` and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="supervise.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser.add_argument("--model-dir", help="MODEL_DIR of the run")
    parser.add_argument("--ledger", help="file for the ledger")
    parser.add_argument("--restart-on", type=parse_ends, default=parse_ends(RESTART_ON))
    parser.add_argument("--give-up-after", type=int, default=3)
    parser.add_argument("--backoff", type=float, default=5.0)
    parser.add_argument("--max-backoff", type=float, default=300.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("no command: supervise.py [flags] -- COMMAND ...")
    if given.give_up_after < 1 or given.backoff < 0 or given.max_backoff < given.backoff:
        parser.error("--give-up-after is 1 or more, and 0 <= --backoff <= --max-backoff")
    folder = open_folder(given.model_dir or model_dir_of(command))
    ledger = open_folder(given.ledger) or (folder / "supervisor.jsonl" if folder else None)
    try:
        return Supervisor(command, Policy(given.restart_on, given.give_up_after, given.backoff,
                                          given.max_backoff), Progress(folder), ledger).run()
    except FileNotFoundError as error:
        parser.error(f"the command cannot be started: {error}")


if __name__ == "__main__":
    sys.exit(main())
