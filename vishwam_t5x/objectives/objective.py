"""What the data pipeline asks of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from vishwam_t5x.core.batch import ModalityLengths


class ManyLengths(NamedTuple):
    """`ModalityLengths` of n examples: int64 [n] by modality; 0 where an example lacks it."""

    inputs: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]


class Objective(Protocol):
    """What the data pipeline asks of an objective.

    Both methods are pure functions of their arguments, and the lengths of what `apply` returns are
    those `lengths` promised for the same (seed, example): batches are packed by the promise.
    """

    input_modalities: tuple[str, ...]
    target_modalities: tuple[str, ...]

    def lengths(self, clean_lengths: Mapping[str, int], *, seed: int,
                example: int) -> ModalityLengths:
        """Returns the slots each modality will take."""

    def apply(self, clean: Mapping[str, np.ndarray], *, seed: int,
              example: int) -> dict[str, np.ndarray]:
        """Returns the model example, keys like 'inputs/text/tokens'."""
