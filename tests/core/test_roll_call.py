"""The roll-call: who died meanwhile and came again is no second process of that number."""

import concurrent.futures
import json
import socket
import time

import process_groups
import pytest

from vishwam_t5x.core import roll_call
from vishwam_t5x.core.errors import Resumable, UserError


@pytest.fixture
def meeting():
    """(submit a call of process 0 of three, its address)."""
    port = process_groups.free_port()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        def call(index, timeout=60.0):
            return pool.submit(roll_call.call, f"localhost:{port}", 3, index, timeout)

        yield call, port


def report(port, index, token, host="elsewhere"):
    """What a process says before it dies, or is cut off."""
    deadline = time.monotonic() + 30
    while True:
        try:
            connection = socket.create_connection(("localhost", port))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    connection.sendall(json.dumps({"index": index, "count": 3, "host": host,
                                   "token": token}).encode() + b"\n")
    return connection


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_a_process_that_dies_may_come_again(meeting, host):
    call, port = meeting
    first = call(0)
    report(port, 1, "dies", host).close()
    calls = [first, call(1), call(2)]
    for done in calls:
        done.result(60)


def test_one_that_lost_its_connection_may_come_again(meeting):
    call, port = meeting
    first = call(0)
    # Its old connection still looks alive here.
    with report(port, 1, "mine"), report(port, 1, "mine") as again:
        second = call(2)
        assert json.loads(again.makefile().readline())["absent"] == []
        for done in (first, second):
            done.result(60)


def test_one_that_dies_is_absent(meeting):
    call, port = meeting
    first, second = call(0, timeout=3.0), call(2)
    report(port, 1, "dies").close()
    for done in (first, second):
        with pytest.raises(Resumable, match="process 1 .*missing"):
            done.result(60)


def test_two_alive_are_a_mistake(meeting):
    call, port = meeting
    first = call(0)
    words = "two processes are number 1: on here and on here"
    with report(port, 1, "one", "here") as one, report(port, 1, "another", "here") as another:
        with pytest.raises(UserError, match=words):
            first.result(60)
        assert all(words in each.makefile().readline() for each in (one, another))


def test_a_port_in_use_is_waited_for(meeting, caplog):
    call, port = meeting
    with socket.create_server(("", port)):
        with pytest.raises(Resumable, match="already in use"):
            call(0, timeout=0.5).result(60)
        calls = [call(index) for index in range(3)]
        deadline = time.monotonic() + 30
        while caplog.text.count("waiting for it") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    for done in calls:
        done.result(60)
