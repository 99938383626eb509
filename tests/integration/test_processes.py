"""Two processes train one run together, stop together, and one process goes on alone."""

import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import training_runs as runs

import helpers

STEPS = 30
SAVE_NEVER = "--gin.SAVE_PERIOD=1000"


def start_two(model_dir: pathlib.Path, env) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for index in range(2):
        with open(f"{model_dir}.{index}.log", "wb") as log:
            processes.append(subprocess.Popen(
                [sys.executable, "-m", "vishwam_t5x", *runs.command(model_dir, STEPS, SAVE_NEVER),
                 f"--coordinator_address=localhost:{port}", "--process_count=2",
                 f"--process_index={index}"],
                env=helpers.environment(1, env), cwd=helpers.ROOT, stdout=log, stderr=log))
    return processes


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tmp_path, quickstart_cache):
    straight, model_dir = tmp_path / "straight", tmp_path / "run"
    runs.train(straight, STEPS, SAVE_NEVER, env=quickstart_cache)
    first, second = start_two(model_dir, quickstart_cache)
    pathlib.Path(f"{model_dir}.log").touch()
    runs.wait_for_step(first, model_dir, 5)
    second.send_signal(signal.SIGTERM)  # the notice reaches one of them
    assert [process.wait(timeout=120) for process in (first, second)] == [75, 75]
    saved = [int(path.name) for path in (model_dir / "checkpoints").iterdir()]
    assert saved == [runs.last_step(model_dir)] and saved[0] < STEPS
    runs.train(model_dir, STEPS, SAVE_NEVER, env=quickstart_cache)
    for name in ("examples_crc32", "next_example", "carried", "weight_sum/text"):
        assert runs.column(straight, name) == runs.column(model_dir, name), name
    expected, found = runs.column(straight, "loss"), runs.column(model_dir, "loss")
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-4)
