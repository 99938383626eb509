"""What the features of a cached example look like, and which modality each belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

META_PREFIX = "meta_"
"""Features for metrics only (identifiers, reference strings): cached, never put in a batch."""


class FeatureInfo(NamedTuple):
    """Shape and dtype of one feature of a task.

    Attributes:
        shape: None where the size differs from record to record; () for scalars and strings.
        dtype: a NumPy dtype name, or 'bytes' for one byte string.
    """

    shape: tuple[int | None, ...]
    dtype: str


def length_columns(features: Mapping[str, FeatureInfo]) -> tuple[tuple[str, int], ...]:
    """Returns the (feature, axis) pairs whose sizes lengths.npy holds.

    One column for a feature of rank 1, and for a history: its frames, which all have one size. Two
    (height and width, or frames and mel bins) for others of a higher rank, from which the number of
    patches follows.
    """
    return tuple((name, axis) for name, info in features.items()
                 if not name.startswith(META_PREFIX)
                 for axis in range(1 if is_history(name) else min(len(info.shape), 2)))


def modality_of(feature: str) -> str:
    """Returns 'image' for 'image', 'image_inputs', 'image_target_codes' and so on; 'image_history'
    for 'image_history_inputs'."""
    words = feature.split("_")
    return "_".join(words[:2]) if words[1:2] == ["history"] else words[0]


def is_history(feature: str) -> bool:
    """Whether a feature holds frames, or numbers of their patches."""
    return modality_of(feature).endswith("_history")


def explain_mismatch(example: Mapping[str, Any], features: Mapping[str, FeatureInfo]) -> str | None:
    """Returns why `example` is not what `features` promise, or None if it is."""
    if example.keys() != features.keys():
        missing, extra = features.keys() - example.keys(), example.keys() - features.keys()
        return f"features missing: {sorted(missing)}, not expected: {sorted(extra)}"
    for name, (shape, dtype) in features.items():
        value = example[name]
        if dtype == "bytes":
            if not isinstance(value, bytes):
                return f"{name} is {type(value).__name__}, not bytes"
            continue
        if not isinstance(value, np.ndarray | np.generic):
            return f"{name} is {type(value).__name__}, not an array"
        if value.dtype != np.dtype(dtype):
            return f"{name} has dtype {value.dtype}, not {dtype}"
        if len(value.shape) != len(shape) or any(
                want is not None and want != got
                for want, got in zip(shape, value.shape, strict=True)):
            return f"{name} has shape {value.shape}, not {shape}"
    return None
