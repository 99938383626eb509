"""MODEL_DIR in a bucket: one holder at a time, and files that grow are there after a kill."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.training import lease
from vishwam_t5x.training.mirror import Mirror
from vishwam_t5x.training.writers import JsonlWriter, read_records


@pytest.fixture
def place(tmp_path):
    folder = f"memory://{tmp_path.name}"
    yield folder
    storage.remove_tree(folder)


def holder(place: str, **changed) -> None:
    storage.write_text(f"{place}/{lease.FILE_NAME}", json.dumps(
        {**lease._self(), "host": "elsewhere", "boot": "another", "process": 77, **changed}))


def test_held_and_let_go(place):
    with lease.held(place, renewed=0.05, expires=0.3):
        first = storage.read_text(f"{place}/{lease.FILE_NAME}")
        with pytest.raises(UserError, match=f"(?s)another process.*process {os.getpid()}"), \
                lease.held(place, renewed=0.05, expires=2.0):
            pass
        assert storage.read_text(f"{place}/{lease.FILE_NAME}") != first  # renewed
    assert storage.names(place) == []


def test_a_holder_that_is_gone(place):
    holder(place)
    with lease.held(place, renewed=0.05, expires=0.2):
        assert json.loads(storage.read_text(f"{place}/{lease.FILE_NAME}"))["process"] == os.getpid()


def test_a_holder_that_died_here_is_not_waited_for(place):
    if not lease._boot():
        pytest.skip("the machine does not say which boot this is")
    mine = lease._self()
    holder(place, boot=mine["boot"], process=os.getpid(), began="1")
    with lease.held(place, renewed=0.05, expires=10_000):
        pass


def test_what_cannot_be_read_is_nobodys(place):
    path, lost = f"{place}/{lease.FILE_NAME}", threading.Event()
    with lease.held(place, renewed=0.05, expires=0.2, lost=lost.set):
        storage.write_text(path, "")
        deadline = time.monotonic() + 30
        while storage.read_text(path) == "":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lost.is_set()
    storage.write_text(path, "half")
    with lease.held(place, renewed=0.05, expires=0.2):
        pass


def test_taken_over(place):
    lost = threading.Event()
    with lease.held(place, renewed=0.05, expires=0.2, lost=lost.set):
        holder(place)
        assert lost.wait(30)
    # It is not ours to remove.
    assert storage.names(place) == [lease.FILE_NAME]


def test_mirror_copies_what_changes(place, tmp_path):
    (tmp_path / "old.txt").write_text("there already")
    mirror = Mirror(tmp_path, place, flush_seconds=0.05)
    assert storage.names(place) == []
    with mirror:
        writer = JsonlWriter(tmp_path / "metrics.jsonl")
        writer.write(1, {"loss": 2.0})
        deadline = time.monotonic() + 30
        while "metrics.jsonl" not in storage.names(place):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (tmp_path / "tensorboard").mkdir()
        (tmp_path / "tensorboard" / "events").write_bytes(b"1")
        (tmp_path / "half.tmp").write_bytes(b"1")
        writer.write(2, {"loss": 1.0})
        writer.close()
    assert storage.files_below(place) == ["metrics.jsonl", "tensorboard/events"]
    storage.download(f"{place}/metrics.jsonl", tmp_path / "again" / "metrics.jsonl")
    assert [record["step"] for record in read_records(tmp_path / "again" / "metrics.jsonl")
            ] == [1, 2]


@pytest.mark.parametrize("error", [storage.StorageAway("away"), RuntimeError("odd")])
def test_mirror_tries_again(place, tmp_path, monkeypatch, error):
    mirror = Mirror(tmp_path, place)
    (tmp_path / "a").write_text("x")

    def away(*_):
        raise error

    with monkeypatch.context() as changed:
        changed.setattr(storage, "write_bytes", away)
        assert not mirror.try_flush()
        with pytest.raises(type(error)):
            mirror.flush()
    assert mirror.try_flush() and storage.read_text(f"{place}/a") == "x"


def test_resume_writes_no_line_twice(place, tmp_path):
    first = tmp_path / "first"
    writer = JsonlWriter(first / "metrics.jsonl")
    mirror = Mirror(first, place)
    for step in range(1, 8):
        writer.write(step, {"loss": 1.0})
    mirror.flush()
    # Killed here; the checkpoint restored is of step 5.
    second = tmp_path / "second"
    storage.download(f"{place}/metrics.jsonl", second / "metrics.jsonl")
    mirror = Mirror(second, place)
    writer = JsonlWriter(second / "metrics.jsonl", resume_step=5)
    for step in (6, 7, 8):
        writer.write(step, {"loss": 0.5})
    mirror.flush()
    found = [json.loads(line) for line in storage.read_text(f"{place}/metrics.jsonl").splitlines()]
    assert [record["step"] for record in found] == list(range(1, 9))
    assert [record["loss"] for record in found[5:]] == [0.5] * 3
