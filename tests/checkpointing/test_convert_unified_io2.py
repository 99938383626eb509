"""Unified-IO 2's checkpoints: T5X's layout with names of its own, wholly and in part."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
import t5x_folders
from etils import epath
from models import golden_fixtures
from models.test_codecs import AUDIO, IMAGE

from vishwam_t5x import __main__ as program
from vishwam_t5x.checkpointing.convert import names, native, unified_io2
from vishwam_t5x.checkpointing.restore import open_source, restore_params
from vishwam_t5x.core.trees import flatten_names, unflatten_names
from vishwam_t5x.models.scan import stack_layers

CODECS = {"image": "quant_conv/kernel", "audio": "quantize/embedding"}


@functools.cache
def theirs():
    """The original's whole state: parameters of the golden model, codecs, Adafactor's moments."""
    random = np.random.default_rng(0)
    params = {unified_io2.parameter_to_unified_io2(name): array
              for name, array in golden_fixtures.params().items()}
    for modality in CODECS:
        prefix = f"params/{modality}/"
        params.update((f"target_encoders_{modality}/discrete_vae/{name.removeprefix(prefix)}",
                       array) for name, array in golden_fixtures.load("codecs.npz").items()
                      if name.startswith(prefix))
    state = {f"target/{name}": array for name, array in params.items()}
    for name in ("encoder/encoder_norm/scale", "input_image_encoder/image_encoder/"
                 "vision_transformer/pre_ln/scale"):
        state[f"state/param_states/{name}/v"] = random.random(params[name].shape, np.float32)
    return state | {"state/step": np.asarray(7, np.int32)}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uio2")
    t5x_folders.write(theirs(), folder / "checkpoint_7")
    return folder


def wanted(inputs, targets):
    """The parameters of the golden model with these modalities."""
    from vishwam_t5x.models.encoder_decoder import EncoderDecoder

    model = EncoderDecoder(golden_fixtures.config(inputs, targets))
    from flax.core import meta

    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0))["params"])


def run(*arguments):
    return program.main(["convert", *map(str, arguments)])


def test_there_and_back_every_byte_is_equal(published, tmp_path, capsys):
    assert run(f"--from={published}", f"--to={tmp_path / 'ours'}", "--verify") == 0
    assert run(f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'theirs'}", "--format=t5x",
               "--verify") == 0
    assert t5x_folders.files(tmp_path / "theirs") == t5x_folders.files(published)
    said = capsys.readouterr().out
    assert "params/image_transformer/pre_ln/scale -> target/input_image_encoder/" in said
    folder = published / "checkpoint_7"
    assert (folder / "target.encoder.layers_0.attention.key.kernel").is_dir()
    found, report = restore_params(tmp_path / "ours", wanted(("text", "audio"), ("text",)))
    assert report.step == 7 and not report.missing
    np.testing.assert_array_equal(
        found["audio_transformer"]["cls_token"],
        theirs()["target/input_audio_encoder/image_encoder/vision_transformer/cls_token"])


def test_a_run_with_stacked_layers_gets_the_published_names(published, tmp_path):
    """The original has no checkpoints with stacks, though its program has a scan."""
    params = stack_layers(unflatten_names({
        names.from_t5x(name)[0].removeprefix("params/"): array
        for name, array in theirs().items() if name.startswith("target/")}))
    state = {f"params/{name}": np.asarray(array)
             for name, array in flatten_names(params).items()}
    state |= {places[-1]: theirs()[name] for name in theirs() if name.startswith("state/")
              for places in [names.from_t5x(name)]} | {"step": np.asarray(7, np.int32)}
    assert "params/decoder/decoder/self_attention/key_norm/scale" in state
    folder = tmp_path / "ours" / "checkpoints" / "7"
    folder.mkdir(parents=True)
    native.write_native(t5x_folders.Arrays(state), {name: name for name in state},
                        epath.Path(folder), {name: array.dtype.name
                                             for name, array in state.items()}, 7)
    assert run(f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'theirs'}", "--format=t5x") == 0
    assert t5x_folders.files(tmp_path / "theirs") == t5x_folders.files(published)


def test_a_subset_reads_its_part_and_names_the_rest(published):
    some = wanted(("text", "image_history"), ("text", "image"))
    found, report = restore_params(published, some)
    for name, array in flatten_names(found).items():
        np.testing.assert_array_equal(array, golden_fixtures.params()[name])
    parts = report.absent_parts()
    assert set(parts) == {
        "input_image_encoder", "input_audio_encoder", "audio_transformer",
        "input_encoders_audio_history", "target_encoders_audio", "audio_token_embedder",
        "target_encoders_image/discrete_vae"}
    assert sum(parts.values()) == len(report.extra)
    said = str(report)
    assert "of parts that the model is without, not read" in said
    assert f"audio_transformer/ ({parts['audio_transformer']})" in said
    assert "audio_token_embedder/embedding" in said and "audio_transformer/cls" not in said


def test_a_model_with_its_codecs_reads_all_of_a_published_checkpoint(published):
    targets = [dataclasses.replace(golden_fixtures.TARGETS[name], codec=codec.config)
               for name, codec in (("image", IMAGE), ("audio", AUDIO))]
    found, report = restore_params(published, wanted(tuple(golden_fixtures.INPUTS),
                                                     ("text", *targets)))
    assert not report.missing and not report.extra
    for modality, name in CODECS.items():
        branch, leaf = name.split("/")
        np.testing.assert_array_equal(
            found[f"target_encoders_{modality}"]["discrete_vae"][branch][leaf],
            theirs()[f"target/target_encoders_{modality}/discrete_vae/{name}"])


def test_an_optimizers_state_of_codecs_is_left_out_by_name(tmp_path, capsys):
    codec = "target_encoders_image/discrete_vae/quant_conv/bias"
    other = "encoder/encoder_norm/scale"
    marked = "input_text_encoder/modality_embedding"
    t5x_folders.write({
        **{f"target/{name}": np.ones(3, np.float32) for name in (codec, other, marked)},
        **{f"state/param_states/{name}/v": np.ones(3, np.float32) for name in (codec, other)},
        "state/step": np.asarray(2, np.int32)}, tmp_path / "checkpoint_2")
    assert run(f"--from={tmp_path / 'checkpoint_2'}", f"--to={tmp_path / 'ours'}", "--verify") == 0
    said = capsys.readouterr().out
    assert "not carried over" in said and f"opt_state/param_states/{codec}/" in said
    names_there = list(native.open_native(epath.Path(tmp_path / "ours" / "checkpoints" / "2")
                                          )[0].leaves)
    assert f"params/{codec}" in names_there
    assert [name.endswith(f"{other}/v") for name in names_there if name.endswith("/v")] == [True]


@pytest.mark.parametrize(("modality", "name"), [("image", "pre_ln/bias"), ("audio", "cls_token")])
def test_the_shared_transformer_of_a_model_without_its_own_input(modality, name, tmp_path):
    alone = f"target/input_encoders_{modality}_history/vit_image_encoder/vision_transformer/{name}"
    place = t5x_folders.write({alone: np.arange(3, dtype=np.float32)}, tmp_path / "checkpoint_1")
    source, _, _ = open_source(place)
    assert list(source.leaves) == [f"{modality}_transformer/{name}"]


def test_every_published_name_has_a_place():
    ours = [place for name in theirs() for place in names.from_t5x(name)]
    places, bookkeeping, homeless = names.all_to_t5x(ours)
    assert sorted(places.values()) == sorted(theirs()) and not homeless
    assert bookkeeping == ("opt_state/step",)
    foreign = ["params/encoder/relpos_bias/rel_embedding",
               "params/target_encoders_text/logits_kernel"]
    assert names.all_to_t5x([*ours, *foreign])[2] == tuple(foreign)


def test_an_assignment_map_may_use_their_names(published):
    prefix = "target/input_image_encoder/image_encoder/vision_transformer"
    some = unflatten_names({"image_transformer/pre_ln/bias": jax.ShapeDtypeStruct((24,), "float32"),
                            "image_transformer/pre_ln/scale": np.zeros(24, np.float32)})
    found, report = restore_params(published, some, assignment_map=[
        (f"{prefix}/pre_ln/scale", None),
        (f"{prefix}/pre_ln/bias", f"{prefix}/pre_ln/scale")])
    assert report.dropped == ("image_transformer/pre_ln/scale",)
    np.testing.assert_array_equal(found["image_transformer"]["pre_ln"]["bias"],
                                  theirs()[f"{prefix}/pre_ln/scale"])
    np.testing.assert_array_equal(found["image_transformer"]["pre_ln"]["scale"], np.zeros(24))


def test_a_patch_model_keeps_its_names(tmp_path):
    assert unified_io2.is_unified_io2("params/input_text_encoder/modality_embedding")
    ours = ["params/input_text_encoder/modality_embedding", "params/text_token_embedder/embedding"]
    assert names.all_to_t5x(ours)[0] == {name: f"target/{name.removeprefix('params/')}"
                                         for name in ours}
