"""Saving and restoring: what is saved, what is kept, what damage and a full disk get."""

import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, assert_equal, make_state

import helpers
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core.errors import UserError


def open_run(model_dir, keep=None, clock=None, **options):
    config = CheckpointConfig(**{"period": 10, "keep": keep, **options})
    return Checkpoints(model_dir / "checkpoints", config, **({"clock": clock} if clock else {}))


@pytest.fixture
def three(tmp_path):
    """A run with checkpoints of steps 10, 20 and 30."""
    with open_run(tmp_path) as run:
        for step in (10, 20, 30):
            run.save(step, make_state(step))
    return tmp_path


def test_round_trip(three):
    with open_run(three) as run:
        assert run.all_steps() == [10, 20, 30] and run.latest_step() == 30
        assert_equal(run.restore(abstract(make_state(0))), make_state(30))
        assert run.restored_step == 30
        assert_equal(run.restore(abstract(make_state(0)), step=10), make_state(10))
        assert run.restored_step == 10


def test_layout_and_manifest(three):
    place = three / "checkpoints" / "20"
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["step"] == 20 and "jax" in manifest["packages"]
    assert manifest["leaves"]["params/embedder/embedding"] == [[8, 16], "bfloat16"]
    assert manifest["leaves"]["position/next_example"] == [[], "int64"]
    on_disk = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert set(manifest["files"]) <= on_disk
    # Nothing that arrays are restored from goes without a checksum.
    assert on_disk - set(manifest["files"]) <= {
        "manifest.json", "commit_success.txt", "_CHECKPOINT_METADATA"}


def test_nothing_to_restore(tmp_path):
    with open_run(tmp_path) as run:
        assert run.restore(abstract(make_state(0))) is None
        assert run.latest_step() is None
        with pytest.raises(UserError, match="no checkpoint of this step"):
            run.restore(abstract(make_state(0)), step=5)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    change = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    with open_run(tmp_path) as run:
        for step in (10, 20, 30, 40):
            position = np.asarray(step, np.int64)
            state = {"w": jnp.full((512, 512), step, jnp.float32)}
            run.save(step, {"device": state, "position": position})
            state = change(state)  # the buffers saved from are now overwritten
            position[...] = -1
            jax.block_until_ready(state)
        run.wait()
        like = {"device": jax.eval_shape(lambda: {"w": jnp.zeros((512, 512))}),
                "position": np.zeros((), np.int64)}
        for step in (40, 30, 20, 10):
            got = run.restore(like, step=step)
            assert int(got["position"]) == step
            np.testing.assert_array_equal(got["device"]["w"], step)


def test_save_returns_while_the_write_goes_on(tmp_path, monkeypatch):
    import threading

    from vishwam_t5x.checkpointing import writing
    let_it = threading.Event()
    finish = writing.Writer.finish

    def slow(self):
        assert let_it.wait(60)
        return finish(self)

    monkeypatch.setattr(writing.Writer, "finish", slow)
    with open_run(tmp_path) as run:
        assert run.save(10, make_state(10))  # would never return if it waited
        assert run.latest_step() is None
        let_it.set()
        assert run.wait() and run.latest_step() == 10


def test_should_save_asks_the_clock_it_is_given(tmp_path):
    now = [0.0]
    with open_run(tmp_path, period=None, minutes=2.0, clock=lambda: now[0]) as run:
        now[0] = 119.0
        assert not run.should_save(5)
        now[0] = 121.0
        assert run.should_save(6)
        run.save(6, make_state(6))
        now[0] = 200.0
        assert not run.should_save(7)
        now[0] = 242.0
        assert run.should_save(8) and not run.should_save(6)


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with open_run(tmp_path) as run:
        run.save(10, make_state(10))
        run.save(10, make_state(11))
        assert run.wait()
        assert_equal(run.restore(abstract(make_state(0))), make_state(10))


# --- retention ---

def test_keeps_the_last_and_the_best(tmp_path):
    options = {"keep": 2, "keep_best_metric": "eval/loss"}
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 5.0, 50: float("nan")}
    with open_run(tmp_path, **options) as run:
        for step, loss in losses.items():
            run.save(step, make_state(step), {"eval/loss": loss})
        run.wait()
        assert run.all_steps() == [20, 40, 50] and run.best_step() == 20
    # The metrics are with the checkpoints: another process knows the best, too.
    with open_run(tmp_path, **options) as run:
        run.restore(abstract(make_state(0)))
        run.save(60, make_state(60), {"eval/loss": 0.5})
        run.wait()
        assert run.all_steps() == [50, 60] and run.best_step() == 60


def test_keeps_milestones(tmp_path):
    with open_run(tmp_path, keep=1, keep_every_steps=20) as run:
        for step in (10, 20, 30, 40, 50):
            run.save(step, make_state(step))
        run.wait()
        assert run.all_steps() == [20, 40, 50]


# --- damage ---

def data_file(checkpoint):
    """The largest file: it holds the arrays."""
    return max((path for path in checkpoint.rglob("*") if path.is_file()),
               key=lambda path: path.stat().st_size)


def truncate(checkpoint):
    path = data_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-100])


def flip(checkpoint):
    path = data_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete_data(checkpoint):
    data_file(checkpoint).unlink()


def delete_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


