"""T5X's `gin_utils`: functions to compute values with inside gin files."""

from __future__ import annotations

from typing import Any

STANDS_FOR = "t5x.gin_utils"


def summarize_gin_config(**unused: Any) -> None:
    """What T5X writes a configuration with; here MODEL_DIR/config.gin always has it."""


def sum_fn(var1: Any, var2: Any) -> Any:
    """Returns var1 + var2."""
    return var1 + var2


def bool_fn(var1: Any) -> bool:
    """Returns whether var1 counts as true."""
    return bool(var1)


def string_split_fn(text: str, separator: str, maxsplit: int = -1, index: int | None = None
                    ) -> Any:
    """Returns the parts of a text, or one of them.

    Args:
        text: what is split.
        separator: where.
        maxsplit: at most so many times; -1: everywhere.
        index: which part; None: all.
    """
    parts = text.split(separator, maxsplit)
    return parts if index is None else parts[index]
