"""Batches and parameters of an evaluation on the mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vishwam_t5x.parallelism import sharding
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules


class Placement:
    """Puts batches of a fixed number of rows on a mesh, rows split as in training."""

    def __init__(self, mesh: Mesh, rules: LogicalAxisRules | None, batch_size: int) -> None:
        """Args:
            mesh: devices.
            rules: logical axis rules; the standard ones by default.
            batch_size: rows of every batch.

        Raises:
            UserError: the rows do not divide over the devices.
        """
        sharding.check_batch_size(batch_size, mesh, rules)
        self.mesh, self.rules, self.batch_size = mesh, rules, batch_size
        self.rows: NamedSharding = sharding.batch_sharding(mesh, rules)
        self.replicated: NamedSharding = sharding.replicated(mesh)

    def context(self) -> contextlib.AbstractContextManager:
        """The mesh and axis rules, to be entered around every call of a compiled function."""
        return sharding.partitioning(self.mesh, self.rules)

    def put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns whole-batch arrays, the same on every process, split by rows over the mesh."""
        return {name: self._put(array) for name, array in arrays.items()}

    def _put(self, array: np.ndarray) -> jax.Array:
        if self.rows.is_fully_addressable:
            return jax.device_put(array, self.rows)
        return jax.make_array_from_callback(array.shape, self.rows, lambda index: array[index])


def sum_over_processes(count: int) -> int:
    """Returns the sum of `count` over all processes, which must call it together."""
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    return int(np.sum(multihost_utils.process_allgather(np.asarray(count))))
