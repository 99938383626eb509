"""Training runs as a user starts them: a process, a model directory, a log to read."""

from __future__ import annotations

import json
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import helpers

SMALL = ("--gin_file=gin/recipes/quickstart_cpu.gin", "--gin.BATCH_SIZE=8",
         "--gin.WARMUP_STEPS=10", "--gin.LOG_PERIOD=1", "--gin.SAVE_PERIOD=10",
         "--gin.EVAL_PERIOD=1000", "--gin.train.train_eval_dataset_cfg=None",
         "--gin.train.use_tensorboard=False")

ENDLESS = "--gin.train.total_steps=100000"
"""For a run that is to be disturbed: it must not end before, however late that comes."""


def command(model_dir: pathlib.Path, steps: int, *more: str) -> list[str]:
    """Arguments of `vishwam` for a small quickstart run."""
    return ["train", *SMALL, f"--gin.TRAIN_STEPS={steps}", f'--gin.MODEL_DIR="{model_dir}"', *more]


def train(model_dir: pathlib.Path, steps: int, *more: str, env: Mapping[str, str],
          devices: int = 1, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    """Trains to the end and checks the exit code."""
    done = helpers.vishwam(*command(model_dir, steps, *more), env=env, devices=devices)
    assert done.returncode == exit_code, f"exit code {done.returncode}\n{done.stderr[-6000:]}"
    return done


def start(model_dir: pathlib.Path, steps: int, *more: str, env: Mapping[str, str],
          devices: int = 1) -> subprocess.Popen:
    """Starts a run in the background; its messages go to MODEL_DIR.log."""
    with open(f"{model_dir}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "vishwam_t5x", *command(model_dir, steps, *more)],
            env=helpers.environment(devices, env), cwd=helpers.ROOT, stdout=log, stderr=log)


def records(model_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Complete records of metrics.jsonl."""
    path = model_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_step(model_dir: pathlib.Path) -> int:
    """Last step that the log knows of."""
    return max((record["step"] for record in records(model_dir)), default=0)


def wait_for_step(process: subprocess.Popen, model_dir: pathlib.Path, step: int,
                  timeout: float = 300) -> None:
    """Waits until the run has logged `step`; fails if it ends before."""
    deadline = time.monotonic() + timeout
    while last_step(model_dir) < step:
        log = pathlib.Path(f"{model_dir}.log")
        assert process.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, f"step {step} not reached in {timeout} s"
        time.sleep(0.02)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL, and waits for the end."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def column(model_dir: pathlib.Path, name: str) -> dict[int, Any]:
    """{step: value} of one metric."""
    return {record["step"]: record[name] for record in records(model_dir) if name in record}


def assert_same(one: pathlib.Path, other: pathlib.Path, names: Sequence[str]) -> None:
    """Two runs logged the very same of all steps that both have taken, and these are not few."""
    for name in names:
        first, second = column(one, name), column(other, name)
        common = first.keys() & second.keys()
        assert len(common) == min(len(first), len(second)) > 0, name
        assert {step: first[step] for step in common} == {
            step: second[step] for step in common}, name


def random_pause(seed: Any, seconds: Sequence[float]) -> None:
    """Sleeps a random time between two bounds: to fall anywhere in a step or a save."""
    time.sleep(random.Random(seed).uniform(*seconds))
