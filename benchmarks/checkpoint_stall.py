"""How long a save holds the training loop, against the time of a step.

usage: python benchmarks/checkpoint_stall.py [--saves=8] [--steps_between=15]

The loop of training in small: a step, its metrics, and from time to time `Checkpoints.save`, whose
write goes on while the next steps run. A save may hold the loop for one step at most.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time

from common import Figures, write_text_cache
from workload import Workload

from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core.batch import DataPosition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--steps_between", type=int, default=15)
    options = parser.parse_args()
    figures = Figures("checkpoint_stall")
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder) / "cache"
        write_text_cache(cache)
        work = Workload.create(cache)
        host = work.batches.batch(DataPosition(), range(work.batches.spec.batch_size))
        assert host is not None
        arrays = work.on_device(host.arrays)
        for _ in range(5):
            work.step(arrays)
        quiet, writing, held, whole = [], [], [], []
        with Checkpoints(pathlib.Path(folder) / "checkpoints", CheckpointConfig()) as saver:
            for number in range(1, options.saves * options.steps_between + 1):
                start = time.monotonic()
                work.step(arrays)
                # The write of a save is over well before the last steps in front of the next one.
                place = number % options.steps_between
                (writing if place in (1, 2, 3) and number > 3 else quiet).append(
                    time.monotonic() - start)
                if place == 0:
                    start = time.monotonic()
                    assert saver.save(number, work.state)
                    whole.append(time.monotonic() - start)
                    held.append(saver.seconds_held)
            assert saver.wait() and saver.failed_saves == 0
    usual = statistics.median(quiet)
    # The first save starts Orbax's threads; it counts like any other.
    figures.add("save_held", [1e3 * seconds for seconds in held], "ms")
    figures.add("save_held_longest", [1e3 * max(*held, *whole)], "ms", bar=1e3 * usual)
    figures.add("save_held_longest_in_steps", [max(*held, *whole) / usual], "steps", bar=1)
    figures.add("step_wall", [1e3 * seconds for seconds in quiet], "ms")
    figures.add("step_wall_while_writing", [1e3 * seconds for seconds in writing], "ms")
    figures.write()


if __name__ == "__main__":
    main()
