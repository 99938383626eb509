"""T5X's statements, flags and names: what they mean here, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import types

import pytest
from compat import t5x_runs

from vishwam_t5x import gin_config, gin_differences
from vishwam_t5x.compat import adafactor, installed, names, refused, t5x_utils
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.gin_graph import parameters_of


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parses the pretraining files in a folder of their own, with more arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    t5x_runs.pretrain_file(tmp_path)

    def parse(*arguments, file="pretrain.gin", verb="train"):
        return gin_config.parse([f"--gin_file={file}", "--gin.MODEL_DIR='m'", *arguments], verb)

    return parse


def translated(config):
    """What ours are called with."""
    return config.entry(**config.arguments(config.entry))


def test_what_the_run_is_called_with(parse):
    found = translated(parse("--gin.train.random_seed=None"))
    assert found["total_steps"] == 3 and found["random_seed"] == 0 and found["eval_examples"] == 8
    assert found["train_dataset_cfg"].pack and found["train_dataset_cfg"].seed == 0
    assert found["train_eval_dataset_cfg"].seed == 42
    assert found["objective"].max_inputs == 16
    assert found["loss"].normalization == "sum" and found["loss"].z_loss == 1e-4
    assert found["checkpoint_cfg"].keep is None and found["stability"].spike_sigmas is None
    assert float(found["optimizer"].schedule(0)) == pytest.approx(0.01)
    assert "initial_checkpoint_path" not in found


@pytest.mark.parametrize(("flag", "name", "value"), [
    ("--gin.utils.SaveCheckpointConfig.period=5000", "checkpoint_cfg.period", 5000),
    ("--gin.SaveCheckpointConfig.period=5000", "checkpoint_cfg.period", 5000),
    ("--gin_bindings=utils.SaveCheckpointConfig.keep = 2", "checkpoint_cfg.keep", 2),
    ("--gin.train/utils.DatasetConfig.batch_size=6", "train_dataset_cfg.batch_size", 6),
    ("--gin.train_script.train.eval_period=7", "eval_period", 7),
    ("--gin.train.stats_period=5", "stats_period", 5),
    ("--gin.trainer.Trainer.num_microbatches=2", "num_microbatches", 2),
    ("--gin.network.T5Config.emb_dim=32", "model.config.emb_dim", 32),
    ("--gin.LOSS_NORMALIZING_FACTOR='AVERAGE_PER_SEQUENCE'", "loss.normalization", "sequence"),
    ("--gin.LOSS_NORMALIZING_FACTOR=233472", "loss.normalization", 233472),
    ("--gin.partitioning.ModelBasedPjitPartitioner.num_partitions=4", "mesh.tensor", 4),
    # Beside num_partitions = 1 of the file, which T5X sets aside then.
    ("--gin.partitioning.ModelBasedPjitPartitioner.model_parallel_submesh=(2, 2, 1, 1)",
     "mesh.tensor", 4),
    ("--gin.adafactor.Adafactor.beta1=0.9", "optimizer.beta1", 0.9),
    ("--gin.train.train_eval_dataset_cfg=None", "train_eval_dataset_cfg", None),
    ("--gin.train.eval_period=0", "train_eval_dataset_cfg", None),
    ("--gin.train.eval_steps=5", "eval_examples", 20),
])
def test_overrides(parse, flag, name, value):
    found = translated(parse(flag))
    first, *rest = name.split(".")
    found = found[first]
    for part in rest:
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(("flag", "words"), [
    ("--gin.TRAIN_STEPZ=3", "did you mean 'TRAIN_STEPS'"),
    ("--gin.BATCH_SIZE=3", "nothing reads the macro BATCH_SIZE"),
    ("--gin.utils.SaveCheckpointConfig.perod=3", "did you mean 'period'"),
    ("--gin.utils.SaveCheckpointConfg.period=3", "did you mean 'SaveCheckpointConfig'"),
    ("--gin.utils.SaveCheckpointConfig.period='3'", "write 3"),
    ("--gin.train_script.train.modl=3", "t5x.train has no parameter 'modl'"),
    ("--gin.infer_eval/utils.DatasetConfig.batch_size=3", "scope 'infer_eval'"),
    ("--gin.trainer.EarlyStoppingAction.patience=3", "train.early_stop"),
    ("--run_mode=train", "the verb says it"),
    ("--tfds_data_dir=x", "TFDS_DATA_DIR"),
    ("--seqio_additional_cache_dirs=x", "VISHWAM_CACHE_DIR"),
    ("--t5x=theirs", "compat, installed"),
])
def test_mistakes(parse, flag, words):
    with pytest.raises(UserError) as error:
        parse(flag)
    assert words in str(error.value)


@pytest.mark.parametrize(("flag", "words"), [
    ("--gin.train.use_hardware_rng=True", "t5x.train.use_hardware_rng is not honoured"),
    ("--gin.PjitPartitioner.params_on_devices=False", "params_on_devices is not honoured"),
    ("--gin.utils.SaveCheckpointConfig.dtype='bfloat16'", "vishwam convert"),
    ("--gin.seqio.ByteVocabulary.extra_ids=1000", "input_vocabulary does not fit the network"),
    ("--gin.train.eval_steps=0", "at least one batch"),
])
def test_what_is_not_honoured(parse, flag, words):
    if "PjitPartitioner" in flag:
        flag = flag.replace("PjitPartitioner", "partitioning.ModelBasedPjitPartitioner")
    with pytest.raises(UserError) as error:
        translated(parse(flag))
    assert words in str(error.value)


@pytest.mark.parametrize("name", sorted(refused.SETTINGS))
def test_settings(name):
    """Every entry is of a parameter that there is, and refuses by name what it does not accept."""
    owner, _, parameter = name.rpartition(".")
    module, _, target = owner.rpartition(".")
    if module == "t5x":
        module = "t5x.train"  # the functions of T5X's scripts
    target = getattr(importlib.import_module(names.MODULES[module]), target)
    known = parameters_of(target)
    if inspect.isclass(target):
        for method in vars(target).values():
            known |= parameters_of(method) if inspect.isfunction(method) else {}
    assert parameter in known
    setting = refused.SETTINGS[name]
    for value in setting.accepted:
        refused.check(owner, {parameter: value})
    with pytest.raises(UserError) as error:
        refused.check(owner, {parameter: 12345.5})
    assert name in error.value.problem
    assert setting.why in error.value.problem and error.value.fix == setting.instead


def test_what_changes_nothing_in_t5x_either_is_logged_once(caplog):
    refused._say_once.cache_clear()
    rate = t5x_utils.create_learning_rate_scheduler(factors="constant", base_learning_rate=0.1)
    t5x_utils.RestoreCheckpointConfig(path=None, strict=True)
    assert not caplog.records
    for _ in range(2):
        t5x_utils.RestoreCheckpointConfig(path=None, strict=False)
        found = adafactor.Adafactor(learning_rate=0.7).ours(rate)
    assert float(found.schedule(0)) == pytest.approx(0.1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    for words in ("strict = False changes nothing", "learning_rate = 0.7 changes nothing"):
        assert words in caplog.text


@pytest.mark.parametrize("name", sorted(refused.ABSENT))
def test_absent(parse, tmp_path, name):
    why, instead = refused.ABSENT[name]
    package, _, last = name.rpartition(".")
    use = ""
    if package in names.MODULES and name not in names.MODULES and package != "t5x":
        package, _, module = package.rpartition(".")
        use, last = f"{module}.{last}.x = 3", module
    t5x_runs.write(tmp_path, "more.gin", f"""
        from __gin__ import dynamic_registration
        from {package} import {last}
        include 'pretrain.gin'
        {use}
        """)
    with pytest.raises(UserError) as error:
        parse(file="more.gin")
    assert why in str(error.value) and instead in str(error.value)


def test_what_t5x_s_own_files_leave_unread_is_forgiven(parse, tmp_path):
    """base_c4_pretrain.gin sets a BATCH_SIZE that nobody reads; in a user's file it is a slip."""
    folder = tmp_path / "t5x" / "examples"
    folder.mkdir(parents=True)
    text = "include 'pretrain.gin'\nBATCH_SIZE = 256\ninfer_eval/utils.DatasetConfig.pack = True\n"
    (folder / "c4.gin").write_text(text)
    (tmp_path / "mine.gin").write_text(text)
    assert "BATCH_SIZE" not in parse(file="t5x/examples/c4.gin").text()
    with pytest.raises(UserError, match="2 mistakes"):
        parse(file="mine.gin")


