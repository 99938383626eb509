"""A storage server on loopback, and a line to it that fails, resets and stalls as told."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

BUCKET = "vishwam-test"


@contextlib.contextmanager
def serve() -> Iterator[int]:
    """Runs the emulator, with the bucket `BUCKET`; yields its port of the loopback."""
    # In a process of its own: it is Python too, and would share the interpreter lock with what it
    # serves. It ends with its parent's end of the pipe, however the parent ends.
    script = pathlib.Path(__file__).with_name("emulator_server.py")
    server = subprocess.Popen([sys.executable, str(script), BUCKET], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdin is not None and server.stdout is not None
    try:
        # It says so once it listens; if it dies instead, the line is empty.
        said = server.stdout.readline() if select.select([server.stdout], [], [], 120)[0] else b""
        assert said, "the emulator did not start"
        yield int(said)
    finally:
        server.stdin.close()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()


def variables(port: int, **more: str) -> dict[str, str | None]:
    """What a process needs in its environment to take the emulator for Google's storage."""
    return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "TENSORSTORE_GCS_HTTP_URL": None,
            "EPATH_USE_TF": None, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **more}


class FaultyLine:
    """A TCP line to a server: a share of the connections, seeded, fail in all ways by turns.

    Attributes:
        port: where it listens.
        faults: how many connections of each kind there were.
    """

    def __init__(self, target: int, seed: int, share: float, stall_seconds: float) -> None:
        self._target = target
        self._random, self._share, self._stall = random.Random(seed), share, stall_seconds
        self._ways = itertools.cycle(["503", "reset", "stall", "cut"])
        self.faults = {"none": 0, "503": 0, "reset": 0, "stall": 0, "cut": 0}
        self.cut_off = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            fault = "none"
            if self._random.random() < self._share:
                fault = next(self._ways)
            if self.cut_off.is_set():
                fault = "reset"
            self.faults[fault] += 1
            threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str) -> None:
        with client, contextlib.suppress(OSError):
            if fault == "reset":
                _reset(client)
                return
            if fault == "stall":
                client.recv(1 << 16)
                time.sleep(self._stall)
                _reset(client)
                return
            if fault == "503":
                client.recv(1 << 16)
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n"
                               b"Connection: close\r\n\r\n")
                client.shutdown(socket.SHUT_WR)
                client.settimeout(1)
                while client.recv(1 << 16):
                    pass
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                back = threading.Thread(target=_pump, args=(server, client, None), daemon=True)
                back.start()
                # Cut: the server gets the request's beginning, the client no answer.
                _pump(client, server, 2000 if fault == "cut" else None)
                if fault == "cut":
                    _reset(client)
                back.join(60)


def _pump(source: socket.socket, sink: socket.socket, most: int | None) -> None:
    with contextlib.suppress(OSError):
        sent = 0
        while data := source.recv(1 << 16):
            sink.sendall(data if most is None else data[:most - sent])
            sent += len(data)
            if most is not None and sent >= most:
                return
        sink.shutdown(socket.SHUT_WR)


def _reset(client: socket.socket) -> None:
    """Closes so that the other side sees a reset, not an end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def url(*names: str) -> str:
    """Returns the path of something in the bucket."""
    return str(pathlib.PurePosixPath(BUCKET, *names)).join(("gs://", ""))
