"""Frequent saves on local disks: used when newer and whole everywhere, never otherwise."""

import os
import shutil
import subprocess
import sys

import process_groups
import pytest
from checkpoint_states import abstract, assert_equal, make_state

import helpers
from vishwam_t5x.checkpointing import local_tier
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core.errors import UserError


def opened(tmp_path, model_dir="run"):
    return Checkpoints(tmp_path / model_dir / "checkpoints", CheckpointConfig(
        10, local_folder=str(tmp_path / "local"), local_period=2))


def train(run, first, last):
    for step in range(first, last + 1):
        if run.should_save(step):
            run.save(step, make_state(step))
            run._local.wait()
    assert run.wait()


def shards(tmp_path):
    return sorted(int(path.name.split(".")[0])
                  for path in (tmp_path / "local").glob("*/process-0/*.shards"))


@pytest.fixture
def saved(tmp_path):
    """Persistent: 10. Local: 14 and 16, earlier ones dropped."""
    with opened(tmp_path) as run:
        train(run, 1, 17)
        assert run.all_steps() == [10]
    assert shards(tmp_path) == [14, 16]
    return tmp_path


def test_the_newer_local_one_is_restored_and_training_goes_on(saved):
    with opened(saved) as run:
        assert_equal(run.restore(abstract(make_state(0))), make_state(16))
        assert run.restored_step == 16
        train(run, 17, 21)
        assert run.all_steps() == [10, 20]
    assert shards(saved) == [], "a run that ends with all saved leaves nothing on the disks"
    assert list((saved / "local").iterdir()) == []
    with opened(saved) as run:
        assert_equal(run.restore(abstract(make_state(0))), make_state(20))
        run.save(20, make_state(20))
        assert run.should_save(22)


def test_what_was_restored_from_local_disks_can_be_saved(saved):
    with opened(saved) as run:
        run.restore(abstract(make_state(0)))
        assert run.save(16, make_state(16)) and run.wait()
        assert run.all_steps() == [10, 16]


@pytest.mark.parametrize("harm", ["flip", "shorten", "empty"])
def test_a_damaged_file_is_passed_over(saved, harm):
    (path,) = (saved / "local").glob("*/process-0/16.*.shards")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes({"flip": bytes(data), "shorten": bytes(data[:-7]), "empty": b""}[harm])
    with opened(saved) as run:
        assert_equal(run.restore(abstract(make_state(0))), make_state(14))


def test_without_local_files_the_persistent_one(saved):
    for path in (saved / "local").glob("*/process-0/*.shards"):
        path.unlink()
    with opened(saved) as run:
        assert_equal(run.restore(abstract(make_state(0))), make_state(10))


def test_shards_of_another_run_or_future_are_not_taken(saved):
    with opened(saved, "other") as run:
        assert run.restore(abstract(make_state(0))) is None
    (saved / "run" / "run_id").unlink()  # MODEL_DIR was removed and begun anew
    with opened(saved) as run:
        assert_equal(run.restore(abstract(make_state(0))), make_state(10))


def test_a_run_without_a_name_gets_one(saved):
    (saved / "run" / "run_id").write_text("")  # a disk was full
    with opened(saved) as run:
        assert_equal(run.restore(abstract(make_state(0))), make_state(10))
    assert len((saved / "run" / "run_id").read_text()) == 32


def test_remains_are_removed_at_a_start(saved):
    (own,) = (saved / "local").glob("*/process-0")
    (own / "18.tmp").write_bytes(b"half")
    (own.parent / "process-1").mkdir()  # the run had two processes once
    old, recent = saved / "local" / "a" / "process-0", saved / "local" / "b" / "process-0"
    for folder in (old, recent):
        folder.mkdir(parents=True)
    os.utime(old, (1e9, 1e9))
    with opened(saved) as run:
        assert sorted(path.name for path in (saved / "local").iterdir()) == sorted(
            ["b", own.parent.name])
        assert [path.name for path in own.parent.iterdir()] == ["process-0"]
        assert not (own / "18.tmp").exists() and recent.exists()
        assert_equal(run.restore(abstract(make_state(0))), make_state(16))


