"""A cloud's notice that this machine will be taken away, turned into the SIGTERM that we know.

Most schedulers send SIGTERM themselves. Google's metadata server also says it to a machine that
nobody schedules; it is asked only if `WatchdogConfig.metadata_server` names it, as `vishwam launch`
lets a run on Cloud TPU VMs do.
"""

from __future__ import annotations

import http.client
import os
import signal
import threading
import urllib.request

from absl import logging

SERVER = "http://metadata.google.internal"
_PATHS = {"preempted": ("TRUE",), "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",)}
_PERIOD = 10.0  # seconds between questions; a preempted machine has 30


def notice(server: str, timeout: float = 2.0) -> str | None:
    """Returns what the metadata server announces, None if nothing or if it does not answer.

    Args:
        server: URL of the server, without path.
        timeout: seconds to wait for each answer.
    """
    for path, alarms in _PATHS.items():
        request = urllib.request.Request(f"{server}/computeMetadata/v1/instance/{path}",
                                         headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read(200).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException):
            continue  # Half an answer is none; the next question may get one.
        if text in alarms:
            return f"{path}: {text}"
    return None


def watch(server: str, ended: threading.Event, period: float = _PERIOD) -> None:
    """Asks until `ended`; at the first notice sends this process SIGTERM, once."""
    while not ended.wait(period):
        if (said := notice(server)) is not None:
            logging.warning("this machine will be taken away (%s): saving and stopping", said)
            os.kill(os.getpid(), signal.SIGTERM)
            return
