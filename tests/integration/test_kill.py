"""SIGKILL at twenty random moments of one run, some of them inside a save."""

import json
import random
import time

import pytest
import training_runs as runs

SCHEDULE, MORE = 120, 10  # steps of the learning rate's schedule; steps after the last kill
KILLS, INSIDE = 20, 3  # in all, and inside a save, which takes as many more as it takes
SAVES = ("--gin.SAVE_PERIOD=3", "--gin.LOG_PERIOD=1")


def saved_steps(model_dir):
    """Steps of the checkpoints whose save was finished."""
    folder = model_dir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def save_is_running(model_dir):
    return any((model_dir / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills(tmp_path, quickstart_cache):
    """Always resumes; loses nothing but the steps since the last save; ends as undisturbed."""
    model_dir, log_file = tmp_path / "killed", tmp_path / "killed.log"
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    print(f"seed {seed}", flush=True)
    killed_at, in_a_save = [], 0
    while len(killed_at) < KILLS or in_a_save < INSIDE:
        assert len(killed_at) < 4 * KILLS, "too few kills fell inside a save to say anything"
        before = saved_steps(model_dir)
        process = runs.start(model_dir, SCHEDULE, *SAVES, runs.ENDLESS, env=quickstart_cache)
        if len(killed_at) % 2:  # as soon as a save is seen on disk
            target = (max(before, default=0) // 3 + chance.randint(1, 4)) * 3
            runs.wait_for_step(process, model_dir, target - 1)
            deadline = time.monotonic() + 60
            while not save_is_running(model_dir) and time.monotonic() < deadline:
                assert process.poll() is None, log_file.read_text()[-6000:]
            in_a_save += save_is_running(model_dir)
        elif len(killed_at) % 4:  # after some steps, whatever is going on
            runs.wait_for_step(process, model_dir,
                               runs.last_step(model_dir) + chance.randint(1, 7))
        else:  # anywhere: importing, compiling, restoring
            time.sleep(chance.uniform(0.5, 12.0))
        assert process.poll() is None, log_file.read_text()[-6000:]
        runs.kill(process)
        killed_at.append(runs.last_step(model_dir))
        after = saved_steps(model_dir)
        assert max(after, default=0) >= max(before, default=0), "a finished checkpoint was lost"
        # What is logged and not saved is at most one save period and the save being written.
        assert killed_at[-1] - max(after, default=0) <= 2 * 3, (killed_at[-1], after)
    end = f"--gin.train.total_steps={killed_at[-1] + MORE}"
    straight = tmp_path / "straight"
    for folder in (model_dir, straight):
        runs.train(folder, SCHEDULE, *SAVES, end, env=quickstart_cache)
    assert killed_at[-1] >= KILLS, "the run never came far"
    log = log_file.read_text()
    assert "Traceback" not in log
    assert not save_is_running(model_dir), "remains of killed saves are swept"
    for name in ("loss", "examples_crc32", "param_norm"):
        assert runs.column(model_dir, name) == runs.column(straight, name), name
    figures = {"kills": len(killed_at), "inside_a_save": in_a_save, "killed_at": killed_at}
    print(json.dumps(figures))
