"""Several processes, one of them asked to stop: all stop, at the same place."""

import textwrap

import process_groups
import pytest

CODE = """
import os, signal, sys, time
index, count, port, when = *map(int, sys.argv[1:4]), sys.argv[4]
from vishwam_t5x.core import distributed
from vishwam_t5x.core.errors import Preempted
from vishwam_t5x.training.signals import StopRequest

distributed.initialize(f"localhost:{port}", count, index, 60)
stop = StopRequest().install()
distributed.barrier("installed")

def ask(now):
    if now == when and index == 1:
        os.kill(os.getpid(), signal.SIGTERM)

try:
    ask("early")
    if when == "early" and index == 0:
        distributed.barrier("a cache that the other fills", 100)  # in C++: hears no signal
    elif when == "early":
        time.sleep(100)
    stop.wait_for_steps()
    for step in range(1001, 1400):  # a resumed run
        distributed.barrier("step")
        ask("late" if step == 1005 else "")
        if stop.agreed(step):
            raise Preempted(step, "asked to stop")
    print("never stopped")
except Preempted as preempted:
    print(preempted)
    stop.restore()
    distributed.leave(75)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_all_stop_at_one_place(when):
    group = process_groups.start_code(textwrap.dedent(CODE), when, count=3)
    outputs = [process.communicate(timeout=120) for process in group]
    assert [process.returncode for process in group] == [75] * 3, outputs
    said = {(out + err).strip().splitlines()[-1].removeprefix("vishwam: ") for out, err in outputs}
    assert len(said) == 1, outputs
    assert ("before the first step" if when == "early" else "at step 1") in said.pop()
