"""Runs with stacked layers in T5X's layouts: layer by layer, or as they are where that is asked."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import t5x_folders
from etils import epath

from vishwam_t5x import __main__ as program
from vishwam_t5x.checkpointing.convert import conversion, native
from vishwam_t5x.checkpointing.convert.stores import Renamed
from vishwam_t5x.checkpointing.convert.unrolled import Unrolled
from vishwam_t5x.checkpointing.layers import make_plan
from vishwam_t5x.checkpointing.sources import Request, assemble
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names, unflatten_names
from vishwam_t5x.models.scan import stack_layers
from vishwam_t5x.training.adafactor import AdafactorRules, scale_by_adafactor

LAYER = re.compile(r"(.*?)(encoder|decoder)/layers_(\d+)/(.+)")


def run(*arguments):
    return program.main(["convert", *map(str, arguments)])


def arrays_of(place):
    source = conversion.open_any(place).source
    return source.read({name: Request(np.dtype(leaf.dtype), None)
                        for name, leaf in source.leaves.items()})


def stacked(unrolled):
    """The state of a model with `scan_layers`, of the arrays of the same without."""
    params = {name.removeprefix("params/"): array for name, array in unrolled.items()
              if name.startswith("params/")}
    params = flatten_names(stack_layers(unflatten_names(params)))
    # The shapes that Adafactor itself gives the moments of stacks.
    moments = flatten_names(jax.eval_shape(
        scale_by_adafactor(0.1, AdafactorRules()).init, unflatten_names(params)).param_states)
    found = {f"params/{name}": np.asarray(array) for name, array in params.items()}
    for name, array in unrolled.items():
        match = LAYER.fullmatch(name)
        if name.startswith("params/"):
            continue
        if not match:
            found[name] = array
        elif match[3] == "0":
            own = f"{match[2]}/{match[2]}/{match[4]}"
            layers = [unrolled[f"{match[1]}{match[2]}/layers_{number}/{match[4]}"]
                      for number in range(2)]
            want = moments[own].shape
            # Of squares both would do: rows come first there.
            axes = (1, 0) if own.endswith("v_row") else (0, 1)
            found[f"{match[1]}{own}"] = layers[0] if want == array.shape else next(
                made for made in (np.stack(layers, axis) for axis in (
                    (1,) if array.ndim > 1 or own.endswith("/v") else axes))
                if made.shape == want)
    return found


def save(arrays, model_dir, step=300):
    folder = model_dir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    native.write_native(t5x_folders.Arrays(arrays), {name: name for name in arrays},
                        epath.Path(folder), {name: array.dtype.name
                                             for name, array in arrays.items()}, step)
    return model_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(T5X's unrolled state with Adafactor's moments, a run of ours with its layers stacked)."""
    folder = tmp_path_factory.mktemp("layers")
    t5x_folders.write(t5x_folders.state(), folder / "theirs" / "checkpoint_300")
    assert run(f"--from={folder / 'theirs'}", f"--to={folder / 'unrolled'}") == 0
    return folder / "theirs", save(stacked(arrays_of(folder / "unrolled")), folder / "stacked")


def restored(place, wanted):
    """The arrays of a model with stacks, as a run restores them."""
    source = conversion.open_any(place).source
    plan = make_plan({name: array.shape for name, array in wanted.items()},
                     {name: leaf.shape for name, leaf in source.leaves.items()})
    assert not plan.missing and not plan.mismatched
    return assemble(source, plan.recipes, {name: Request(array.dtype, None)
                                           for name, array in wanted.items()})


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert np.asarray(found[name]).tobytes() == array.tobytes(), name


def test_a_scanned_run_becomes_the_files_of_an_unscanned_one_and_comes_back(runs, tmp_path, capsys):
    theirs, ours = runs
    wanted = arrays_of(ours)
    assert "params/encoder/encoder/mlp/wi_0/kernel" in wanted
    assert run(f"--from={ours}", f"--to={tmp_path / 'theirs'}", "--format=t5x", "--verify") == 0
    assert t5x_folders.files(tmp_path / "theirs") == t5x_folders.files(theirs)
    said = capsys.readouterr().out
    assert ("params/encoder/encoder/mlp/wi_0/kernel [layers_*] -> "
            "target/encoder/layers_*/mlp/wi_0/kernel  (2)") in said
    assert "--layers=stacked keeps the stacks" in said
    assert run(f"--from={tmp_path / 'theirs'}", f"--to={tmp_path / 'ours'}") == 0
    assert_same(restored(tmp_path / "ours", wanted), wanted)