def test_room_is_made_before_a_write_where_there_is_none(saved, monkeypatch):
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(local_tier.shutil, "disk_usage", lambda _: usage._replace(free=1))
    seen, whole = [], os.replace

    def replace(source, target):
        if str(target).endswith(".shards"):
            seen.append(shards(saved))
        whole(source, target)

    monkeypatch.setattr(local_tier.os, "replace", replace)
    with opened(saved) as run:
        run.restore(abstract(make_state(0)))
        train(run, 17, 19)
        assert seen == [[16]] and shards(saved) == [16, 18]


def test_going_back_forgets_later_shards(saved):
    with opened(saved) as run:
        assert_equal(run.restore_before(abstract(make_state(0)), 15), make_state(14))
        before, = (saved / "local").glob("*/process-0/14.*.shards")
        assert shards(saved) == [14]
        train(run, 15, 16)
        after, = (saved / "local").glob("*/process-0/16.*.shards")
        assert before.name.split(".")[1] != after.name.split(".")[1], "another line"


def test_another_model_is_not_restored_from_shards(saved):
    with opened(saved) as run, pytest.raises(UserError, match="another model"):
        run.restore(abstract(make_state(0, width=32)))


TWO = """
import os, pathlib, sys
sys.path.insert(0, "tests/checkpointing")
index, port, place = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
from vishwam_t5x.core import distributed
distributed.initialize(f"localhost:{port}", 2, index, 60)
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from checkpoint_states import abstract, assert_equal, make_state
from test_local_tier import opened, train
import test_local_tier
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))

def place_of(ndim):
    return NamedSharding(mesh, P("data", "fsdp") if ndim == 2 else P())

def globally(step):
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, np.ndarray) else
        jax.make_array_from_callback(leaf.shape, place_of(leaf.ndim),
                                     lambda index: np.asarray(leaf)[index]), make_state(step))

def check(state, step):
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True):
        for shard in getattr(got, "addressable_shards", []):
            np.testing.assert_array_equal(shard.data, np.asarray(want)[shard.index])

test_local_tier.make_state = globally
wanted = abstract(make_state(0), place_of)
with opened(place) as run:
    train(run, 1, 17)
    check(run.restore(wanted), 16)
    assert run.restored_step == 16
    if index == 1:
        (path,) = (place / "local").glob("*/process-1/16.*.shards")
        path.write_bytes(path.read_bytes()[:-1])
    distributed.barrier("damaged")
    check(run.restore(wanted), 14)
    assert run.restored_step == 14, "not whole on one host, so on none"
    if index == 0:
        next((place / "local").glob("*/process-0/14.*.shards")).unlink()
    distributed.barrier("lost")
    aside = place / "old"
    if index == 1:  # this host drops out with its shards …
        next((place / "local").glob("*/process-1/14.*.shards")).rename(aside)
    check(run.restore(wanted), 10)
    train(run, 11, 14)
    distributed.barrier("saved")
    if index == 1:  # … and comes back with them, when the others have saved that step anew
        (new,) = (place / "local").glob("*/process-1/14.*.shards")
        aside.rename(new.with_name(f"14.{'0' * 12}.shards"))
        new.unlink()
    distributed.barrier("back")
    check(run.restore(wanted), 12)
    assert run.restored_step == 12, "shards of two lines make no checkpoint"
distributed.leave(0)
"""


def test_two_hosts_and_then_one(tmp_path):
    port = process_groups.free_port()
    running = [subprocess.Popen(
        [sys.executable, "-c", TWO, str(index), str(port), str(tmp_path)],
        env=helpers.environment(2, {"PYTHONPATH": str(helpers.ROOT / "tests")}), cwd=helpers.ROOT,
        stderr=subprocess.PIPE, text=True) for index in range(2)]
    outputs = [process.communicate(timeout=240)[1] for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    assert len(list((tmp_path / "local").glob("*/process-*/12.*.shards"))) == 2
    with opened(tmp_path) as run:  # one process cannot read what two have written
        assert_equal(run.restore(abstract(make_state(0))), make_state(10))


@pytest.mark.parametrize(("setting", "value"), [("local_period", 0), ("local_folder", "gs://b/x")])
def test_settings_that_make_no_sense(setting, value):
    with pytest.raises(UserError, match=setting):
        CheckpointConfig(**{setting: value})
