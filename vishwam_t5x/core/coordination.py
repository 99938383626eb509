"""What the processes of a run tell each other, through the coordination service that jax starts.

Values by key and barriers, all over TCP and none over the devices: they work from any thread, and a
peer that does not come is named when the deadline passes. The only file that touches jax's private
`distributed` module.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax

from vishwam_t5x.core.errors import PeersLost

DEADLINE = 1800.0
"""Seconds that a process waits for the others where nothing else is said."""

_NEEDED = ("key_value_set", "key_value_dir_get", "key_value_try_get", "key_value_delete",
           "wait_at_barrier")
_ROOT = "vishwam"


_hosts: dict[int, str] = {}  # filled by the roll-call


def remember_hosts(hosts: dict[int, str]) -> None:
    """Takes down which process runs on which host, for messages."""
    _hosts.update(hosts)


def process_name(index: int) -> str:
    """Returns 'process 3 (host7)', without the host where it is not known."""
    return f"process {index}" + (f" ({_hosts[index]})" if index in _hosts else "")


def peers_lost(where: str, missing: list[int], why: str) -> PeersLost:
    """Returns the error that names the processes that did not come to `where`."""
    return PeersLost(where, tuple(missing), f"{where}: "
                     f"{', '.join(map(process_name, missing)) or 'some process'} missing ({why})")


def service() -> Any | None:
    """Returns jax's client of the coordination service; None in a run of one process.

    Raises:
        RuntimeError: this version of jax keeps it elsewhere.
    """
    try:
        from jax._src import distributed
        client = distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise RuntimeError(_changed(str(error))) from error
    lacking = [name for name in _NEEDED if client is not None and not hasattr(client, name)]
    if lacking:
        raise RuntimeError(_changed(f"its client has no {', '.join(lacking)}"))
    return client


def _changed(what: str) -> str:
    return (f"jax {jax.__version__} has another coordination service than this program knows "
            f"({what}): use a version of jax that pyproject.toml allows, or one process")


def detect_cluster(timeout: float) -> tuple[str, int, int] | None:
    """Returns (coordinator address, processes, number of this one) as jax detects them.

    None if this jax cannot be asked; then `jax.distributed.initialize` finds them for itself.
    """
    try:
        from jax._src import clusters
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout))
    except (ImportError, AttributeError, TypeError):
        return None
    address, count, index = found[:3]
    if address is None or count is None or index is None:
        return None
    return str(address), int(count), int(index)


def put(key: str, value: str) -> None:
    """Sets a key that every process can read, whatever it was before."""
    client = service()
    if client is not None:
        client.key_value_set(f"{_ROOT}/{key}", value, allow_overwrite=True)


def get(key: str) -> str | None:
    """Returns what a key was set to; None if it was not.

    Raises:
        jax.errors.JaxRuntimeError: the service does not answer.
    """
    client = service()
    if client is None:
        return None
    try:
        return client.key_value_try_get(f"{_ROOT}/{key}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def get_all(folder: str) -> dict[int, str]:
    """Returns {number: value} of the keys 'folder/NUMBER'."""
    client = service()
    if client is None:
        return {}
    return {int(key.rpartition("/")[2]): value
            for key, value in client.key_value_dir_get(f"{_ROOT}/{folder}/")}


class _Exchanges:
    """Counts the exchanges of each name: all processes make the same ones in the same order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def next(self, name: str) -> int:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + 1
            return self._counts[name]


_exchanges = _Exchanges()


def exchange(name: str, value: str = "", timeout: float = DEADLINE) -> list[str]:
    """Returns the values of all processes, by number; waits until all have given theirs.

    Every process must call it as often, under the same name. From several threads: under a name
    for each.

    Args:
        name: what is exchanged; said if somebody does not come.
        value: what this process says.
        timeout: seconds to wait.

    Raises:
        PeersLost: somebody did not come in time.
    """
    if jax.process_count() == 1:
        return [value]
    client = service()
    if client is None:
        raise RuntimeError("several processes and no coordination service: the program must be "
                           "started by vishwam, or call jax.distributed.initialize first")
    number, index = _exchanges.next(name), jax.process_index()
    folder = f"{name}/{number}"
    try:
        put(f"{folder}/{index}", value)
        client.wait_at_barrier(f"{_ROOT}/{folder}", int(1000 * timeout))
        values = get_all(folder)
    except jax.errors.JaxRuntimeError as error:
        why = (f"not there after {timeout:g} s" if "DEADLINE_EXCEEDED" in str(error)
               else _first_line(error))
        raise peers_lost(name, _absent(folder), why) from error
    if index == 0 and number > 1:  # all have come here, so all have read the one before
        client.key_value_delete(f"{_ROOT}/{name}/{number - 1}/")
    return [values[process] for process in range(jax.process_count())]


def _absent(folder: str) -> list[int]:
    try:
        came = get_all(folder)
    except jax.errors.JaxRuntimeError:
        return [0]  # the service lives in process 0
    return [process for process in range(jax.process_count()) if process not in came]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


_handler: Any = None  # kept: C holds nothing but its address


def on_abort(handler: Callable[[], None]) -> None:
    """Calls `handler` when jax aborts the process (SIGABRT), as it does when process 0 is gone.

    jax's own callback for this cannot be called from Python in jaxlib 0.10 (it hands over a type
    that has none). If the handler returns, the process ends as it would have.
    """
    global _handler
    libc = ctypes.CDLL(None)

    def handle(signum: int) -> None:
        try:
            handler()
        finally:
            libc.signal(signum, 0)  # SIG_DFL

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    libc.signal(int(signal.SIGABRT), _handler)


def host_name() -> str:
    """Returns the name of this host."""
    return socket.gethostname()
