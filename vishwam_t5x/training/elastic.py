"""The same global batch on fewer or more devices: microbatches make up the difference."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from absl import logging
from jax.sharding import Mesh

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.sharding import batch_parts
from vishwam_t5x.training import ledger


def microbatches(at_least: int, batch_size: int, max_rows: int | None
                 ) -> Callable[[Mesh, LogicalAxisRules | None], int]:
    """Returns the function that says into how many microbatches a batch is cut on a mesh.

    That is `at_least`, or the smallest larger number that divides the rows of a device into equal
    parts of at most `max_rows`.

    Args:
        at_least: how many are asked for.
        batch_size: rows of the global batch.
        max_rows: rows of a microbatch that one device may hold; None: as many as there are.

    Raises:
        UserError: `max_rows` is less than 1.
    """
    if max_rows is None:
        return lambda mesh, rules: at_least
    if max_rows < 1:
        raise UserError("max_rows_per_device must be at least 1 row", got=max_rows)
    return lambda mesh, rules: _cut(at_least, batch_size, max_rows, mesh, rules)


def say_if_masks_change(path: pathlib.Path, now: int, model: Any) -> None:
    """Says so if a resumed run draws other dropout masks, since it is cut into other microbatches.

    Args:
        path: ledger of the run, which says how the last session was cut.
        now: microbatches of this one.
        model: configuration of the model; without dropout there is nothing to say.
    """
    before = next((session.microbatches for session in reversed(ledger.read(path))
                   if session.microbatches is not None), now)
    if before != now and getattr(model, "dropout_rate", None):
        logging.warning("%d microbatches instead of %d: from here on the dropout masks are not "
                        "those that the run would have had, though the batches are", now, before)


def _cut(at_least: int, batch_size: int, max_rows: int, mesh: Mesh,
         rules: LogicalAxisRules | None) -> int:
    rows, left = divmod(batch_size, batch_parts(mesh, rules))
    if left:
        return at_least  # refused, with the sizes that would do, where the batch is placed
    number = next(number for number in range(at_least, max(rows, at_least) + 1)
                  if number >= rows or (rows % number == 0 and rows // number <= max_rows))
    if number != at_least:
        logging.info("%d microbatches instead of %d: %d rows at a time on each device", number,
                     at_least, rows // number)
    return number