def test_files_without_imports_and_methods(parse, tmp_path):
    """As small.gin, which overrides what base.gin imports; and `predict_batch_with_aux`."""
    t5x_runs.write(tmp_path, "tiny.gin", """
        include 'pretrain.gin'
        network.T5Config:
          emb_dim = 16
        models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 4
        models.EncoderDecoderModel.decode_fn = @decoding.beam_search
        decoding.beam_search.alpha = 0.0
        """)
    config = parse(file="tiny.gin")
    model = config.macro("MODEL")
    assert model.module.config.emb_dim == 16
    decoding = model.predict_batch_with_aux()
    assert (decoding.method, decoding.num_decodes, decoding.alpha) == ("beam", 4, 0.0)
    assert "predict_batch_with_aux.num_decodes = 4" in config.text()


def test_the_objective_knows_the_vocabularies(parse):
    found = translated(parse("--gin.VOCABULARY=@seqio.SentencePieceVocabulary()",
                             "--gin.seqio.SentencePieceVocabulary.sentencepiece_model_file='a'"))
    assert found["objective"].vocabulary_files == ("a",)
    assert translated(parse())["objective"].vocabulary_files == ()


def test_text_is_read_again(parse):
    config = parse("--gin.TRAIN_STEPS=9")
    path = os.path.abspath("config.gin")
    with open(path, "w", encoding="utf-8") as file:
        file.write(config.text())
    again = gin_config.parse([f"--gin_file={path}"], "train")
    assert again.text() == config.text()
    assert translated(again)["total_steps"] == 9
    changes = {change.name: change.reason for change in gin_differences.differences(
        config.graph, parse("--gin.TRAIN_STEPS=10", "--gin.Z_LOSS=0.1").graph)}
    assert changes["TRAIN_STEPS"] and not changes["Z_LOSS"]


