"""Before jax joins the processes: are all there? Who is absent is said by name, in time.

jax itself would wait and then abort without a word on who is missing. The roll is called on the
very port that jax's coordination service will take afterwards, so no other needs to be open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
import time
import uuid
from typing import Any

from vishwam_t5x.core.coordination import host_name, peers_lost, remember_hosts
from vishwam_t5x.core.errors import Resumable, UserError

log = logging.getLogger(__name__)

_SAY_EVERY = 30.0  # seconds between messages on who is still missing
_DEAD_PROCESS, _DEAD_HOST = 1.0, 20.0  # seconds until a connection tells that its end is gone
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
        Resumable: the port of process 0 is in use and stays so.
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


@dataclasses.dataclass
class _Caller:
    """A process that has reported: its own sign, on which host it is, and the way to it."""

    token: str
    host: str
    connection: socket.socket

    def is_gone(self) -> bool:
        """Whether it has ended, or its host; it says nothing more until it is answered."""
        self.connection.settimeout(0.0)
        try:
            return self.connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


def _preside(port: int, count: int, timeout: float) -> dict[str, Any]:
    """Process 0: waits for the others and tells all the same."""
    deadline, said = time.monotonic() + timeout, time.monotonic()
    callers: dict[int, _Caller] = {}
    everybody: list[socket.socket] = []
    mistake = ""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(port, deadline))
        while not mistake and time.monotonic() < deadline:
            # Whoever has ended since may be started again, and is waited for.
            callers = {index: caller for index, caller in callers.items() if not caller.is_gone()}
            if len(callers) == count - 1:
                break
            listener.settimeout(min(1.0, max(deadline - time.monotonic(), 0.01)))
            with contextlib.suppress(TimeoutError):
                connection = stack.enter_context(listener.accept()[0])
                if (message := _read(connection)) is None:
                    continue  # a port scanner, a health check
                _notice_dead_hosts(connection)
                everybody.append(connection)
                caller = _Caller(message.get("token", ""), message["host"], connection)
                mistake = _mistake(message, count) or _twice(message["index"], caller, callers)
                callers[message["index"]] = caller
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                log.info("roll-call: %d of %d processes are here; still missing: %s",
                         len(callers) + 1, count, ", ".join(map(str, _absent(count, callers))))
        answer = {"mistake": mistake} if mistake else {
            "absent": _absent(count, callers),
            "hosts": {0: host_name(), **{i: caller.host for i, caller in callers.items()}}}
        for connection in everybody:
            with contextlib.suppress(OSError):  # gone in the meantime: the watchdog will say so
                connection.settimeout(10.0)
                connection.sendall(json.dumps(answer).encode() + b"\n")
    return answer


def _absent(count: int, callers: dict[int, _Caller]) -> list[int]:
    return [index for index in range(1, count) if index not in callers]


def _listen(port: int, deadline: float) -> socket.socket:
    """Takes the port; one that is in use may be that of a process that is just ending."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    said = False
    while True:
        try:
            return socket.create_server(("", port), family=family, backlog=1024, reuse_port=False,
                                        dualstack_ipv6=family == socket.AF_INET6)
        except OSError as error:
            fault = f"port {port}: {error.strerror or error}"
            if error.errno != errno.EADDRINUSE:
                raise UserError("process 0 cannot listen on the port of --coordinator_address",
                                got=fault,
                                fix="choose another port, the same for every process") from error
            if time.monotonic() > deadline:
                raise Resumable(
                    f"process 0 cannot listen on the port of --coordinator_address ({fault}): end "
                    "what is listening there, or choose another port for every process") from error
        if not said:
            log.warning("port %d is in use, perhaps by what is left of an earlier run: waiting for "
                        "it", port)
            said = True
        time.sleep(0.5)


def _notice_dead_hosts(connection: socket.socket) -> None:
    """Without a question now and then, a host without power would seem to be silent for ever."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _mistake(message: dict[str, Any], count: int) -> str:
    if message["count"] != count:
        return (f"process 0 counts {count} processes, process {message['index']} on "
                f"{message['host']} counts {message['count']}")
    if not 0 < message["index"] < count:
        return f"two processes are number 0: on {host_name()} and on {message['host']}"
    return ""


def _twice(index: int, caller: _Caller, callers: dict[int, _Caller]) -> str:
    """What is wrong if another process of the same number is there, and still alive."""
    before = callers.get(index)
    if before is None or before.token == caller.token:
        return ""
    # What ends on a host is known at once; of a host that is gone nobody says so.
    deadline = time.monotonic() + (_DEAD_HOST if before.host != caller.host else _DEAD_PROCESS)
    while not before.is_gone():
        if time.monotonic() > deadline:
            return f"two processes are number {index}: on {before.host} and on {caller.host}"
        time.sleep(0.05)
    return ""


def _report(host: str, port: int, count: int, index: int, timeout: float) -> dict[str, Any]:
    """Another process: tells process 0 that it is here, and waits for what that says."""
    deadline = time.monotonic() + timeout + _GRACE
    # The sign tells a report that is made again, its connection lost, from that of another process.
    message = json.dumps({"index": index, "count": count, "host": host_name(),
                          "token": uuid.uuid4().hex}).encode() + b"\n"
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
