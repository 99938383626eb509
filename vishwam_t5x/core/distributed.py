"""One program on many processes: joining them, and agreeing on what all must agree on."""

from __future__ import annotations

import os

import jax
import numpy as np

from vishwam_t5x.core.errors import UserError


def initialize(coordinator_address: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, timeout_seconds: int = 300) -> None:
    """Joins the processes of one run; does nothing for a run of a single process.

    With no arguments the cluster is looked for where jax looks (Cloud TPU, Slurm, Open MPI, GKE),
    but only if the environment names one: a laptop must not wait for a metadata server.

    Args:
        coordinator_address: 'host:port' of process 0.
        num_processes: processes in the run.
        process_id: number of this process, from 0.
        timeout_seconds: how long to wait for the others.

    Raises:
        UserError: some of the three are given and some are not, or there is no such process.
    """
    explicit = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError(
                "coordinator_address, process_count and process_index go together",
                got=f"{coordinator_address}, {num_processes}, {process_id}",
                fix="give all three, or none and let the cluster be detected")
        assert num_processes is not None and process_id is not None
        if not 0 <= process_id < num_processes:
            raise UserError("process_index counts the processes of the run from 0",
                            got=f"{process_id} of {num_processes}",
                            fix=f"a number from 0 to {max(num_processes, 1) - 1}")
        if ":" not in str(coordinator_address):
            raise UserError("coordinator_address is HOST:PORT of process 0",
                            got=repr(coordinator_address),
                            fix=f"--coordinator_address={coordinator_address or 'HOST'}:8476")
        jax.distributed.initialize(coordinator_address, num_processes, process_id,
                                   initialization_timeout=timeout_seconds)
        return
    several = (int(os.environ.get("SLURM_NTASKS", "1")) > 1
               or int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
               or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1)
    if several:
        jax.distributed.initialize(initialization_timeout=timeout_seconds)


def is_primary() -> bool:
    """Whether this process writes what only one process may write."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is true on any process; all processes must call it together."""
    if jax.process_count() == 1:
        return bool(flag)
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def barrier(name: str) -> None:
    """Waits until every process has arrived at the place called `name`."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
