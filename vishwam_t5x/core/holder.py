"""Which process of which machine holds something, as it is written beside it."""

from __future__ import annotations

import os
import pathlib
import socket
from typing import Any


def sign() -> dict[str, Any]:
    """Returns what tells this process from any other, as JSON takes it."""
    return {"host": socket.gethostname(), "boot": _boot(), "process": os.getpid(),
            "began": _began(os.getpid())}


def is_of_here(found: dict[str, Any]) -> bool:
    """Whether the process that left this sign is, or was, one of this machine.

    False also where that is not known.
    """
    return bool(_boot()) and found.get("boot") == _boot() and bool(found.get("began"))


def lives_here(found: dict[str, Any]) -> bool:
    """Whether that process is one of this machine, and is alive."""
    return is_of_here(found) and _began(int(found["process"])) == found["began"]


def name(found: dict[str, Any]) -> str:
    """Returns 'process 17 on host7'."""
    return f"process {found.get('process', '?')} on {found.get('host', 'an unknown host')}"


def _boot() -> str:
    """Tells machines apart, and containers that share a name: '' where it is not known."""
    try:
        return (pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                + os.readlink("/proc/self/ns/pid"))
    except OSError:
        return ""


def _began(process: int) -> str:
    """When a process of this machine began, so that a number used again is another one."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
