"""Before jax joins the processes: are all there? Who is absent is said by name, in time.

jax itself would wait and then abort without a word on who is missing. The roll is called on the
very port that jax's coordination service will take afterwards, so no other needs to be open.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from typing import Any

from vishwam_t5x.core.coordination import host_name, peers_lost, remember_hosts
from vishwam_t5x.core.errors import UserError

log = logging.getLogger(__name__)

_SAY_EVERY = 30.0  # seconds between messages on who is still missing
_GRACE = 10.0  # seconds that a process waits for the verdict longer than process 0 for the others


def call(address: str, count: int, index: int, timeout: float) -> None:
    """Returns once all `count` processes have met at `address`; every process calls it.

    Args:
        address: HOST:PORT of process 0.
        count: processes of the run.
        index: number of this one.
        timeout: seconds that process 0 waits for the others.

    Raises:
        PeersLost: in every process that is there: who is absent.
        UserError: two processes have the same number, or they disagree on how many there are.
    """
    host, _, port = address.rpartition(":")
    if index == 0:
        answer = _preside(int(port), count, timeout)
    else:
        answer = _report(host.strip("[]"), int(port), count, index, timeout)
    if "mistake" in answer:
        raise UserError("the processes do not fit together", got=answer["mistake"],
                        fix="give every process the same --process_count and its own "
                            "--process_index, counted from 0")
    if answer["absent"]:
        raise peers_lost("roll-call", answer["absent"], f"not there after {timeout:g} s" + _hint(
            answer["absent"]))
    remember_hosts({int(number): name for number, name in answer["hosts"].items()})


def _hint(absent: list[int]) -> str:
    names = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    known = [names[index] for index in absent if index < len(names)]
    return f"; look at {', '.join(known)}" if known else ""


def _preside(port: int, count: int, timeout: float) -> dict[str, Any]:
    """Process 0: waits for the others and tells all the same."""
    deadline, said = time.monotonic() + timeout, time.monotonic()
    hosts, callers, mistake = {0: host_name()}, [], ""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(port))
        while len(hosts) < count and not mistake and time.monotonic() < deadline:
            listener.settimeout(min(1.0, max(deadline - time.monotonic(), 0.01)))
            with contextlib.suppress(TimeoutError):
                caller = stack.enter_context(listener.accept()[0])
                if (message := _read(caller)) is None:
                    continue  # a port scanner, a health check
                callers.append(caller)
                mistake = _mistake(message, count, hosts)
                hosts[message["index"]] = message["host"]
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                log.info("roll-call: %d of %d processes are here; still missing: %s", len(hosts),
                         count, ", ".join(str(i) for i in range(count) if i not in hosts))
        answer = ({"mistake": mistake} if mistake else
                  {"absent": [i for i in range(count) if i not in hosts], "hosts": hosts})
        for caller in callers:
            with contextlib.suppress(OSError):  # gone in the meantime: the watchdog will say so
                caller.sendall(json.dumps(answer).encode() + b"\n")
    return answer


def _listen(port: int) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=1024, reuse_port=False,
                                    dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise UserError("process 0 cannot listen on the port of --coordinator_address",
                        got=f"port {port}: {error.strerror or error}",
                        fix="choose a free port, the same for every process") from error


def _mistake(message: dict[str, Any], count: int, hosts: dict[int, str]) -> str:
    index = message["index"]
    if message["count"] != count:
        return (f"process 0 counts {count} processes, process {index} on {message['host']} "
                f"counts {message['count']}")
    if index in hosts:
        return f"two processes are number {index}: on {hosts[index]} and on {message['host']}"
    return ""


def _report(host: str, port: int, count: int, index: int, timeout: float) -> dict[str, Any]:
    """Another process: tells process 0 that it is here, and waits for what that says."""
    deadline = time.monotonic() + timeout + _GRACE
    message = json.dumps({"index": index, "count": count, "host": host_name()}).encode() + b"\n"
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10.0)) as connection:
                connection.sendall(message)
                connection.settimeout(left)
                if (answer := _read(connection)) is not None:
                    return answer
        except OSError as error:  # not listening yet
            why = error.strerror or str(error)
        time.sleep(0.2)
    raise peers_lost("roll-call", [0], f"{host}:{port}: {why}, for {timeout + _GRACE:g} s")


def _read(connection: socket.socket) -> dict[str, Any] | None:
    """One line of JSON; None if the other side says something else, or leaves."""
    if connection.gettimeout() is None or connection.gettimeout() == 0:
        connection.settimeout(10.0)
    data = b""
    try:
        while not data.endswith(b"\n"):
            if not (more := connection.recv(65536)) or len(data) > 1 << 20:
                return None
            data += more
        message = json.loads(data)
        return message if isinstance(message, dict) and message.keys() & {
            "index", "absent", "mistake"} else None
    except (OSError, ValueError):
        return None
