"""T5X's checkpointers: which checkpoints are kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from vishwam_t5x.core.errors import UserError

STANDS_FOR = "t5x.checkpoints"


@dataclasses.dataclass(frozen=True)
class Checkpointer:
    """Keeps the newest checkpoints: what a run does anyway."""

    def retention(self) -> dict[str, Any]:
        """Returns the fields of `CheckpointConfig` that it means."""
        return {}


@dataclasses.dataclass(frozen=True)
class SaveBestCheckpointer(Checkpointer):
    """Keeps the best checkpoints by a metric too, as many as of the newest.

    The defaults are T5X's, of which two are refused: set the metric and False.

    Attributes:
        metric_name_to_monitor: a metric of the evaluation, 'eval/loss' for example.
        metric_mode: 'min' or 'max', what is best.
        keep_checkpoints_without_metrics: False: they are kept as the newest are, no longer.
        force_keep_period: checkpoints at multiples of this many steps are kept for ever.
    """

    metric_name_to_monitor: str = "train/accuracy"
    metric_mode: str = "max"
    keep_checkpoints_without_metrics: bool = True
    force_keep_period: int | None = None

    def retention(self) -> dict[str, Any]:
        """See `Checkpointer.retention`."""
        if not self.metric_name_to_monitor.startswith("eval/"):
            raise UserError("SaveBestCheckpointer keeps by a metric of the evaluation",
                            got=f"metric_name_to_monitor = {self.metric_name_to_monitor!r}",
                            fix="SaveBestCheckpointer.metric_name_to_monitor = 'eval/loss' or "
                                "'eval/accuracy/text', as metrics.jsonl names them")
        if self.keep_checkpoints_without_metrics:
            raise UserError("a checkpoint without the metric is kept while it is new, no longer",
                            got="keep_checkpoints_without_metrics = True (T5X's default)",
                            fix="SaveBestCheckpointer.keep_checkpoints_without_metrics = False")
        return {"keep_best_metric": self.metric_name_to_monitor,
                "keep_best_mode": self.metric_mode, "keep_every_steps": self.force_keep_period}
