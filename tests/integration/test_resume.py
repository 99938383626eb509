"""What is done to the process changes nothing of what it learns: kills, stops, new devices."""

import random
import signal

import numpy as np
import pytest
import training_runs as runs

from vishwam_t5x.training.run_dir import RunDir

STEPS = 30
BATCHES = ("examples_crc32", "next_example", "carried", "weight_sum/text")
NUMBERS = ("loss", "loss/text", "loss/image", "grad_norm", "param_norm")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quickstart_cache):
    """A run that nobody disturbs."""
    model_dir = tmp_path_factory.mktemp("straight") / "run"
    runs.train(model_dir, STEPS, env=quickstart_cache)
    return model_dir


def test_killed_and_resumed_is_bit_equal(straight, tmp_path, quickstart_cache):
    model_dir = tmp_path / "run"
    process = runs.start(model_dir, STEPS, runs.ENDLESS, env=quickstart_cache)
    runs.wait_for_step(process, model_dir, random.SystemRandom().randrange(12, 24))
    runs.kill(process)
    runs.train(model_dir, STEPS, env=quickstart_cache)
    assert "restored step" in (done := runs.train(model_dir, STEPS, env=quickstart_cache)).stderr
    assert f"the run is at step {STEPS} of {STEPS}: nothing is left to do" in done.stderr
    assert "MFU is relative" not in done.stderr, "it says so before anything is compiled"
    taken = sorted(runs.column(model_dir, "loss"))
    assert taken == list(range(1, max(STEPS, len(taken)) + 1))
    runs.assert_same(straight, model_dir, BATCHES + NUMBERS)


def test_resumed_on_eight_devices(straight, tmp_path, quickstart_cache):
    model_dir = tmp_path / "run"
    process = runs.start(model_dir, STEPS, runs.ENDLESS, env=quickstart_cache)
    runs.wait_for_step(process, model_dir, 12)
    runs.kill(process)
    on_one = runs.column(model_dir, "loss")
    mesh = ("--gin.MeshConfig.data=2", "--gin.MeshConfig.fsdp=2", "--gin.MeshConfig.tensor=2")
    runs.train(model_dir, STEPS, *mesh, env=quickstart_cache, devices=8)
    runs.assert_same(straight, model_dir, BATCHES)
    expected, found = runs.column(straight, "loss"), runs.column(model_dir, "loss")
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-4)
    assert found != {**expected, **on_one}, "eight devices add up in another order than one"


def test_sigterm_saves_and_exits_resumable(straight, tmp_path, quickstart_cache):
    model_dir = tmp_path / "run"
    process = runs.start(model_dir, STEPS, runs.ENDLESS, "--gin.SAVE_PERIOD=1000",
                         env=quickstart_cache)
    runs.wait_for_step(process, model_dir, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    saved = sorted(int(path.name) for path in (model_dir / "checkpoints").iterdir())
    assert saved == [runs.last_step(model_dir)], "the very step it stopped at is saved"
    runs.train(model_dir, STEPS, "--gin.SAVE_PERIOD=1000", env=quickstart_cache)
    runs.assert_same(straight, model_dir, ("loss",))


def test_changed_config_is_refused_or_said(straight, quickstart_cache):
    refused = runs.train(straight, STEPS, "--gin.LEARNING_RATE=0.01", env=quickstart_cache,
                         exit_code=2)
    assert "LEARNING_RATE" in refused.stderr and "0.003" in refused.stderr
    assert "Traceback" not in refused.stderr
    dropout = runs.train(straight, STEPS, "--gin.DROPOUT_RATE=0.1", "--gin.NUM_MICROBATCHES=2",
                         "--allow_config_change=DROPOUT_RATE", env=quickstart_cache, exit_code=2)
    assert "NUM_MICROBATCHES: 1 -> 2   (changes the dropout masks)" in dropout.stderr
    before = (straight / "config.gin").read_text()
    with RunDir.open(straight).held(0.0):
        held = runs.train(straight, STEPS, "--gin.LOG_PERIOD=7", env=quickstart_cache, exit_code=2)
    assert "another process is training into this MODEL_DIR" in held.stderr
    assert (straight / "config.gin").read_text() == before, "it is that of the holder"
    said = runs.train(straight, STEPS, "--gin.LOG_PERIOD=7", "--gin.NUM_MICROBATCHES=2",
                      env=quickstart_cache)
    assert "LOG_PERIOD" in said.stderr