def test_modules_of_tasks_wait(parse, monkeypatch):
    config = parse()
    assert "my_own_tasks" not in sys.modules and config.task_modules == ["my_own_tasks"]
    given = []
    config.call(lambda **arguments: given.append(arguments))
    assert given[0]["train_dataset_cfg"].modules == ("my_own_tasks",)


def test_verbs(parse):
    with pytest.raises(UserError, match="say nothing of T5X's evaluate"):
        parse(verb="evaluate")
    with pytest.raises(UserError, match="vishwam forward does not read"):
        parse(verb="forward")


def test_installed_t5x(parse, tmp_path, monkeypatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="T5X is not installed"):
        parse("--t5x=installed")
    there = types.SimpleNamespace(origin="there")
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: there)
    commands = []

    def execv(program, command):
        commands.append(command)
        raise SystemExit

    monkeypatch.setattr(installed.os, "execv", execv)
    monkeypatch.setenv(installed.VARIABLE, "installed")
    with pytest.raises(SystemExit):
        parse("--gin.train.x=1")
    assert commands[0][1:] == ["-m", "t5x.train", "--gin_file=pretrain.gin",
                               "--gin.MODEL_DIR='m'", "--gin.train.x=1"]


def test_t5x_s_imports_may_be_in_an_included_file(parse, tmp_path, monkeypatch):
    """A user's file that only includes others and binds macros is T5X's too."""
    t5x_runs.write(tmp_path, "inner.gin", "include 'pretrain.gin'\nTRAIN_STEPS = 2\n")
    t5x_runs.write(tmp_path, "outer.gin", "include 'inner.gin'\n")
    assert translated(parse(file="outer.gin"))["total_steps"] == 2
    with monkeypatch.context() as without:
        without.setattr(installed.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="T5X is not installed"):
            parse("--t5x=installed", file="outer.gin")
    t5x_runs.write(tmp_path, "outer.gin", "include 'nowhere.gin'\n")
    with pytest.raises(UserError, match="no gin file 'nowhere.gin'"):
        parse(file="outer.gin")


def test_a_choice_where_there_is_none_is_refused(parse, tmp_path):
    t5x_runs.write(tmp_path, "ours.gin", "TRAIN_STEPS = 2\n")
    for choice in names.CHOICES:
        with pytest.raises(UserError, match="nothing to choose"):
            parse(f"--t5x={choice}", file="ours.gin")


def test_our_own_parameters_beside_t5x_s(parse, tmp_path):
    t5x_runs.write(tmp_path, "more.gin", """
        from __gin__ import dynamic_registration
        from vishwam_t5x import train
        include 'pretrain.gin'
        train.train.use_tensorboard = False
        """)
    config = parse(file="more.gin")
    from vishwam_t5x import train

    assert config.arguments(train.train) == {"use_tensorboard": False}
    with open("more.gin", "a", encoding="utf-8") as file:
        file.write("train.train.total_steps = 5\n")
    with pytest.raises(UserError, match="say it already"):
        parse(file="more.gin").call(train.train)


def test_every_setting_has_a_value(parse):
    """No dataclass of ours has lost a field of T5X's: each is bindable by its name."""
    for module in ("t5x.utils", "t5x.models", "t5x.examples.t5.network"):
        for value in vars(importlib.import_module(names.MODULES[module])).values():
            if dataclasses.is_dataclass(value):
                assert set(parameters_of(value)) == {f.name for f in dataclasses.fields(value)}