def test_stacks_are_kept_where_asked_and_where_they_are_t5xs(runs, tmp_path, capsys):
    theirs, ours = runs
    there = tmp_path / "stacks"
    assert run(f"--from={ours}", f"--to={there}", "--format=t5x", "--layers=stacked") == 0
    assert (there / "checkpoint_300" / "target.encoder.encoder.mlp.wi_0.kernel").is_dir()
    assert run(f"--from={there}", f"--to={tmp_path / 'orbax'}", "--format=t5x_orbax") == 0
    wanted = arrays_of(ours)
    for place in (there, tmp_path / "orbax"):
        found = arrays_of(place)
        assert_same(found, {name: wanted[name] for name in found})
        assert "params/decoder/decoder/self_attention/key/kernel" in found
    assert "--layers" not in capsys.readouterr().out
    assert run(f"--from={tmp_path / 'orbax'}", f"--to={tmp_path / 'single'}", "--format=t5x",
               "--layers=unrolled") == 0
    assert t5x_folders.files(tmp_path / "single") == t5x_folders.files(theirs)


def test_what_is_dropped_may_be_named_by_stack_or_by_layer(runs, tmp_path):
    _, ours = runs
    assert run(f"--from={ours}", f"--to={tmp_path}", "--format=t5x_orbax", r"--drop=opt_state/.*",
               r"--drop=params/encoder/encoder/.*", r"--drop=params/decoder/layers_1/.*") == 0
    found = set(conversion.open_any(tmp_path).source.leaves)
    assert {name.split("/")[2] for name in found if name.startswith("params/decoder/")
            } == {"layers_0", "decoder_norm", "relpos_bias"}
    assert not [name for name in found if name.startswith("params/encoder/layers_")]


@pytest.mark.parametrize(("flags", "words"), [
    (("--format=huggingface", "--layers=unrolled"), "T5X's layouts"),
    (("--format=t5x", "--layers=scanned"), "form of layers"),
])
def test_layers_are_said_only_where_there_is_a_choice(runs, tmp_path, capsys, flags, words):
    assert run(f"--from={runs[1]}", f"--to={tmp_path / 'x'}", *flags) == 2
    assert words in capsys.readouterr().err
    assert run(f"--from={runs[0]}", f"--to={tmp_path / 'x'}", "--format=t5x_orbax",
               "--layers=stacked") == 2
    assert "has no stacked layers" in capsys.readouterr().err


def test_each_stack_is_read_once():
    name = "params/encoder/encoder/mlp/wi/kernel"
    arrays = t5x_folders.Arrays({name: np.arange(24, dtype=np.float32).reshape(2, 4, 3)})
    read = []
    part_of = arrays.read_part
    arrays.read_part = lambda own, part: read.append(own) or part_of(own, part)
    single = Unrolled(arrays)
    for number, layer in enumerate(single.leaves):
        assert layer == f"params/encoder/layers_{number}/mlp/wi/kernel"
        np.testing.assert_array_equal(single.read_part(layer, (slice(1, 2), slice(0, 3))),
                                      arrays.arrays[name][1:2, number])
    assert read == [name]


def test_a_moment_whose_axes_cannot_be_told_is_refused(tmp_path):
    own = "encoder/encoder/mlp/wi/kernel"
    state = {f"params/{own}": np.zeros((3, 3, 3)),
             **{f"opt_state/param_states/{own}/{name}": np.zeros((3, 3))
                for name in ("v_row", "v_col")}}
    with pytest.raises(UserError, match="cannot be told"):
        Unrolled(t5x_folders.Arrays(state))
    assert len(Unrolled(t5x_folders.Arrays(state), moments=False).leaves) == 5
    # What the message says to do goes through: as stacks they need not be told apart.
    arrays = t5x_folders.Arrays({**state, "step": np.zeros((), np.int32)})
    same = {name: name for name in arrays.leaves}
    opened = conversion.Opened(conversion.OURS, epath.Path(tmp_path), Renamed(arrays, same), same)
    with pytest.raises(UserError, match="cannot be told") as error:
        conversion.plan(opened, "t5x", tmp_path / "to")
    assert "--layers=stacked" in error.value.fix
    names = conversion.plan(opened, "t5x", tmp_path / "to", layers="stacked").names
    assert f"target/{own}" in names and len(names) == 4
    # A column first, as rules by logical axis may have it.
    state = {f"params/{own}": np.zeros((5, 3, 4)),
             f"opt_state/0/param_states/{own}/v_row": np.zeros((3, 4)),
             f"opt_state/0/param_states/{own}/v_col": np.arange(15).reshape(5, 3)}
    single = Unrolled(t5x_folders.Arrays(state))
    layer = "opt_state/0/param_states/encoder/layers_2/mlp/wi/kernel/v_"
    assert single.leaves[f"{layer}row"].shape == (4,)
    assert single.read_part(f"{layer}col", (slice(1, 3),)).tolist() == [5, 8]
