"""`vishwam convert`: what it writes, what it says, and what it refuses."""

import shutil

import jax
import numpy as np
import pytest
import t5x_folders
from checkpoint_states import abstract, make_state
from etils import epath
from flax import linen as nn

import helpers
from vishwam_t5x import __main__ as program
from vishwam_t5x import convert, presets
from vishwam_t5x.checkpointing.convert import conversion, interrupted, t5_network
from vishwam_t5x.checkpointing.convert.t5x_legacy import write_legacy
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.manifest import Leaf
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.checkpointing.restore import OtherModel, open_source
from vishwam_t5x.checkpointing.sources import Request
from vishwam_t5x.core.trees import flatten_names, unflatten_names
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
from vishwam_t5x.precision.policy import Policy
from vishwam_t5x.training.optimizers import Adafactor
from vishwam_t5x.training.state import StateFactory


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A legacy MODEL_DIR with the whole state of T5X's trained golden."""
    folder = tmp_path_factory.mktemp("t5x")
    t5x_folders.write(t5x_folders.state(), folder / "checkpoint_300")
    return folder


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """The same, converted to a MODEL_DIR of ours."""
    folder = tmp_path_factory.mktemp("ours")
    assert program.main(["convert", "--from", str(theirs), "--to", str(folder)]) == 0
    return folder


def run(*arguments):
    return program.main(["convert", *map(str, arguments)])


def test_there_and_back_every_file_is_equal(theirs, ours, tmp_path, capsys):
    assert run(f"--from={ours}", f"--to={tmp_path}", "--format=t5x", "--verify") == 0
    assert t5x_folders.files(tmp_path) == t5x_folders.files(theirs)
    said = capsys.readouterr().out
    assert "261 matched" in said and "0 missing" in said and "261 arrays read again" in said
    assert "params/text_token_embedder/embedding -> target/token_embedder/embedding" in said
    assert "no forward pass: t5x not installed" in said


def test_orbax_itself_reads_what_is_written_in_its_layout(theirs, tmp_path, capsys):
    assert run(f"--from={theirs}", f"--to={tmp_path}", "--format=t5x_orbax") == 0
    found = t5x_folders.read_by_orbax(tmp_path / "checkpoint_300" / "state")
    assert found.keys() == t5x_folders.state().keys()
    for name, array in t5x_folders.state().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_training_goes_on_from_a_converted_checkpoint(ours):
    """Our manager restores the whole state, moments and step included, with checksums verified."""
    params = unflatten_names({
        name.removeprefix("params/"): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in conversion.open_any(ours).source.leaves.items()
        if name.startswith("params/")})
    zeros = lambda key: jax.tree.map(lambda leaf: nn.LogicallyPartitioned(
        jax.numpy.zeros(leaf.shape, leaf.dtype), (None,) * len(leaf.shape)), params)
    factory = StateFactory(zeros, Adafactor().build(), Policy(),
                           make_mesh(MeshConfig(), jax.local_devices()[:1]), LogicalAxisRules())
    with Checkpoints(ours / "checkpoints", CheckpointConfig()) as run_of_ours:
        state = run_of_ours.restore(factory.abstract)
    assert int(state.step) == 300 and int(state.opt_state.step) == 300
    rows = state.opt_state.param_states["text_token_embedder"]["embedding"].v_row
    np.testing.assert_array_equal(
        rows, t5x_folders.state()["state/param_states/token_embedder/embedding/v_row"])


def test_huggingface_there_and_back(ours, tmp_path, capsys):
    assert run(f"--from={ours}", f"--to={tmp_path / 'hf'}", "--format=huggingface",
               "--verify") == 0
    assert "52 matched" in capsys.readouterr().out
    assert run(f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'run'}") == 0
    said = capsys.readouterr().out
    assert "INITIAL_CHECKPOINT_PATH" in said and "opt_state" in said
    before, _, _ = open_source(ours)
    after, step, _ = open_source(tmp_path / "run")
    assert step == 0 and after.leaves == before.leaves
    wanted = {name: Request(np.float32, None) for name in before.leaves}
    again = after.read(wanted)
    for name, array in before.read(wanted).items():
        np.testing.assert_array_equal(again[name], array)


