"""Runs of several processes, as a user starts them: one command a process, a log each."""

from __future__ import annotations

import dataclasses
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping

import training_runs as runs

import helpers


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@dataclasses.dataclass
class Group:
    """The processes of one run.

    Attributes:
        processes: by number.
        logs: what each of them wrote, by number.
    """

    processes: list[subprocess.Popen]
    logs: list[pathlib.Path]

    def wait(self, timeout: float = 240) -> list[int]:
        """Returns the exit codes; kills what has not ended in time."""
        try:
            return [process.wait(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()

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
        with path.open("ab") as log:
            group.processes.append(subprocess.Popen(
                [sys.executable, "-m", "vishwam_t5x",
                 *runs.command(model_dir, steps, *more, *(odd or {}).get(index, ())),
                 f"--coordinator_address=localhost:{port}", f"--process_count={count}",
                 f"--process_index={index}"],
                env=helpers.environment(devices, env), cwd=helpers.ROOT, stdout=log, stderr=log))
        group.logs.append(path)
    return group
