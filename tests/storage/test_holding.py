"""MODEL_DIR in a bucket: one holder at a time, and files that grow are there after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time

import pytest

from vishwam_t5x.core import lease, storage
from vishwam_t5x.core.errors import Resumable, UserError
from vishwam_t5x.core.generations import Changed, GuardedObject
from vishwam_t5x.training.mirror import Mirror
from vishwam_t5x.training.run_dir import RunDir
from vishwam_t5x.training.writers import JsonlWriter, read_records


@pytest.fixture
def place(tmp_path):
    folder = f"memory://{tmp_path.name}"
    yield folder
    storage.remove_tree(folder)


def wait_for(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def object_of(folder: str) -> GuardedObject:
    return GuardedObject(f"{folder}/{lease.FILE_NAME}", 30)


def content(folder: str) -> dict:
    return json.loads(object_of(folder).read()[0])


def write(folder: str, data: bytes) -> None:
    """Replaces the object whatever it is, which a holder never does."""
    while True:
        with contextlib.suppress(Changed):
            return object_of(folder).write(data, object_of(folder).read()[1])


def holder(folder: str, **changed) -> None:
    write(folder, json.dumps({**lease._self(), "host": "elsewhere", "boot": "another",
                              "process": 77, **changed}).encode())


def test_held_and_let_go(bucket_here):
    with lease.held(bucket_here, renewed=0.05, expires=1000):
        first = content(bucket_here)
        with pytest.raises(UserError, match=f"(?s)another process.*process {os.getpid()}"), \
                lease.held(bucket_here, expires=1000, waits=0):
            pass
        wait_for(lambda: content(bucket_here) != first)  # renewed
    assert object_of(bucket_here).read() == (None, 0)


def test_held_elsewhere_can_be_tried_again(bucket_here, monkeypatch):
    with lease.held(bucket_here, renewed=0.05, expires=1000):
        monkeypatch.setattr("vishwam_t5x.core.holder._boot", lambda: "another")
        with pytest.raises(Resumable, match=f"another process.*process {os.getpid()}"), \
                lease.held(bucket_here, expires=1000, waits=0):
            pass


def test_a_holder_that_ends_is_waited_for(bucket_here):
    taken = threading.Event()

    def come() -> None:
        with lease.held(bucket_here, expires=10):
            taken.set()

    with lease.held(bucket_here, renewed=0.05, expires=1000):
        thread = threading.Thread(target=come)
        thread.start()
        first = content(bucket_here)
        wait_for(lambda: content(bucket_here) != first)
        assert not taken.is_set()
    assert taken.wait(60)
    thread.join(60)


def test_a_holder_that_is_gone(bucket_here):
    holder(bucket_here)
    with lease.held(bucket_here, expires=0.2):
        assert content(bucket_here)["process"] == os.getpid()


def test_a_holder_that_died_here_is_not_waited_for(bucket_here):
    if not lease._self()["boot"]:
        pytest.skip("the machine does not say which boot this is")
    mine = lease._self()
    holder(bucket_here, boot=mine["boot"], process=os.getpid(), began="1")
    with lease.held(bucket_here, expires=10_000):
        pass


def test_what_cannot_be_read_is_nobodys(bucket_here):
    lost = threading.Event()
    with lease.held(bucket_here, renewed=0.05, expires=1000, lost=lost.set):
        write(bucket_here, b"")
        wait_for(lambda: object_of(bucket_here).read()[0])
        assert not lost.is_set()
    write(bucket_here, b"half")
    with lease.held(bucket_here, expires=0.2):
        pass


def test_taken_over(bucket_here):
    lost = threading.Event()
    with lease.held(bucket_here, renewed=0.05, expires=1000, lost=lost.set) as holding:
        holder(bucket_here)
        assert lost.wait(60)
        with pytest.raises(OSError, match="taken over"):
            holding.check()
    # It is not ours to remove, nor has a late renewal replaced it.
    assert content(bucket_here)["host"] == "elsewhere"


def test_a_holder_that_was_cut_off_commits_nothing(bucket_here, monkeypatch):
    """Until a renewal shows that nobody has come meanwhile."""
    lost = threading.Event()
    with lease.held(bucket_here, renewed=1000, expires=1001, lost=lost.set) as holding:
        holding.check()  # some seconds after a renewal nobody is asked
        holding._confirmed -= 2
        with monkeypatch.context() as cut:
            cut.setattr(GuardedObject, "write", lambda *_: 1 / 0)
            with pytest.raises(storage.StorageAway, match="nobody can tell"):
                holding.check()
        holding.check()
        holding._confirmed -= 2
        holder(bucket_here)
        with pytest.raises(OSError, match="taken over"):
            holding.check()
        assert lost.is_set()


def test_a_renewal_whose_answer_is_lost_was_ours(bucket_here, monkeypatch):
    lost, whole = threading.Event(), GuardedObject.write

    def answer_lost(self, data, generation):
        whole(self, data, generation)
        raise TimeoutError("no answer")

    with lease.held(bucket_here, renewed=1000, expires=1001, lost=lost.set) as holding:
        with monkeypatch.context() as cut:
            cut.setattr(GuardedObject, "write", answer_lost)
            with pytest.raises(TimeoutError):
                holding._renew()
        holding._renew()
        assert not lost.is_set()
    assert object_of(bucket_here).read() == (None, 0)


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


def test_mirror_of_what_is_another_s_copies_nothing(place, tmp_path):
    (tmp_path / "a").write_text("x")
    mirror = Mirror(tmp_path, place)
    (tmp_path / "a").write_text("longer")

    def gone():
        raise storage.StorageAway("taken over")

    run_dir = RunDir(tmp_path, place, mirror)
    with mirror.guarded(gone):
        assert not mirror.try_flush()
        with pytest.raises(storage.StorageAway):
            run_dir.keep()  # so that no checkpoint is committed
        run_dir.close()
        assert storage.names(place) == []
    run_dir.keep()
    assert storage.names(place) == ["a"]