def edit_manifest(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"step": 30', '"step": 31'))


def halve_manifest(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text()[:200])


DAMAGE = [truncate, flip, delete_data, delete_manifest, edit_manifest, halve_manifest]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_the_older_one_used(three, damage, caplog):
    damage(three / "checkpoints" / "30")
    with open_run(three) as run, caplog.at_level(logging.ERROR):
        assert_equal(run.restore(abstract(make_state(0))), make_state(20))
        assert run.restored_step == 20 and "30 is damaged" in caplog.text
        # It is out of the way of the new 30, and goes when that is there.
        assert (three / "checkpoints" / "30.damaged").exists() and run.all_steps() == [10, 20]
        run.save(30, make_state(33))
        assert run.wait() and run.all_steps() == [10, 20, 30]
        assert not (three / "checkpoints" / "30.damaged").exists()
        assert_equal(run.restore(abstract(make_state(0))), make_state(33))


def test_every_file_counts(three):
    """A flipped bit in any file that is restored from, not only the largest, is seen."""
    pristine = three / "pristine"
    place = three / "checkpoints" / "30"
    shutil.copytree(place, pristine)
    names = json.loads((place / "manifest.json").read_text())["files"]
    for name in names:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(pristine, place)
        content = bytearray((place / name).read_bytes())
        content[-1] ^= 0x80
        (place / name).write_bytes(content)
        with open_run(three) as run:
            run.restore(abstract(make_state(0)))
            assert run.restored_step == 20, name


def test_all_damaged_is_not_a_fresh_start(three):
    for step in ("10", "20", "30"):
        flip(three / "checkpoints" / step)
    with open_run(three) as run, pytest.raises(UserError, match="every checkpoint") as error:
        run.restore(abstract(make_state(0)))
    assert all(f"checkpoints/{step} is damaged" in str(error.value) for step in (10, 20, 30))


def test_going_back_abandons_what_came_after(three):
    with open_run(three, keep=2) as run:
        assert_equal(run.restore_before(abstract(make_state(0)), 20), make_state(10))
        assert run.all_steps() == [10] and (three / "checkpoints" / "30.abandoned").exists()
        run.save(20, make_state(21))
        run.wait()
        assert_equal(run.restore(abstract(make_state(0))), make_state(21))
        assert run.restore_before(abstract(make_state(0)), 10) is None
    assert not (three / "checkpoints" / "30.abandoned").exists()


def test_sizes_only(three):
    flip(three / "checkpoints" / "30")
    truncate(three / "checkpoints" / "20")
    with open_run(three, verify=False) as run:
        # Without checksums a flipped bit goes unseen; a short file does not.
        run.restore(abstract(make_state(0)))
        assert run.restored_step == 30
        run.restore(abstract(make_state(0)), step=20)
        assert run.restored_step == 10


def test_another_model_is_refused_not_passed_over(three):
    other = make_state(0)
    other["params"]["encoder"]["layers_0"]["norm"]["bias"] = jnp.zeros((16,))
    del other["params"]["embedder"]
    other["params"]["encoder"]["layers_1"]["norm"]["scale"] = jnp.zeros((17,))
    with open_run(three) as run, pytest.raises(UserError, match="another model") as error:
        run.restore(abstract(other))
    text = str(error.value)
    assert "params/encoder/layers_0/norm/bias: not in the checkpoint" in text
    assert "params/embedder/embedding: only in the checkpoint" in text
    assert "params/encoder/layers_1/norm/scale: (17,) wanted, (16,)" in text


# --- dtypes, stacks ---

def test_restored_to_another_dtype(three):
    wanted = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, np.ndarray) or leaf.dtype != jnp.float32
        else jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding),
        abstract(make_state(0)))
    with open_run(three) as run:
        state = run.restore(wanted)
    saved = make_state(30)
    kernel = state["params"]["encoder"]["layers_1"]["mlp"]["wi"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        kernel, saved["params"]["encoder"]["layers_1"]["mlp"]["wi"]["kernel"].astype(jnp.bfloat16))


def stacked_state(step):
    def stack(tree):
        layers = [tree["encoder"][f"layers_{i}"] for i in range(3)]
        return {**tree, "encoder": {"encoder": jax.tree.map(lambda *a: jnp.stack(a, 1), *layers)}}

    state = make_state(step)
    return {**state, "params": stack(state["params"]), "opt_state": (
        state["opt_state"][0], state["opt_state"][1]._replace(
            trace=stack(state["opt_state"][1].trace)))}


def test_unrolled_into_scanned_and_back(three, tmp_path_factory):
    with open_run(three) as run:
        assert_equal(run.restore(abstract(stacked_state(0))), stacked_state(30))
    with open_run(tmp_path_factory.mktemp("stacked")) as run:
        run.save(10, stacked_state(10))
        assert_equal(run.restore(abstract(make_state(0))), make_state(10))


# --- remains ---

def test_orbax_says_nothing_of_its_progress(tmp_path):
    done = helpers.run(["-c", f"""
import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from absl import logging
logging.set_verbosity(logging.INFO); logging.use_absl_handler()
from checkpoint_states import abstract, make_state
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
with Checkpoints({str(tmp_path)!r}, CheckpointConfig()) as run:
    run.save(1, make_state(1))
    run.restore(abstract(make_state(0)))
"""])
    said = [line for line in done.stderr.splitlines() if "manager.py" in line]
    assert len(said) == 2 and "1 saved" in said[0] and "restored step 1" in said[1], done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr


def test_remains_of_killed_saves_are_swept(three):
    folder = three / "checkpoints"
    for name in ("40.orbax-checkpoint-tmp", "10.deleted.orbax-checkpoint-tmp"):
        shutil.copytree(folder / "30", folder / name)
    (folder / "notes.txt").write_text("mine")
    with open_run(three) as run:
        assert run.latest_step() == 30
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30", "notes.txt"]


def test_missing_best_metric_is_said_once(tmp_path, caplog):
    with open_run(tmp_path, keep_best_metric="eval/los") as run:
        for step in (10, 20):
            run.save(step, make_state(step), {"eval/loss": 1.0})
    said = [record.getMessage() for record in caplog.records if "eval/los'" in record.message]
    assert len(said) == 1 and "only eval/loss" in said[0]
