"""Parameters from anywhere: checkpoints, `.npz` files, renamed, in part, cast."""

import logging
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, assert_equal, make_state

from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.checkpointing.restore import restore_params
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with Checkpoints(path / "checkpoints", CheckpointConfig(10)) as run:
        for step in (10, 20):
            run.save(step, make_state(step))
    return path


PARAMS = make_state(20)["params"]
WANTED = abstract(PARAMS)


@pytest.mark.parametrize("way", ["", "latest", "checkpoints", "checkpoints/latest",
                                 "checkpoints/20"])
def test_every_way_to_say_which(model_dir, way):
    params, report = restore_params(model_dir / way, WANTED)
    assert_equal(params, PARAMS)
    assert report.step == 20 and report.path.endswith("checkpoints/20")
    assert len(report.matched) == 7 and not (report.missing or report.extra)


def test_a_given_step(model_dir):
    params, report = restore_params(str(model_dir / "checkpoints" / "10"), WANTED)
    assert_equal(params, make_state(10)["params"])
    assert report.step == 10


@pytest.mark.parametrize("root", ["", "params/", "target/"])
def test_flat_npz(tmp_path, root):
    arrays = {root + name: np.asarray(leaf) for name, leaf in flatten_names(PARAMS).items()}
    if root:
        arrays["opt_state/step"] = np.zeros(())
    np.savez(tmp_path / "params.npz", **arrays)
    params, report = restore_params(tmp_path / "params.npz", WANTED)
    assert_equal(params, PARAMS)
    assert report.step is None and not report.extra


def test_cast(model_dir, tmp_path):
    np.savez(tmp_path / "p.npz", **{name: np.asarray(leaf, np.float32)
                                    for name, leaf in flatten_names(PARAMS).items()})
    for source in (model_dir, tmp_path / "p.npz"):
        params, _ = restore_params(source, WANTED, dtype="bfloat16")
        for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
            assert got.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want.astype(jnp.bfloat16)))


def test_missing_must_be_allowed(model_dir):
    wanted = {**WANTED, "head": {"kernel": jnp.full((3,), 7.0)}}
    with pytest.raises(UserError, match="missing in the checkpoint") as error:
        restore_params(model_dir, wanted)
    assert "head/kernel" in str(error.value) and "fallback_to_scratch" in str(error.value)
    params, report = restore_params(model_dir, wanted, allow_missing=True)
    assert report.missing == ("head/kernel",)
    np.testing.assert_array_equal(params["head"]["kernel"], 7.0)
    assert_equal({k: v for k, v in params.items() if k != "head"}, PARAMS)


def test_extra_is_reported(model_dir):
    params, report = restore_params(model_dir, {"encoder": WANTED["encoder"]})
    assert_equal(params, {"encoder": PARAMS["encoder"]})
    assert report.extra == ("embedder/embedding",)
    assert "extra in the checkpoint" in str(report) and "embedder/embedding" in str(report)


def test_another_shape_is_an_error(model_dir):
    wanted = {**WANTED, "embedder": {"embedding": jax.ShapeDtypeStruct((9, 16), jnp.bfloat16)}}
    with pytest.raises(UserError, match="other shapes") as error:
        restore_params(model_dir, wanted, allow_missing=True)
    assert "embedder/embedding: (9, 16) in the model, (8, 16) in the checkpoint" in str(error.value)


def test_assignment_map(model_dir):
    wanted = {"vision": {f"block_{i}": WANTED["encoder"][f"layers_{i}"] for i in range(3)},
              "embedder": {"embedding": jnp.zeros((9, 16))}}
    params, report = restore_params(model_dir, wanted, assignment_map=[
        (r"target/vision/block_(\d)/(.*)", r"target/encoder/layers_\1/\2"),
        (r"embedder/.*", None)])
    for i in range(3):
        assert_equal(params["vision"][f"block_{i}"], PARAMS["encoder"][f"layers_{i}"])
    assert report.dropped == ("embedder/embedding",)
    np.testing.assert_array_equal(params["embedder"]["embedding"], 0.0)
    with pytest.raises(UserError, match="regular expression"):
        restore_params(model_dir, wanted, assignment_map=[("(", "x")])


def test_stacked_model_from_unrolled_checkpoint(model_dir):
    layers = [PARAMS["encoder"][f"layers_{i}"] for i in range(3)]
    stacked = {"encoder": {"encoder": jax.tree.map(lambda *a: jnp.stack(a, 1), *layers)},
               "embedder": PARAMS["embedder"]}
    params, report = restore_params(model_dir, abstract(stacked))
    assert_equal(params, stacked)
    assert set(report.restacked) == {name for name in flatten_names(stacked) if "encoder/" in name}


def test_a_damaged_newest_is_passed_over(model_dir, tmp_path, caplog):
    import shutil
    shutil.copytree(model_dir, tmp_path / "run")
    manifest = tmp_path / "run" / "checkpoints" / "20" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-30])
    with caplog.at_level(logging.ERROR):
        _, report = restore_params(tmp_path / "run", WANTED)
    assert report.step == 10 and "20 is damaged" in caplog.text
    with pytest.raises(UserError, match="this checkpoint is damaged") as error:
        restore_params(tmp_path / "run" / "checkpoints" / "20", WANTED)
    assert "others beside it: 10" in str(error.value)
    # Reading changes nothing.
    assert sorted(p.name for p in manifest.parent.parent.iterdir()) == ["10", "20"]


def test_mistaken_paths(model_dir, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint") as error:
        restore_params(model_dir / "checkpoints" / "15", WANTED)
    assert "10, 20" in str(error.value)
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore_params(tmp_path, WANTED)
    with pytest.raises(UserError, match="no parameter of the model"):
        restore_params(model_dir, {"x": jnp.zeros(3)})


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    np.savez(tmp_path / "bomb.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(UserError, match="Python objects"):
        restore_params(tmp_path / "bomb.npz", {"a": jnp.zeros(1)})
    (tmp_path / "bomb2.npz").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a flat .npz"):
        restore_params(tmp_path / "bomb2.npz", {"a": jnp.zeros(1)})
