"""A step that hangs ends the process with 76, the stacks and the ledger; an honest end does not."""

import json
import os
import subprocess
import sys

import pytest

import helpers
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.training.ledger import Ledger
from vishwam_t5x.training.watchdog import Watchdog, WatchdogConfig

CODE = """
import pathlib, sys, threading
from vishwam_t5x.training import watchdog
from vishwam_t5x.training.ledger import Ledger

how = sys.argv[2]

def a_step_that_hangs():
    threading.Event().wait(300)

ledger = Ledger(pathlib.Path(sys.argv[1]))
if how == "file system":
    watchdog._LAST_WORDS = 0.5
    ledger.close = lambda why: threading.Event().wait(300)
if how == "devices":
    with watchdog.limited("starting the devices", 30):
        pass
    with watchdog.limited("starting the devices", 0.5):
        a_step_that_hangs()
step_seconds = 300 if how == "end" else 0.5
with watchdog.Watchdog(watchdog.WatchdogConfig(step_seconds=step_seconds), ledger):
    ledger.start(7)
    ledger.enter("host")
    if how != "end":
        with ledger.spend("step"):
            a_step_that_hangs()
"""


@pytest.mark.parametrize(("how", "code"), [
    ("hang", 76), ("file system", 76), ("devices", 76), ("end", 0)])
def test_a_hung_step(how, code, tmp_path):
    path = tmp_path / "ledger.jsonl"
    done = helpers.run(["-c", CODE, str(path), how], timeout=120)
    assert done.returncode == code, done.stderr
    if how == "end":
        assert json.loads(path.read_text().splitlines()[-1])["why"] == "finished"
        assert not done.stderr
        return
    assert "a_step_that_hangs" in done.stderr
    if how == "devices":
        assert "starting the devices: not done in 0.5 s" in done.stderr
        return
    assert "nothing has happened for 0.5 s (in phase 'step')" in done.stderr
    if how == "hang":
        why = json.loads(path.read_text().splitlines()[-1])["why"]
        assert why.startswith("watchdog: nothing has happened")


def test_it_ends_with_nobody_listening(tmp_path):
    """Whoever read its messages has been killed."""
    reader, writer = os.pipe()
    with subprocess.Popen(
            [sys.executable, "-c", CODE, str(tmp_path / "ledger.jsonl"), "hang"], stderr=writer,
            stdout=writer, env=helpers.environment(), cwd=helpers.ROOT) as process:
        os.close(reader)
        os.close(writer)
        assert process.wait(timeout=120) == 76


def test_how_long_what_may_take():
    now = [0.0]
    ledger = Ledger(clock=lambda: now[0])
    watchdog = Watchdog(WatchdogConfig(step_seconds=10.0, phase_seconds=20.0), ledger,
                        clock=lambda: now[0])

    def lasts(phase, seconds):
        ledger.enter(phase)
        for _ in range(seconds):
            now[0] += 1.0
            if (why := watchdog.hung()) is not None:
                return why
        return None

    for phase, limit in (("init", 20), ("compile", 20), ("step", 10), ("data_wait", 10),
                         ("host", 10), ("eval", 20), ("save", 20)):
        assert lasts(phase, limit) is None
        assert lasts(phase, limit + 1) == (
            f"nothing has happened for {limit} s (in phase '{phase}')")
    assert lasts("cache", 10_000) is None
    assert lasts("step", 4) is None
    now[0] += 1000.0  # stopped, and continued
    assert watchdog.hung() is None
    assert lasts("step", 11) is not None


@pytest.mark.parametrize("wrong", [{"step_seconds": 0}, {"peer_seconds": 100}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        WatchdogConfig(**wrong)
