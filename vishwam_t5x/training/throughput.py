"""How fast the run goes: a window of steps as numbers a second."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from vishwam_t5x.training.writers import Record


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What one batch held, counted on the host; `data.prefetch.BatchInfo` has these fields too.

    Attributes:
        num_examples: examples in the batch.
        input_tokens: filled encoder slots, all modalities.
        target_tokens: filled decoder slots.
        packing: share of the row volume that is filled, the larger of encoder and decoder.
        wait_seconds: how long the loop waited for the batch.
        skipped: damaged records left out, each saying which and why.
    """

    num_examples: int
    input_tokens: int
    target_tokens: int
    packing: float
    wait_seconds: float
    skipped: tuple[Exception, ...] = ()


class Throughput:
    """Adds up `StepWork` and reports the mean over the steps since the last report.

    Args:
        flops_per_token_pair: training FLOPs per (filled encoder slot, filled decoder slot); see
            `core.hardware`. Useful work only: padding is not counted.
        peak_flops: FLOP/s of all devices together at the compute dtype, or None if unknown.
        clock: seconds, injected by tests.
    """

    def __init__(self, flops_per_token_pair: tuple[float, float], peak_flops: float | None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._flops, self._peak, self._clock = flops_per_token_pair, peak_flops, clock
        self.bad_records = 0
        self.seconds_per_step = 0.0
        """Of the last report."""
        self.restart()

    def restart(self) -> None:
        """Begins a new window, e.g. after compiling or evaluating."""
        self._start, self._steps = self._clock(), 0
        self._work: list[StepWork] = []
        self._excluded = 0.0

    def exclude(self, seconds: float) -> None:
        """Takes time that was not training (evaluation, say) out of the window."""
        self._excluded += seconds

    def add(self, work: StepWork) -> None:
        """Counts one step."""
        self._steps += 1
        self._work.append(work)
        self.bad_records += len(work.skipped)

    def report(self) -> Record:
        """Returns the window's figures and begins a new one; times in seconds."""
        steps = max(self._steps, 1)
        seconds = max(self._clock() - self._start - self._excluded, 1e-9)
        self.seconds_per_step = seconds / steps
        inputs = sum(work.input_tokens for work in self._work)
        targets = sum(work.target_tokens for work in self._work)
        flops = inputs * self._flops[0] + targets * self._flops[1]
        record = {
            "seconds_per_step": self.seconds_per_step,
            "data_wait_seconds": sum(work.wait_seconds for work in self._work) / steps,
            "tokens_per_second": (inputs + targets) / seconds,
            "examples_per_second": sum(work.num_examples for work in self._work) / seconds,
            "packing": sum(work.packing for work in self._work) / steps,
            "mfu": None if self._peak is None else flops / seconds / self._peak,
            "bad_records": self.bad_records,
        }
        self.restart()
        return record
