"""What the processes of a run do together, or one of them for all, before the first step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from absl import logging

from vishwam_t5x.core import distributed
from vishwam_t5x.training import elastic, hooks, same_data, setup
from vishwam_t5x.training.ledger import Ledger
from vishwam_t5x.training.run_dir import RunDir
from vishwam_t5x.training.stability import CulpritBatches
from vishwam_t5x.training.state import TrainState
from vishwam_t5x.training.writers import read_records


def opened(model_dir: str) -> RunDir:
    """Opens the directory; if one process cannot, all refuse."""
    found: list[RunDir] = []
    distributed.refuse_together("MODEL_DIR", lambda: found.append(RunDir.open(model_dir)))
    return found[0]


def hold(stack: contextlib.ExitStack, run_dir: RunDir, wait: float,
         check_run: Callable[[RunDir], object] | None) -> None:
    """Process 0 holds the directory for all; if it cannot, all refuse.

    Args:
        stack: holds it until it is closed.
        run_dir: of the run.
        wait: seconds to wait for another holder.
        check_run: called in process 0 once it holds the directory.
    """
    def take() -> None:
        if distributed.is_primary():
            stack.enter_context(run_dir.held(wait))
            if check_run is not None:
                check_run(run_dir)

    distributed.refuse_together("MODEL_DIR held", take)


def is_over(run_dir: RunDir, step: int, total_steps: int, early_stop: hooks.EarlyStop | None
            ) -> bool:
    """Whether nothing is left to do after `step`: the same answer on every process."""
    if step >= total_steps:
        logging.info("the run is at step %d of %d: nothing is left to do", step, total_steps)
        return True
    # A run that ended early stays ended: going on would learn what it was not to learn. Process 0
    # says so for all: what another sees of the file may be old.
    ended = early_stop.replay(run_dir.metrics, step) if early_stop and distributed.is_primary() \
        else None
    if said := distributed.from_primary("the end of the run", ended or ""):
        logging.info("the run had ended at step %d: %s", step, said)
    return bool(said)


def check_examples(run_dir: RunDir, examples: Any, step: int) -> None:
    """Process 0 compares the examples with those that the run has read, for all."""
    def check() -> None:
        if distributed.is_primary():
            same_data.check(run_dir, examples, step > 0)

    distributed.refuse_together("examples of the run", check)


def culprits(run_dir: RunDir) -> CulpritBatches:
    """Returns the batches to step over, as process 0 knows them."""
    return CulpritBatches(run_dir.path, run_dir.url, functools.partial(
        distributed.from_primary, "batches to step over"))


def begin(ledger: Ledger, run_dir: RunDir, state: TrainState, parts: setup.Parts) -> int:
    """Takes down that a process begins, and says what will be otherwise; returns the step."""
    step, cut = int(state.step), parts.step.num_microbatches
    if distributed.is_primary() and step > 0:
        elastic.say_if_masks_change(run_dir.ledger, cut, parts.model.config)
    ledger.start(step, read_records(run_dir.metrics), microbatches=cut)
    return step
