"""T5X's trainer: microbatches and the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import logging

STANDS_FOR = "t5x.trainer"


@dataclasses.dataclass(frozen=True)
class WeightMetricsComputer:
    """What T5X logs of every parameter; `metrics.jsonl` has the norms of all together."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How a step is taken.

    Attributes:
        learning_rate_fn: learning rate by step.
        num_microbatches: parts a batch is cut into; None or 0: it is not cut.
        weight_metrics_computer: norms are logged, of all parameters together.
    """

    learning_rate_fn: Callable[[Any], Any]
    num_microbatches: int | None = None
    weight_metrics_computer: WeightMetricsComputer | None = None

    def __post_init__(self) -> None:
        if self.weight_metrics_computer is not None:
            logging.info("WeightMetricsComputer: metrics.jsonl has the norms of gradients and "
                         "parameters over all parameters, none by parameter")
