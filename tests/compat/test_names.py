"""What T5X's names build: networks, meshes, ways to decode, optimizers, rows."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import optax
import pytest
from compat import t5x_runs

import helpers
from vishwam_t5x import gin_config, t5x_scripts
from vishwam_t5x.compat import (
    adafactor,
    checkpoints,
    decoding,
    optimizers,
    partitioning,
    seqio_names,
    t5x_utils,
)
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.text_to_text import TextToText

GIN = pathlib.Path(helpers.ROOT, "gin")
SIZES = sorted(path.relative_to(GIN / "t5x" / "examples")
               for path in (GIN / "t5x" / "examples").rglob("*.gin"))


@pytest.mark.parametrize("path", SIZES, ids=str)
def test_networks_are_those_of_our_presets(path):
    package, family, file = path.parts
    theirs = gin_config.parse([f"--gin_file=t5x/examples/{path}", "--gin.DROPOUT_RATE=0.0"],
                              "config").macro("MODEL").module.ours().config
    size = file.lower()
    ours = gin_config.parse([f"--gin_file=gin/models/{family}/{size}"],
                            "forward").macro("MODEL").config
    scanned = package == "scalable_t5"
    assert theirs == dataclasses.replace(ours, precision="bfloat16", scan_layers=scanned,
                                         remat_policy="minimal" if scanned else "none")


def test_decoder_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gin").write_text("""
from __gin__ import dynamic_registration
import seqio
from t5x import adafactor
from t5x import decoding
from t5x import models
from t5x.examples.decoder_only import network

MODEL = @models.DecoderOnlyModel()
models.DecoderOnlyModel:
  module = @network.DecoderWrapper()
  vocabulary = @seqio.ByteVocabulary()
  optimizer_def = @adafactor.Adafactor()
  decode_fn = @decoding.temperature_sample
  inputs_bidirectional_attention = True
decoding.temperature_sample:
  temperature = 0.5
  topk = 40
network.DecoderWrapper.config = @network.TransformerConfig()
network.TransformerConfig:
  vocab_size = 384
  num_layers = 3
