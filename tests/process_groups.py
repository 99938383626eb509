"""Runs of several processes, as a user starts them: one command a process, a log each."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import training_runs as runs

import helpers

# Each worker of a test run has ports of its own, below those that the system gives to whoever asks.
_OF_A_WORKER = 500
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").lstrip("gw")) % 16
_ports = itertools.count(random.SystemRandom().randrange(_OF_A_WORKER))


def free_port() -> int:
    """Returns a port that nobody listens on, another one each time."""
    for _ in range(_OF_A_WORKER):
        port = 20_000 + _WORKER * _OF_A_WORKER + next(_ports) % _OF_A_WORKER
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")


@dataclasses.dataclass
class Group:
    """The processes of one run.

    Attributes:
        processes: by number.
        logs: what each of them wrote, by number.
        began: how long the logs were before.
    """

    processes: list[subprocess.Popen]
    logs: list[pathlib.Path]
    began: list[int] = dataclasses.field(default_factory=list)

    def wait(self, timeout: float = 240) -> list[int]:
        """Returns the exit codes; kills what has not ended in time."""
        try:
            return [process.wait(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def wait_until_said(self, index: int, words: str, timeout: float = 120) -> None:
        """Waits until a process has written `words` since it was started."""
        deadline = time.monotonic() + timeout
        while words not in self.log(index)[self.began[index]:]:
            assert self.processes[index].poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.05)

    def log(self, index: int) -> str:
        """Returns what a process wrote."""
        return self.logs[index].read_text()

    def tail(self) -> str:
        """Returns the ends of all logs, for the message of a failed test."""
        return "\n".join(f"--- {index}\n{self.log(index)[-3000:]}"
                         for index in range(len(self.logs)))


def start(model_dir: pathlib.Path, steps: int, *more: str, count: int, env: Mapping[str, str],
          devices: int = 2, absent: int | None = None,
          odd: Mapping[int, tuple[str, ...]] | None = None) -> Group:
    """Starts a run of several processes.

    Args:
        model_dir: of the run.
        steps: length.
        more: arguments of each process.
        count: processes.
        env: environment.
        devices: CPU devices of each process.
        absent: a process that is not started.
        odd: further arguments of single processes.
    """
    group, port = Group([], []), free_port()
    pathlib.Path(f"{model_dir}.log").touch()
    for index in range(count):
        if index == absent:
            continue
        path = pathlib.Path(f"{model_dir}.{index}.log")
        group.began.append(path.stat().st_size if path.exists() else 0)
        with path.open("ab") as log:
            group.processes.append(subprocess.Popen(
                [sys.executable, "-m", "vishwam_t5x",
                 *runs.command(model_dir, steps, *more, *(odd or {}).get(index, ())),
                 f"--coordinator_address=localhost:{port}", f"--process_count={count}",
                 f"--process_index={index}"],
                env=helpers.environment(devices, env), cwd=helpers.ROOT, stdout=log, stderr=log))
        group.logs.append(path)
    return group


def start_code(code: str, *more: str, count: int, env: Mapping[str, str] | None = None
               ) -> list[subprocess.Popen]:
    """Starts `python -c CODE INDEX COUNT PORT MORE…` as often as `count` says."""
    port = free_port()
    return [subprocess.Popen(
        [sys.executable, "-c", code, str(index), str(count), str(port), *more],
        env=helpers.environment(1, env), cwd=helpers.ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True) for index in range(count)]
