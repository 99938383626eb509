"""How the processes of one command find each other, and make sure that all run the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax

from vishwam_t5x.core import coordination, distributed
from vishwam_t5x.core.errors import EXIT_ABORTED, UserError
from vishwam_t5x.training.ledger import Ledger
from vishwam_t5x.training.watchdog import Watchdog, WatchdogConfig, limited

if TYPE_CHECKING:
    from vishwam_t5x.gin_config import ParsedConfig

FLAGS = ("coordinator_address", "process_count", "process_index", "roll_call_seconds")
_OF_EACH = ("coordinator_address", "process_index")  # may differ between processes
_DEVICES_STARTED = 1800.0  # seconds that a driver, or the other hosts of a slice, may need
_SHARDS = re.compile(r"(?mi)^\s*\S*\bnum_shards = (\d+)")


def join(config: ParsedConfig) -> None:
    """Joins the processes of this command, by its flags or as the cluster says.

    Does nothing for a command of a single process. Jobs that share work by --num_shards are
    commands of their own, and join nothing unless flags say so.

    Raises:
        UserError: a flag is wrong, or the processes differ in configuration, flags or code.
        PeersLost: not all came.
    """
    numbers = {name: _whole_number(name, config.flags.get(name)) for name in FLAGS[1:]}
    if _is_one_of_several_jobs(config) and not any(
            config.flags.get(name) for name in FLAGS[:3]):
        return
    distributed.initialize(config.flags.get("coordinator_address"), numbers["process_count"],
                           numbers["process_index"], numbers["roll_call_seconds"] or 300)
    with limited("starting the devices", _DEVICES_STARTED):
        jax.devices()
    if jax.process_count() == 1:
        return
    flags = {name: value for name, value in config.flags.items() if name not in _OF_EACH}
    distributed.compare(
        "configuration or code", {"config": config.text(), "flags": json.dumps(flags, indent=1),
                                  "code": distributed.code_version()},
        fix="start the same command with the same version of everything on every host")
    coordination.on_abort(_lost)  # until a watchdog knows better


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends this process of several with 76, once another is gone or silent for a minute.

    How long anything takes has no limit: a cache that is filled may take hours.
    """
    if not distributed.is_joined():
        yield
        return
    with Watchdog(WatchdogConfig(step_seconds=None, phase_seconds=None), Ledger()):
        yield


def _is_one_of_several_jobs(config: ParsedConfig) -> bool:
    return (config.flags.get("num_shards", "1") != "1"
            or any(int(found) > 1 for found in _SHARDS.findall(config.text())))


def _lost() -> None:
    print("vishwam: another process was lost; run the same command to resume", file=sys.stderr,
          flush=True)
    os._exit(EXIT_ABORTED)


def _whole_number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--{name} must be a whole number", got=repr(text)) from None