""")
    parse = lambda *more: gin_config.parse(["--gin_file=model.gin", *more], "config")
    model = parse().macro("MODEL")
    config = model.module.ours().config
    assert config.decoder_only and config.num_decoder_layers == 3
    assert model.predict_batch_with_aux().top_k == 40
    with pytest.raises(UserError, match="inputs_bidirectional_attention is not honoured"):
        parse("--gin.models.DecoderOnlyModel.inputs_bidirectional_attention=False").macro("MODEL")


@pytest.mark.parametrize(("settings", "fields"), [
    ({}, {"method": "greedy"}),
    ({"temperature": 0.0, "topk": 0}, {"method": "greedy"}),
    ({"topk": 0, "temperature": 0.7, "num_decodes": 3},
     {"method": "sample", "top_k": 0, "temperature": 0.7, "num_decodes": 3}),
    ({"topk": 0, "topp": 0.9}, {"method": "sample", "top_p": 0.9}),
    ({"topk": 5, "max_decode_steps": 9}, {"method": "sample", "top_k": 5, "max_length": 9}),
])
def test_sampling(settings, fields):
    found = decoding.temperature_sample(**settings)
    assert {name: getattr(found, name) for name in fields} == fields


def test_beams():
    assert decoding.beam_search(num_decodes=1, alpha=0.3).method == "beam"
    with pytest.raises(UserError, match="by topk or by topp"):
        decoding.temperature_sample(topk=2, topp=0.5)


def test_meshes_and_rules():
    plain = partitioning.PjitPartitioner(num_partitions=2)
    assert (plain.mesh().data, plain.mesh().fsdp, plain.mesh().tensor) == (-1, 1, 2)
    assert plain.rules().spec(("embed", "mlp")) == jax.sharding.PartitionSpec(None, "tensor")
    whole = partitioning.PjitPartitioner(
        model_parallel_submesh=(2, 2, 1, 1),
        logical_axis_rules=partitioning.standard_logical_axis_rules(2, 2))
    assert (whole.mesh().data, whole.mesh().fsdp, whole.mesh().tensor) == (1, -1, 4)
    rules = whole.rules()
    assert rules.spec(("embed", "mlp")) == jax.sharding.PartitionSpec("fsdp", "tensor")
    row = rules.for_activations(("batch", "length", "embed"))
    assert rules.spec(row) == jax.sharding.PartitionSpec(
        ("replica", "data", "fsdp"), None, "tensor")
    slices = partitioning.PjitPartitioner(ici_mesh_shape=(1, 4, 2), dcn_mesh_shape=(2, 1, 1))
    assert (slices.mesh().replica, slices.mesh().data, slices.mesh().tensor) == (2, 4, 2)
    with pytest.raises(UserError, match="mesh axis"):
        partitioning.PjitPartitioner(logical_axis_rules=(("embed", "expert"),)).rules()
    for axes in ("data", ("replica", "data"), ["data"]):
        partitioning.PjitPartitioner(logical_axis_rules=(("batch", axes),)).rules()
    for axes in (None, "model", ("data", "model")):
        with pytest.raises(UserError, match="rows of a batch"):
            partitioning.PjitPartitioner(logical_axis_rules=(("batch", axes),)).rules()


@pytest.mark.parametrize(("settings", "words"), [
    ({"ici_mesh_shape": (1, 2, 2), "num_partitions": 4}, "'model' of 2 and of 4"),
    ({"ici_mesh_shape": (1, 2, 2), "model_parallel_submesh": (2, 2, 1, 1)}, "of 2 and of 4"),
])
def test_a_mesh_is_said_once(settings, words):
    with pytest.raises(UserError) as error:
        partitioning.PjitPartitioner(**settings)
    assert words in str(error.value)
    partitioning.PjitPartitioner(ici_mesh_shape=(1, 2, 2), num_partitions=2)


@pytest.mark.parametrize(("settings", "mesh", "words"), [
    # T5X's pretrain.gin sets num_partitions = 1, and T5X itself demands one of the two.
    ({"ici_mesh_shape": (1, 4, 2), "dcn_mesh_shape": (2, 1, 1), "num_partitions": 1}, (2, 4, 2),
     "num_partitions = 1 and"),
    ({"ici_mesh_shape": (1, 4, 2), "dcn_mesh_shape": (2, 1, 1),
      "model_parallel_submesh": (2, 2, 1, 1)}, (2, 4, 2), "'model' is 2"),
    ({"ici_mesh_shape": (1, 4, 2), "dcn_mesh_shape": (2, 1, 1), "num_partitions": 2}, (2, 4, 2),
     ""),
    ({"dcn_mesh_shape": (1, 2, 1), "num_partitions": 2}, (1, -1, 2), "needs ici_mesh_shape"),
    ({"model_parallel_submesh": (2, 2, 1, 1), "num_partitions": 1}, (1, -1, 4),
     "num_partitions = 1 is set aside"),
    ({"model_parallel_submesh": (2, 2, 1, 1), "num_partitions": 4}, (1, -1, 4), ""),
])
def test_what_t5x_does_nothing_with_is_said_and_runs(settings, mesh, words, caplog):
    partitioning._say_once.cache_clear()
    found = partitioning.PjitPartitioner(**settings).mesh()
    assert (found.replica, found.data, found.tensor) == mesh
    assert (words in caplog.text) if words else not caplog.records


def test_loggers_of_another_kind_are_refused():
    seqio_names.Evaluator(logger_cls=(seqio_names.JSONLogger, seqio_names.TensorBoardLogger))
    for logger in (dict, print):
        with pytest.raises(UserError, match="logger_cls is not honoured"):
            seqio_names.Evaluator(logger_cls=(logger,))
    with pytest.raises(UserError, match="eos_id is not honoured"):
        seqio_names.PassThroughVocabulary(size=10, eos_id=2)


def test_packed_evaluations_read_fewer_examples_and_it_is_said(caplog):
    config = t5x_utils.DatasetConfig(
        mixture_or_task_name="copy", task_feature_lengths={"inputs": 4, "targets": 4},
        split="train", batch_size=2, shuffle=True, seed=None, use_cached=True, pack=True)
    assert t5x_scripts._eval_examples(3, config.ours()) == 6
    assert "6 packed rows" in caplog.text


def test_optimizers():
    rate = t5x_utils.create_learning_rate_scheduler(factors="constant", base_learning_rate=0.1)
    found = adafactor.Adafactor(global_norm_clip_threshold=2.0, beta1=0.9).ours(rate)
    assert (found.global_norm_clip, found.beta1, found.no_decay) == (2.0, 0.9, ())
    shifted = adafactor.Adafactor().ours(lambda step: 0.5 * step, before=4)
    assert float(shifted.schedule(2)) == 3
    frozen = optimizers.MultiOptimizer((("^decoder/", adafactor.Adafactor()),)).ours(rate)
    assert frozen.frozen("encoder/x") and not frozen.frozen("decoder/x")
    chain = optimizers.chain([optax.clip_by_global_norm(1.0), optax.sgd(0.5)]).ours(rate)
    params = {"a": np.ones((2,), np.float32)}
    updates, _ = chain.build().update({"a": np.full((2,), 0.1, np.float32)},
                                      chain.build().init(params), params)
    np.testing.assert_allclose(updates["a"], -0.05)


def test_optax_s_optimizers_have_learning_rates_of_their_own():
    """T5X's wrapper drops what the trainer says; Adafactor takes it."""
    trainer = t5x_utils.create_learning_rate_scheduler(factors="constant", base_learning_rate=0.1)
    assert float(optimizers.adamw(learning_rate=0.02, weight_decay=0.1).ours(trainer).schedule(3)
                 ) == pytest.approx(0.02)
    schedule = optimizers.sgd(lambda step: 0.5 * step).ours(trainer, before=4).schedule
    assert float(schedule(2)) == 3
    several = optimizers.MultiOptimizer((("^decoder/", optimizers.adam(learning_rate=0.03)),
                                         ("^encoder/", adafactor.Adafactor()))).ours(trainer)
    assert [float(optimizer.schedule(0)) for _, optimizer in several.groups] == pytest.approx(
        [0.03, 0.1])
    assert several.label("decoder/x") == "0"
    twice = optimizers.MultiOptimizer((("a", adafactor.Adafactor()), ("b", adafactor.Adafactor())))
    with pytest.raises(UserError, match="more than one optimizer"):
        twice.ours(trainer).check_names(["ab", "a", "b"])
    with pytest.raises(UserError, match="optimizers.adam has no learning rate"):
        optimizers.adam(b1=0.8)


