"""A step that hangs ends the process with 76, the stacks and the ledger; an honest end does not."""

import json

import pytest

import helpers
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.training.watchdog import WatchdogConfig

CODE = """
import pathlib, sys, time
from vishwam_t5x.training.ledger import Ledger
from vishwam_t5x.training.watchdog import Watchdog, WatchdogConfig

def a_step_that_hangs():
    time.sleep(60)

ledger = Ledger(pathlib.Path(sys.argv[1]))
with Watchdog(WatchdogConfig(step_seconds=0.5, phase_seconds=1.0), ledger):
    ledger.start(7)
    time.sleep(1.5)  # starting may take as long as it likes
    ledger.enter("host")
    for _ in range(8):
        with ledger.spend("step"):
            time.sleep(0.2)
    with ledger.spend("save"):
        time.sleep(0.7)
    if sys.argv[2] == "hang":
        with ledger.spend("step"):
            a_step_that_hangs()
"""


@pytest.mark.parametrize(("how", "code"), [("hang", 76), ("end", 0)])
def test_a_hung_step(how, code, tmp_path):
    path = tmp_path / "ledger.jsonl"
    done = helpers.run(["-c", CODE, str(path), how])
    assert done.returncode == code, done.stderr
    why = json.loads(path.read_text().splitlines()[-1])["why"]
    if how == "end":
        assert why == "finished" and not done.stderr
    else:
        assert "a_step_that_hangs" in done.stderr
        assert "nothing has happened for 0.5 s (in phase 'step')" in done.stderr
        assert why.startswith("watchdog: nothing has happened")


@pytest.mark.parametrize("wrong", [{"step_seconds": 0}, {"peer_seconds": 100}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        WatchdogConfig(**wrong)
