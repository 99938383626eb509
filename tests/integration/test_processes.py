"""Several processes train one run together, stop together, and any number goes on."""

import signal

import numpy as np
import process_groups as groups
import pytest
import training_runs as runs

STEPS = 30
SAVE_NEVER = "--gin.SAVE_PERIOD=1000"
SOON = "--gin.WatchdogConfig.peer_seconds=10"
SAME = ("examples_crc32", "next_example", "carried", "weight_sum/text")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quickstart_cache):
    """One process, four devices, undisturbed."""
    model_dir = tmp_path_factory.mktemp("straight") / "run"
    runs.train(model_dir, STEPS, SAVE_NEVER, env=quickstart_cache, devices=4)
    return model_dir


def test_two_stop_together_and_four_devices_go_on_bit_equal(straight, tmp_path, quickstart_cache):
    """Two processes of two devices are one of four: the mesh decides the numbers."""
    model_dir = tmp_path / "run"
    group = groups.start(model_dir, STEPS, SAVE_NEVER, runs.ENDLESS, count=2, env=quickstart_cache)
    runs.wait_for_step(group.processes[0], model_dir, 5)
    group.processes[1].send_signal(signal.SIGTERM)  # the notice reaches one of them
    assert group.wait() == [75, 75], group.tail()
    saved = [int(path.name) for path in (model_dir / "checkpoints").iterdir()]
    assert saved == [runs.last_step(model_dir)]
    # Going on, the notice comes before there are steps: nothing to save, and nobody waits for who
    # has gone.
    group = groups.start(model_dir, STEPS, SAVE_NEVER, runs.ENDLESS, count=2, env=quickstart_cache)
    group.wait_until_said(1, "mesh:")
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait() == [75, 75], group.tail()
    runs.train(model_dir, STEPS, SAVE_NEVER, env=quickstart_cache, devices=4)
    runs.assert_same(straight, model_dir, SAME)
    expected, found = runs.column(straight, "loss"), runs.column(model_dir, "loss")
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize(("name", "lost"), [
    ("SIGSTOP", 1), pytest.param("SIGKILL", 0, marks=pytest.mark.slow),
    pytest.param("SIGKILL", 1, marks=pytest.mark.slow)])
def test_a_lost_process_ends_the_others_resumably(name, lost, tmp_path, quickstart_cache):
    model_dir = tmp_path / "run"
    group = groups.start(model_dir, 10_000, SAVE_NEVER, SOON, count=2, env=quickstart_cache)
    runs.wait_for_step(group.processes[0], model_dir, 2)
    victim, other = group.processes[lost], group.processes[1 - lost]
    victim.send_signal(getattr(signal, name))
    try:
        assert other.wait(timeout=120) == 76, group.tail()
        log = group.log(1 - lost)
        assert f"process {lost}" in log and "has been silent for 10 s" in log
        assert "hread 0x" in log and "loop.py" in log, "the stacks of all threads"
        if name == "SIGSTOP":
            victim.send_signal(signal.SIGCONT)
            assert victim.wait(timeout=120) == 76, "it finds that the others have gone"
    finally:
        victim.kill()
        victim.wait()


def test_absent_processes_are_named(tmp_path, quickstart_cache):
    group = groups.start(tmp_path / "run", STEPS, "--roll_call_seconds=8", count=3, absent=1,
                         env=quickstart_cache)
    assert group.wait() == [76, 76], group.tail()
    for index in range(2):
        assert "roll-call: process 1 missing (not there after 8 s)" in group.log(index)


def test_other_settings_are_refused_by_all(tmp_path, quickstart_cache):
    group = groups.start(tmp_path / "run", STEPS, count=2, env=quickstart_cache,
                         odd={1: ("--gin.LEARNING_RATE=0.5",)})
    assert group.wait() == [2, 2], group.tail()
    for index in range(2):
        log = group.log(index)
        assert "the processes differ in configuration or code" in log
        assert "process 1  config: LEARNING_RATE = 0.5" in log and "Traceback" not in log
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_two_then_one_then_four(straight, tmp_path, quickstart_cache):
    """The same number of devices in one, two or four processes: the same bits."""
    model_dir = tmp_path / "run"
    for count, until in ((2, 10), (1, 20), (4, STEPS)):
        group = groups.start(model_dir, until, SAVE_NEVER, count=count, devices=4 // count,
                             env=quickstart_cache)
        assert set(group.wait(600)) == {0}, group.tail()
    runs.assert_same(straight, model_dir, SAME)
    for name in ("loss", "loss/text", "loss/image", "grad_norm", "param_norm"):
        expected, found = runs.column(straight, name), runs.column(model_dir, name)
        np.testing.assert_allclose([found[s] for s in expected], list(expected.values()),
                                   rtol=1e-5, err_msg=name)
    print("bit-equal:", runs.column(straight, "loss") == runs.column(model_dir, "loss"))