def test_checkpoints(tmp_path):
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    restore = t5x_utils.RestoreCheckpointConfig(path=f"{tmp_path}/checkpoint_12")
    assert restore.place() == f"{tmp_path}/checkpoints/12"
    assert t5x_utils.RestoreCheckpointConfig(path=[]).place() is None
    with pytest.raises(UserError, match="one checkpoint"):
        t5x_utils.RestoreCheckpointConfig(path=["a", "b"]).place()


def test_the_best_are_kept(tmp_path, monkeypatch):
    """T5X's defaults, and what of them has to be set."""
    found = checkpoints.SaveBestCheckpointer()
    assert dataclasses.astuple(found) == ("train/accuracy", "max", True, None)
    with pytest.raises(UserError, match="SaveBestCheckpointer keeps by a metric"):
        found.retention()
    with pytest.raises(UserError, match="without the metric"):
        checkpoints.SaveBestCheckpointer(metric_name_to_monitor="eval/loss").retention()
    t5x_runs.pretrain_file(tmp_path)
    t5x_runs.write(tmp_path, "best.gin", """
        from t5x import checkpoints
        include 'pretrain.gin'
        utils.SaveCheckpointConfig.checkpointer_cls = @checkpoints.SaveBestCheckpointer
        utils.SaveCheckpointConfig.keep = 2
        checkpoints.SaveBestCheckpointer:
          metric_name_to_monitor = 'eval/loss'
          metric_mode = 'min'
          keep_checkpoints_without_metrics = False
        """)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = gin_config.parse(["--gin_file=best.gin", "--gin.MODEL_DIR='m'"], "train")
    saved = config.entry(**config.arguments(config.entry))["checkpoint_cfg"]
    assert (saved.keep_best_metric, saved.keep_best_mode) == ("eval/loss", "min")
    assert saved.keep == saved.keep_best == 2


def test_a_class_of_the_same_name_is_another():
    mine = type("Checkpointer", (checkpoints.Checkpointer,), {})
    for known in (checkpoints.Checkpointer, checkpoints.SaveBestCheckpointer):
        t5x_utils.RestoreCheckpointConfig(path=None, checkpointer_cls=known)
    with pytest.raises(UserError, match="checkpointer_cls is not honoured"):
        t5x_utils.RestoreCheckpointConfig(path=None, checkpointer_cls=mine)


def test_all_checkpoints_of_t5x_s_are_refused(tmp_path):
    for step in (1000, 200):
        (tmp_path / f"checkpoint_{step}").mkdir()
    with pytest.raises(UserError, match="mode = 'all' is not honoured") as error:
        t5x_scripts._refuse_all_of_t5x_s(str(tmp_path))
    assert "checkpoint_200, checkpoint_1000" in error.value.got
    (tmp_path / "checkpoints").mkdir()
    t5x_scripts._refuse_all_of_t5x_s(str(tmp_path))


def test_use_cached_false_is_said_once(caplog):
    t5x_utils._say_what_is_cached.cache_clear()
    for cached in (True, False, False):
        t5x_utils.DatasetConfig(
            mixture_or_task_name="copy", task_feature_lengths={"inputs": 4, "targets": 4},
            split="train", batch_size=2, shuffle=True, seed=None, use_cached=cached).ours()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the same in every epoch" in caplog.text


def test_text_to_text_cuts_and_adds_nothing():
    objective = TextToText(4, 3)
    clean = {"inputs": np.arange(2, 8), "targets": np.array([5, 6, 7, 1])}
    found = objective.apply(clean, seed=0, example=0)
    assert found["inputs/text/tokens"].tolist() == [2, 3, 4, 5]
    assert found["targets/text/targets"].tolist() == [5, 6, 1]  # the end stays
    lengths = {name: len(value) for name, value in clean.items()}
    one = objective.lengths(lengths, seed=0, example=0)
    many = objective.lengths_many({name: np.array([size]) for name, size in lengths.items()},
                                  np.array([0]), seed=0)
    assert (one.inputs["text"], one.targets["text"]) == (4, 3)
    assert (many.inputs["text"][0], many.targets["text"][0]) == (4, 3)
    assert objective.possible_lengths(lengths) == [one]
