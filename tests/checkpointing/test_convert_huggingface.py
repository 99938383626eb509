"""Hugging Face folders are read and written array by array, equal to the byte."""

from __future__ import annotations

import dataclasses
import json

import huggingface_folders as folders
import jax
import numpy as np
import pytest
from etils import epath
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

import helpers
from vishwam_t5x.checkpointing.convert import huggingface_writing, t5_network
from vishwam_t5x.checkpointing.convert.huggingface import describe, open_huggingface, vocabulary
from vishwam_t5x.checkpointing.convert.huggingface_writing import write_huggingface
from vishwam_t5x.checkpointing.layers import make_plan
from vishwam_t5x.checkpointing.manifest import Leaf
from vishwam_t5x.checkpointing.sources import Request, assemble
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.models.config import (
    EncoderDecoderConfig,
    RelativePositions,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh


class Arrays:
    """A source of arrays in memory that knows no parts, as a checkpoint of ours."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.leaves = {name: Leaf(array.shape, str(array.dtype))
                       for name, array in arrays.items()}

    def read(self, requests):
        return {name: np.asarray(self.arrays[name]).astype(request.dtype)
                for name, request in requests.items()}


def model_of(network, **changes):
    """Our model of the network."""
    sizes = {name: getattr(network, name) for name in (
        "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers",
        "mlp_activations", "dropout_rate")}
    return EncoderDecoder(EncoderDecoderConfig(
        **sizes, **changes, qk_norm=False, scale_attention_logits=False,
        position=RelativePositions(per_layer=network.per_layer),
        inputs=(TextInput(vocab_size=network.vocab_size, modality_embedding=False),),
        targets=(TextOutput(vocab_size=network.vocab_size, modality_embedding=False,
                            logits_via_embedding=network.logits_via_embedding),)))


def shapes_of(model):
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    return {name: leaf.shape for name, leaf in flatten_names(meta.unbox(boxed["params"])).items()}


def source_of(folder):
    source = open_huggingface(epath.Path(folder))
    assert source is not None
    return source


def whole(source, names=None):
    return source.read({name: Request(np.dtype(source.leaves[name].dtype), None)
                        for name in names or source.leaves})


def folder_of(tmp_path, kind="t5_1_1", files=1, dtype="float32", more=None, **changes):
    config = folders.config(kind, **changes)
    arrays = {**folders.random_arrays(config, dtype), **(more or {})}
    return folders.write(tmp_path / "theirs", config, arrays, files), arrays


@pytest.mark.parametrize(("kind", "files", "dtype"), [
    ("t5", 1, "float32"), ("t5", 3, "bfloat16"), ("t5_1_1", 2, "float32"),
    ("t5_1_1", 1, "bfloat16"), ("mt5", 1, "float16"), ("umt5", 2, "float32"),
    ("ul2", 1, "float32")])
def test_round_trip_is_equal_to_the_byte(tmp_path, kind, files, dtype):
    folder, arrays = folder_of(tmp_path, kind, files, dtype)
    source = source_of(folder)
    limit = sum(array.nbytes for array in arrays.values()) // files
    report = write_huggingface(source, epath.Path(tmp_path / "back"), source.network,
                               max_shard_bytes=limit)
    found = folders.read(tmp_path / "back")
    assert found.keys() == arrays.keys() == {theirs for _, theirs in report.matched}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name
    assert (tmp_path / "back" / "model.safetensors.index.json").exists() == (files > 1)
    assert describe(epath.Path(tmp_path / "back")) == source.network
    assert source_of(tmp_path / "back").leaves == source.leaves


@pytest.mark.parametrize("kind", folders.KINDS)
def test_names_and_shapes_are_those_of_our_model(tmp_path, kind):
    folder, _ = folder_of(tmp_path, kind)
    source = source_of(folder)
    wanted = shapes_of(model_of(source.network))
    assert {name: leaf.shape for name, leaf in source.leaves.items()} == wanted
    assert {name: source.network.shape(name) for name in wanted} == wanted
    again = t5_network.from_leaves(source.leaves, source.network.kind)
    kept = {"assumed": (), "mlp_activations": source.network.mlp_activations}
    assert dataclasses.replace(again, **kept) == source.network
    assert again.assumed


def test_each_device_reads_its_own_part(tmp_path):
    folder, arrays = folder_of(tmp_path)
    source = source_of(folder)
    name = "encoder/layers_1/mlp/wi_0/kernel"
    mesh = make_mesh(MeshConfig())
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))
    array = source.read({name: Request(np.dtype("float32"), sharding)})[name]
    theirs = arrays["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"]
    assert array.sharding == sharding
    np.testing.assert_array_equal(array, theirs.T)
    part = source.read_part(name, (slice(3, 5), slice(7, 20)))
    np.testing.assert_array_equal(part, theirs.T[3:5, 7:20])


def test_stacked_layers_are_read_and_written(tmp_path, monkeypatch):
    folder, arrays = folder_of(tmp_path)
    source = source_of(folder)
    stacked = shapes_of(model_of(source.network, scan_layers=True))
    plan = make_plan(stacked, {name: leaf.shape for name, leaf in source.leaves.items()})
    assert not plan.missing and not plan.mismatched and not plan.extra
    request = Request(np.dtype("float32"), None)
    made = assemble(source, plan.recipes, dict.fromkeys(stacked, request))
    assert {name: array.shape for name, array in made.items()} == stacked
    monkeypatch.setattr(huggingface_writing, "PART_BYTES", 1000)  # a few rows at a time
    write_huggingface(Arrays(made), epath.Path(tmp_path / "back"), source.network)
    found = folders.read(tmp_path / "back")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_written_from_shapes_alone_says_what_it_assumes(tmp_path):
    folder, _ = folder_of(tmp_path, "t5")
    source = source_of(folder)
    report = write_huggingface(source, epath.Path(tmp_path / "back"), dtype="bfloat16")
    assert "mlp_activations = ('relu',)" in report.note and "max_distance" in report.note
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["num_heads"] == 4 and config["d_kv"] == 8 and config["torch_dtype"] == "bfloat16"
    assert {str(a.dtype) for a in folders.read(tmp_path / "back").values()} == {"bfloat16"}


def test_copies_of_the_table_are_one_array(tmp_path):
    table = folders.random_arrays(folders.config("t5"))["shared.weight"]
    dead = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more = {"encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": table,
            "lm_head.weight": table, dead: np.ones((32, 4), np.float32)}
    folder, _ = folder_of(tmp_path, "t5", more=more)
    source = source_of(folder)
    assert source.unused.keys() == more.keys()
    assert "target_encoders_text/logits_kernel" not in source.leaves
    assert "lm_head.weight left out: equal to shared.weight" in source.remarks()


def test_a_table_under_another_name(tmp_path):
    config = folders.config("t5")
    arrays = folders.random_arrays(config)
    arrays["lm_head.weight"] = arrays.pop("shared.weight")
    source = source_of(folders.write(tmp_path / "theirs", config, arrays))
    name = "text_token_embedder/embedding"
    np.testing.assert_array_equal(whole(source, [name])[name], arrays["lm_head.weight"])


def test_tied_but_not_scaled(tmp_path):
    """As transformers 5 writes a new T5 1.1."""
    config = folders.config("t5_1_1", tie_word_embeddings=True, scale_decoder_outputs=False)
    arrays = folders.random_arrays(config)
    source = source_of(folders.write(tmp_path / "theirs", config, arrays))
    assert not source.network.logits_via_embedding and "logits_kernel" in source.notes[0]
    name = "target_encoders_text/logits_kernel"
    np.testing.assert_array_equal(whole(source, [name])[name], arrays["shared.weight"].T)


@pytest.mark.parametrize(("said", "scaled"), [
    ({"model_type": "t5"}, True), ({"model_type": "t5", "tie_word_embeddings": False}, False),
    ({"model_type": "mt5"}, False), ({"model_type": "mt5", "tie_word_embeddings": True}, True),
    ({"model_type": "mt5", "tie_word_embeddings": True, "transformers_version": "5.1.0"}, False),
    ({"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}, False)])
def test_scaled_output(said, scaled):
    config = {**folders.config("t5"), **said}
    assert t5_network.from_config_json(config).logits_via_embedding == scaled


def test_an_mt5_that_scales_is_written_as_a_t5(tmp_path):
    """transformers 4 scales a tied mT5's output, 5 never does; a T5 scales in both."""
    folder, arrays = folder_of(tmp_path, "mt5", tie_word_embeddings=True)
    source = source_of(folder)
    assert source.network.kind == "t5" and source.network.logits_via_embedding
    write_huggingface(source, epath.Path(tmp_path / "back"), source.network)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["T5ForConditionalGeneration"]
    assert config["model_type"] == "t5" and config["scale_decoder_outputs"] is True
    assert folders.read(tmp_path / "back").keys() == arrays.keys()
    assert t5_network.from_leaves(source.leaves, "mt5").kind == "t5"


@pytest.mark.parametrize(("name", "value", "words"), [
    ("d_model", None, "d_model = null"), ("num_layers", "2", 'num_layers = "2"'),
    ("num_heads", 0, "num_heads = 0"), ("feed_forward_proj", None, "feed_forward_proj = null"),
    ("dropout_rate", None, "dropout_rate = null"), ("num_decoder_layers", 1.5, "= 1.5"),
    ("tie_word_embeddings", None, "tie_word_embeddings = null"),
    ("layer_norm_epsilon", None, "layer_norm_epsilon = null")])
def test_a_config_without_a_value_is_refused(name, value, words):
    with pytest.raises(UserError, match="has no value for") as error:
        t5_network.from_config_json(folders.config("t5_1_1", **{name: value}))
    assert words in error.value.got and error.value.fix


def test_null_for_the_decoder_is_as_many_layers_as_the_encoder_has():
    config = folders.config("t5", num_decoder_layers=None)
    assert t5_network.from_config_json(config).num_decoder_layers == config["num_layers"]


def test_what_has_no_place_keeps_its_name(tmp_path):
    folder, _ = folder_of(tmp_path, more={"classifier.weight": np.ones((2, 24), np.float32)})
    source = source_of(folder)
    plan = make_plan(shapes_of(model_of(source.network)),
                     {name: leaf.shape for name, leaf in source.leaves.items()})
    assert plan.extra == ("classifier.weight",)
    with pytest.raises(UserError, match="classifier.weight: nothing is made of it"):
        write_huggingface(source, epath.Path(tmp_path / "back"), source.network)
    assert not (tmp_path / "back").exists()


def test_other_folders_are_none(tmp_path):
    assert open_huggingface(epath.Path(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    assert open_huggingface(epath.Path(tmp_path)) is None


def test_vocabulary_travels(tmp_path):
    folder, _ = folder_of(tmp_path)
    assert vocabulary(epath.Path(folder)) is None
    (folder / "spiece.model").write_bytes(b"pieces")
    path = vocabulary(epath.Path(folder))
    source = source_of(folder)
    assert source.remarks() == [f"its vocabulary: {path}"]
    write_huggingface(source, epath.Path(tmp_path / "back"), source.network, vocabulary=path)
    assert (tmp_path / "back" / "spiece.model").read_bytes() == b"pieces"


def spoil_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_kind(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"t5"', '"bart"'))


def spoil_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def spoil_epsilon(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"layer_norm_epsilon": 1e-5, ', 1))


def spoil_index(folder):
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}')


@pytest.mark.parametrize(("spoil", "words"), [
    (spoil_pickles, "save_pretrained"), (spoil_kind, "model_type = 'bart'"),
    (spoil_file, "damaged"), (spoil_epsilon, "layer_norm_epsilon"),
    (spoil_index, "model-00001-of-00002")])
def test_refused(tmp_path, spoil, words):
    folder, _ = folder_of(tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=words):
        open_huggingface(epath.Path(folder))


def test_tables_that_differ_are_refused(tmp_path):
    other = {"lm_head.weight": np.ones((96, 24), np.float32)}
    folder, _ = folder_of(tmp_path, "t5", more=other)
    with pytest.raises(UserError, match='"tie_word_embeddings": false'):
        source_of(folder)


def test_missing_array_and_full_folder_are_refused(tmp_path):
    config = folders.config("t5")
    arrays = folders.random_arrays(config)
    del arrays["encoder.final_layer_norm.weight"]
    source = source_of(folders.write(tmp_path / "theirs", config, arrays))
    with pytest.raises(UserError, match="encoder/encoder_norm/scale: missing"):
        write_huggingface(source, epath.Path(tmp_path / "back"), source.network)
    with pytest.raises(UserError, match="not empty"):
        write_huggingface(source, epath.Path(tmp_path / "theirs"), source.network)


def test_model_config_gives_the_network(tmp_path):
    for kind in ("t5", "t5_1_1", "umt5"):
        network = t5_network.from_config_json(folders.config(kind))
        assert t5_network.from_model(model_of(network).config) == network
    config = dataclasses.replace(model_of(network).config, qk_norm=True, num_kv_heads=2)
    with pytest.raises(UserError, match="qk_norm = True, num_kv_heads = 2"):
        t5_network.from_model(config)


def test_presets_are_known_by_their_sizes():
    root = helpers.ROOT / "gin" / "models"
    presets = {path.relative_to(root).with_suffix("").as_posix(): path.read_text()
               for path in root.glob("*/*.gin") if path.stem != "network"}
    small = {"model_type": "t5", "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024,
             "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
             "tie_word_embeddings": False}
    network = t5_network.from_config_json(small)
    assert network.nearest(presets) == ("t5_1_1/small", [])
    umt5 = t5_network.from_config_json({**small, "model_type": "umt5", "vocab_size": 256384})
    assert umt5.nearest(presets) == ("umt5/small", [])
    wider = t5_network.from_config_json({**small, "d_ff": 999})
    assert wider.nearest(presets) == (
        "t5_1_1/small", ["config.EncoderDecoderConfig.mlp_dim = 999"])