def test_dtype_is_that_of_parameters_alone(theirs, tmp_path, capsys):
    assert run(f"--from={theirs}", f"--to={tmp_path}", "--dtype=bfloat16", "--verify") == 0
    leaves = conversion.open_any(tmp_path).source.leaves
    for name, leaf in leaves.items():
        assert (leaf.dtype == "bfloat16") == name.startswith("params/"), name
    assert run(f"--from={theirs}", f"--to={tmp_path / 'b'}", "--dtype=int8") == 2


def test_nothing_is_overwritten_and_nothing_half_is_left(theirs, tmp_path, capsys, monkeypatch):
    remains = tmp_path / "checkpoint_300.convert-tmp"
    remains.mkdir()
    (remains / "checkpoint").write_bytes(b"of a conversion that was killed")
    monkeypatch.setattr("vishwam_t5x.core.storage.write_bytes", fails)
    with pytest.raises(OSError):
        write_of(theirs, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    write_of(theirs, tmp_path)
    before = t5x_folders.files(tmp_path)
    assert run(f"--from={theirs}", f"--to={tmp_path}", "--format=t5x") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert t5x_folders.files(tmp_path) == before == t5x_folders.files(theirs)


@pytest.mark.parametrize("kind", ["t5x", "vishwam"])
def test_what_does_not_verify_is_not_left(theirs, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(conversion, "_same", lambda before, after, dtype: before.ndim != 2)
    assert run(f"--from={theirs}", f"--to={tmp_path}", f"--format={kind}", "--verify") == 2
    said = capsys.readouterr().err
    assert "reads otherwise" in said and f"nothing is left at {tmp_path}" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(tmp_path.rglob("*300*"))


def test_a_killed_conversion_goes_on_with_the_same_checkpoint(theirs, tmp_path, caplog):
    """The run it is of has saved a newer one since: its folder would be another."""
    source, to = tmp_path / "source", tmp_path / "to"
    source.mkdir()
    (source / "checkpoint_300").symlink_to(theirs / "checkpoint_300")
    killed = interrupted.kept_in_mind(
        conversion.plan(conversion.open_any(source), "vishwam", to), source, to)
    killed.__enter__()
    (to / "checkpoints" / "300.convert-tmp").mkdir(parents=True)
    newer = {"target/decoder/decoder_norm/scale": np.ones(3, np.float32),
             "state/step": np.asarray(400, np.int32)}
    t5x_folders.write(newer, source / "checkpoint_400")
    assert run(f"--from={source}", f"--to={to}") == 0
    assert [path.name for path in (to / "checkpoints").iterdir()] == ["300"]
    assert "checkpoint_300 that was interrupted" in caplog.text
    assert not (to / interrupted.FILE).exists()
    assert run(f"--from={source}", f"--to={to}") == 0
    assert (to / "checkpoints" / "400").is_dir()


def test_a_killed_conversion_whose_checkpoint_is_gone_leaves_nothing(tmp_path):
    source, to = tmp_path / "source", tmp_path / "to"
    scale = {"target/decoder/decoder_norm/scale": np.ones(3, np.float32)}
    t5x_folders.write(scale, source / "checkpoint_3")
    killed = interrupted.kept_in_mind(
        conversion.plan(conversion.open_any(source), "vishwam", to), source, to)
    killed.__enter__()
    (to / "checkpoints" / "3.convert-tmp").mkdir(parents=True)
    (source / "checkpoint_3").rename(source / "checkpoint_4")
    assert run(f"--from={source}", f"--to={to}") == 0
    assert [path.name for path in (to / "checkpoints").iterdir()] == ["4"]
    (to / interrupted.FILE).write_text("{")
    assert run(f"--from={source}", f"--to={to}") == 2


def test_a_finished_conversion_diverts_no_other(tmp_path):
    """Killed between the last renaming and the removal of what it kept in mind."""
    source, to = tmp_path / "source", tmp_path / "to"
    scale = {"target/decoder/decoder_norm/scale": np.ones(3, np.float32)}
    t5x_folders.write(scale, source / "checkpoint_3")
    killed = interrupted.kept_in_mind(
        conversion.plan(conversion.open_any(source), "vishwam", to), source, to)
    killed.__enter__()
    said = (to / interrupted.FILE).read_text()
    assert run(f"--from={source}", f"--to={to}") == 0
    (to / interrupted.FILE).write_text(said)
    t5x_folders.write(scale, source / "checkpoint_4")
    assert run(f"--from={source}", f"--to={to}") == 0
    assert {path.name for path in (to / "checkpoints").iterdir()} == {"3", "4"}
    assert not (to / interrupted.FILE).exists()


def test_another_conversion_to_the_same_place_is_refused(theirs, tmp_path, monkeypatch, capsys):
    def write(*_):
        kept = (tmp_path / interrupted.FILE).read_text()
        run(f"--from={theirs}", f"--to={tmp_path}")
        assert (tmp_path / interrupted.FILE).read_text() == kept

    monkeypatch.setattr(conversion.native, "write_native", write)
    assert run(f"--from={theirs}", f"--to={tmp_path}") == 0  # the outer one
    assert "another conversion is writing there" in capsys.readouterr().err
    assert not (tmp_path / interrupted.FILE).exists()


def test_the_name_of_the_target_must_be_its_step(theirs, tmp_path, capsys):
    for target, more in (("checkpoints/7", []), ("checkpoint_7", ["--format=t5x"])):
        assert run(f"--from={theirs}", f"--to={tmp_path}/{target}", *more) == 2
        assert "step 300" in capsys.readouterr().err


def test_folders_of_an_evaluation_do_not_hide_a_checkpoint(tmp_path):
    t5x_folders.write({"target/decoder/decoder_norm/scale": np.ones(3, np.float32)},
                      tmp_path / "checkpoint_1000")
    (tmp_path / "1000").mkdir()
    (tmp_path / "1000" / "metrics.jsonl").write_text("{}")
    assert open_source(tmp_path)[1] == 1000


def fails(*_):
    raise OSError("the disk is full")


def write_of(theirs, target):
    opened = conversion.open_any(theirs)
    conversion.write(conversion.plan(opened, "t5x", target))


def test_a_killed_conversion_is_no_checkpoint(theirs, tmp_path):
    """Up to its last file, a legacy folder is none; and the folder has another name until then."""
    half = shutil.copytree(theirs / "checkpoint_300", tmp_path / "checkpoint_300.convert-tmp")
    (half / "checkpoint").unlink()
    with pytest.raises(ValueError, match="no checkpoint"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        open_source(half)


@pytest.fixture(scope="module")
def adam_like(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder / "checkpoints", CheckpointConfig()) as saver:
        saver.save(9, make_state(9))
    return folder


def test_silent_loss_is_refused_by_name(adam_like, tmp_path, capsys):
    arguments = (f"--from={adam_like}", f"--to={tmp_path}", "--format=t5x")
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert "would be lost" in said and "opt_state/1/trace" in said and "--drop" in said
    assert run(*arguments, "--drop=opt_state/.*") == 2
    assert "params/embedder/embedding" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run(*arguments, "--drop=[") == 2
    assert run(*arguments, "--drop", "opt_state/.*", "--drop=params/(embedder|.*/norm)/.*") == 0
    said = capsys.readouterr().out
    assert "11 extra" in said and "1 missing" in said and "state/param_states" in said


def test_what_is_dropped_is_said(tmp_path, capsys):
    arrays = {"target/decoder/decoder_norm/scale": np.ones(3, np.float32),
              "flax_mutables/batch_stats/mean": np.ones(2, np.float32)}
    names = {name: name for name in arrays}
    place = tmp_path / "checkpoint_4"
    place.mkdir()
    write_legacy(t5x_folders.Arrays(arrays), names, epath.Path(place),
                 dict.fromkeys(names, "float32"))
    # T5X keeps its mutables beside the optimizer; both places are read.
    assert run(f"--from={tmp_path}", f"--to={tmp_path / 'a'}") == 2
    assert "flax_mutables/batch_stats/mean" in capsys.readouterr().err
    assert run(f"--from={tmp_path}", f"--to={tmp_path / 'a'}", "--drop=flax_mutables/.*") == 0
    said = capsys.readouterr().out
    assert "1 extra in the source, dropped as asked" in said and "batch_stats/mean" in said


def test_command_line(theirs, tmp_path, capsys):
    for arguments, words in ((["--to=x"], "needs --from"), (["--from=x", "--to"], "needs a value"),
                             ([f"--from={theirs}", "--to=x", "--format=onnx"], "format to write"),
                             ([f"--from={theirs}", "--to=x", "--drpo=a"], "did you mean 'drop'")):
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    assert program.main(["convert", "--help"]) == 0
    assert convert.__doc__.splitlines()[0] in capsys.readouterr().out


def leaves_of(network):
    return {name: Leaf(network.shape(name), "float32") for name in network.places()}


@pytest.mark.parametrize("name", ["t5_1_1/base", "mt5/small", "t5_1_0/3b", "umt5/small"])
def test_the_preset_that_fits_is_named(name):
    text = (helpers.ROOT / "gin" / "models" / f"{name}.gin").read_text()
    sizes = {key: int(text.split(f"{key} = ")[1].split("\n")[0]) for key in (
        "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers")}
    network = t5_network.T5Network(
        kind="umt5" if "umt5" in name else "t5",
        vocab_size=int(text.split("TEXT_VOCAB_SIZE = ")[1].split("\n")[0]),
        logits_via_embedding="t5_1_0" in name,
        mlp_activations=("relu",) if "t5_1_0" in name else ("gelu", "linear"), **sizes)
    assert f"--gin_file=gin/models/{name}.gin" in presets.advice(leaves_of(network))
    leaves = leaves_of(network)
    fewer = network.vocab_size - 28
    leaves["text_token_embedder/embedding"] = Leaf((fewer, sizes["emb_dim"]), "float32")
    assert f"{name}.gin, with TEXT_VOCAB_SIZE = {fewer}" in presets.advice(leaves)


def test_the_message_about_another_model_names_it(monkeypatch, capsys):
    network = t5_network.T5Network(
        kind="t5", vocab_size=32128, emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024,
        mlp_activations=("gelu", "linear"), num_encoder_layers=8, num_decoder_layers=8,
        logits_via_embedding=False)

    def main(argv):
        raise OtherModel("shapes differ", "a: (1,) (2,)", "use the other", leaves_of(network))

    monkeypatch.setattr("vishwam_t5x.convert.main", main)
    assert run() == 2
    assert "--gin_file=gin/models/t5_1_1/small.gin" in capsys.readouterr().err


def test_pinned_checkpoints_are_never_deleted(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as saver:
        saver.save(1, make_state(1))
        saver.wait()
        (tmp_path / "1" / "PINNED").touch()
        for step in (2, 3):
            saver.save(step, make_state(step))
        saver.wait()
        assert saver.all_steps() == [1, 3]
        restored = saver.restore(abstract(make_state(1)), step=1)
        np.testing.assert_array_equal(flatten_names(restored)["step"], 1)
        saver.save(2, make_state(2))
        saver.wait()
        assert saver.all_steps() == [1, 2]
