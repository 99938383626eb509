"""T5X's Adafactor by its own names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vishwam_t5x.compat import refused
from vishwam_t5x.compat.optimizers import LearningRate, OptimizerDef, shifted
from vishwam_t5x.training import optimizers
from vishwam_t5x.training.adafactor_layout import HParamMap as HParamMap
from vishwam_t5x.training.adafactor_layout import (
    standard_logical_factor_rules as standard_logical_factor_rules,
)

STANDS_FOR = "t5x.adafactor"


@dataclasses.dataclass(frozen=True)
class Adafactor(OptimizerDef):
    """Adafactor; see `training.adafactor.AdafactorRules`.

    Attributes:
        learning_rate: changes nothing, as in T5X: `trainer.Trainer.learning_rate_fn` says it.
        global_norm_clip_threshold: gradients are scaled down to this global norm; None: never.
        factored, multiply_by_parameter_scale, beta1, decay_rate, step_offset, clipping_threshold,
            weight_decay_rate, min_dim_size_to_factor, epsilon1, epsilon2, dtype_momentum,
            factor_map, logical_factor_rules, weight_decay_rate_lr_exponent, max_parameter_scale,
            skip_nan_updates: as there.
    """

    learning_rate: float | None = None
    factored: bool = True
    multiply_by_parameter_scale: bool | HParamMap = True
    beta1: float | None = None
    decay_rate: float = 0.8
    step_offset: int = 0
    clipping_threshold: float | None = 1.0
    weight_decay_rate: float | None = None
    min_dim_size_to_factor: int = 128
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3
    dtype_momentum: str = "float32"
    factor_map: HParamMap | None = None
    logical_factor_rules: Mapping[str, Any] | None = None
    weight_decay_rate_lr_exponent: float | None = None
    global_norm_clip_threshold: float | None = None
    max_parameter_scale: float | None = None
    skip_nan_updates: bool = False

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.Adafactor", vars(self))

    def ours(self, learning_rate: LearningRate, before: int = 0) -> optimizers.Optimizer:
        """See `OptimizerDef.ours`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["learning_rate"]
        clip = fields.pop("global_norm_clip_threshold")
        # T5X's weight decay spares no parameter.
        return optimizers.Adafactor(learning_rate=shifted(learning_rate, before),
                                    global_norm_clip=clip, no_decay=(), **fields)
