"""Thirty disturbances of a run of four processes, of every kind, and it learns the very same."""

import collections
import ctypes
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import process_groups as groups
import pytest
import training_runs as runs

from vishwam_t5x.checkpointing.restore import open_source
from vishwam_t5x.checkpointing.sources import Request

PROCESSES, DISTURBANCES = 4, 30
SCHEDULE, MORE = 240, 20  # steps of the learning rate's schedule; steps after the last disturbance
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
SETTINGS = ("--gin.SAVE_PERIOD=5", "--gin.WatchdogConfig.peer_seconds=6",
            "--gin.WatchdogConfig.phase_seconds=150", "--gin.WatchdogConfig.step_seconds=60",
            "--roll_call_seconds=30")
KINDS = ("SIGKILL", "SIGTERM", "SIGSTOP", "storage")
# Done, resumable, or what was done to them.
EXPECTED = {0, 75, 76, -signal.SIGKILL, -signal.SIGTERM}


def parameters(model_dir):
    """{name: array} of the newest checkpoint, and its step."""
    source, step, _ = open_source(model_dir)
    wanted = {name: Request(np.dtype(leaf.dtype), None) for name, leaf in source.leaves.items()}
    return source.read(wanted), step


def start(model_dir, env, *more):
    local = f"--gin.CheckpointConfig.local_folder='{model_dir}-disks'"
    return groups.start(model_dir, SCHEDULE, *SETTINGS, local,
                        "--gin.CheckpointConfig.local_period=2", *more, count=PROCESSES,
                        devices=1, env=env)


def running(group):
    return all(process.poll() is None for process in group.processes)


def wait(group, model_dir, steps, seconds):
    """Until so many steps more are logged, or the time is over, or the run."""
    target, deadline = runs.last_step(model_dir) + steps, time.monotonic() + seconds
    while (running(group) and runs.last_step(model_dir) < target
           and time.monotonic() < deadline):
        time.sleep(0.02)


def exchange(one, other):
    """Both names change places at once: a process that makes the folder cannot come between."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd = -100
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), _EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one))


def break_storage(model_dir, seconds):
    """For a while the folder of checkpoints is a file: nothing can be written or listed.

    Returns:
        Whether there was one.
    """
    folder, away = model_dir / "checkpoints", model_dir / "away"
    if not folder.is_dir():
        return False
    away.write_text("")
    exchange(folder, away)
    time.sleep(seconds)
    exchange(folder, away)
    return True


def end_at(steps):
    return f"--gin.train.total_steps={steps}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_chaos(tmp_path, quickstart_cache):
    seed = random.SystemRandom().randrange(2**32)
    chance, began = random.Random(seed), time.monotonic()
    print(f"seed {seed}", flush=True)
    straight, model_dir = tmp_path / "straight", tmp_path / "chaos"

    done, codes = [], collections.Counter()
    group = start(model_dir, quickstart_cache, runs.ENDLESS)
    while len(done) < DISTURBANCES:
        if chance.random() < 0.7:
            wait(group, model_dir, chance.randint(1, 5), seconds=150)
        else:  # anywhere: importing, joining, compiling, restoring
            wait(group, model_dir, 5, chance.uniform(0.2, 15.0))
        if running(group):
            # Each kind in turn, so that all of them occur.
            kind, victim = KINDS[len(done) % len(KINDS)], chance.randrange(PROCESSES)
            if kind == "storage" and not break_storage(model_dir, chance.uniform(0.5, 4.0)):
                continue  # there is nothing to break yet
            done.append((kind, victim, runs.last_step(model_dir)))
            print(f"{time.monotonic() - began:.0f} s: {len(done)} of {DISTURBANCES}: {kind} of "
                  f"{victim} at step {done[-1][-1]}", flush=True)
            if kind == "storage":
                continue  # the run goes on
            group.processes[victim].send_signal(getattr(signal, kind))
            if kind == "SIGSTOP":
                others = [p for i, p in enumerate(group.processes) if i != victim]
                for process in others:
                    process.wait(timeout=240)
                group.processes[victim].send_signal(chance.choice((signal.SIGCONT, signal.SIGKILL)))
        ended = group.wait(300)
        codes.update(ended)
        assert set(ended) <= EXPECTED, (ended, group.tail())
        print(f"{time.monotonic() - began:.0f} s: exit codes {ended}", flush=True)
        group = start(model_dir, quickstart_cache, runs.ENDLESS)
    while True:  # the last disturbance, a stop, may still tell
        group.processes[0].send_signal(signal.SIGTERM)
        ended = group.wait(300)
        assert set(ended) <= EXPECTED, (ended, group.tail())
        if set(ended) == {75}:
            break
        group = start(model_dir, quickstart_cache, runs.ENDLESS)
        wait(group, model_dir, 1, seconds=150)
    steps = runs.last_step(model_dir) + MORE
    group = start(model_dir, quickstart_cache, end_at(steps))
    assert set(group.wait(1200)) == {0}, group.tail()
    group = groups.start(straight, SCHEDULE, end_at(steps), count=PROCESSES, devices=1,
                         env=quickstart_cache)
    assert set(group.wait(1800)) == {0}, group.tail()

    print(json.dumps({"seed": seed, "seconds": round(time.monotonic() - began),
                      "exit codes": dict(codes), "disturbances": done}), flush=True)
    for name in ("loss", "examples_crc32", "grad_norm", "param_norm"):
        assert runs.column(straight, name) == runs.column(model_dir, name), (name, seed)
    expected, found = parameters(straight), parameters(model_dir)
    assert found[1] == expected[1] == steps and found[0].keys() == expected[0].keys()
    for name, array in expected[0].items():
        np.testing.assert_array_equal(found[0][name], array, err_msg=f"{name}, seed {seed}")
    shutil.rmtree(f"{model_dir}-disks")
