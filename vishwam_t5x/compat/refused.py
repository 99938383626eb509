"""What T5X has and we do not honour: why, and what there is instead. Never ignored in silence.

`SETTINGS` are parameters that accept some values only (T5X's defaults, mostly), `ABSENT` names that
nothing here stands for. Imports nothing of ours: every gin file is looked at with it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from vishwam_t5x.core.errors import UserError


class Named(NamedTuple):
    """A class or function of a module of this package, which is not imported to name it."""

    module: str
    name: str


class Setting(NamedTuple):
    """A parameter of T5X's of which only some values are honoured.

    Attributes:
        accepted: these; a `Named` stands for the very class or function.
        why: the others are not.
        instead: the nearest thing we have.
    """

    accepted: tuple[Any, ...]
    why: str
    instead: str


_NEWEST = Named("checkpoints", "Checkpointer")
_BEST = Named("checkpoints", "SaveBestCheckpointer")
_SUMMARY = Named("gin_functions", "summarize_gin_config")
_WRITTEN = "functions of T5X's state have nothing to work on: our state is another"
_RENAME = "rename parameters with RestoreCheckpointConfig.assignment_map, or vishwam convert"
_ORDER = "the order of our data is its own, and exact after a resume"
_ORBAX = "checkpoints are always written by Orbax, in the layout of vishwam_t5x"

SETTINGS: dict[str, Setting] = {
    "t5x.train.use_hardware_rng": Setting(
        (False,), "hardware random numbers differ between meshes: no resume would be exact",
        "--gin.train.use_hardware_rng=False"),
    "t5x.train.summarize_config_fn": Setting(
        (None, _SUMMARY), "the configuration is written to MODEL_DIR/config.gin",
        "summarize_config_fn = @gin_utils.summarize_gin_config"),
    "t5x.train.get_dataset_fn": Setting(
        (None,), _ORDER, "a SeqIO Task, which vishwam cache reads"),
    "t5x.train.train_eval_get_dataset_fn": Setting(
        (None,), _ORDER, "a SeqIO Task, which vishwam cache reads"),
    "t5x.train.actions": Setting(
        (None, {}), "T5X's actions work on T5X's state",
        "from vishwam_t5x import train and train.train.early_stop = @hooks.EarlyStop()"),
    "t5x.train.run_eval_before_training": Setting(
        (False,), "the loop evaluates after steps",
        "vishwam evaluate --checkpoint=PATH before the run"),
    "t5x.train.train_state_initializer_cls": Setting((None,), _WRITTEN, _RENAME),
    "t5x.train.verify_matching_vocabs_fn": Setting(
        (None,), "what a cache says of its ids is always held against the model's table",
        "leave it out"),
    "t5x.train.use_gda": Setting((True,), "every array is a jax.Array", "leave it out"),
    "t5x.train.use_jax_array": Setting((True, False), "every array is a jax.Array", "leave it out"),
    "t5x.train.use_orbax": Setting((True, False), _ORBAX, "leave it out"),
    "t5x.train.gc_period": Setting(
        (0,), "Python's garbage collector is left alone", "gc_period = 0"),
    "t5x.train.relative_steps": Setting(
        (None,), "the length of a run is its last step", "TRAIN_STEPS = the last step"),
    "t5x.train.concurrent_metrics": Setting((True, False), "", ""),
    "t5x.evaluate.summarize_config_fn": Setting(
        (None, _SUMMARY), "vishwam evaluate writes metrics and predictions",
        "vishwam config show"),
    "t5x.evaluate.train_state_initializer_cls": Setting((None,), _WRITTEN, _RENAME),
    "t5x.evaluate.fallback_init_rng": Setting(
        (None,), "what is evaluated must be trained, all of it", "fallback_init_rng = None"),
    "t5x.evaluate.use_orbax": Setting((True, False), _ORBAX, "leave it out"),
    "t5x.infer.summarize_config_fn": Setting(
        (None, _SUMMARY), "vishwam infer writes predictions", "vishwam config show"),
    "t5x.infer.write_fn": Setting(
        (None,), "predictions are JSON lines", "read INFER_OUTPUT_DIR/*.jsonl"),
    "t5x.infer.merge_fn": Setting((None,), "predictions are JSON lines", "cat the shards' files"),
    "t5x.infer.merge_chunked_results": Setting(
        (True,), "a shard is one file", "merge_chunked_results = True"),
    "t5x.infer.train_state_initializer_cls": Setting((None,), _WRITTEN, _RENAME),
    "t5x.infer.fallback_init_rng": Setting(
        (None,), "what infers must be trained, all of it", "fallback_init_rng = None"),
    "t5x.infer.verify_matching_vocabs_fn": Setting(
        (None,), "what a cache says of its ids is always held against the model's table",
        "leave it out"),
    "t5x.infer.output_vocab_feature_name": Setting(
        ("targets",), "text is written with the vocabulary of the task's targets",
        "output_vocab_feature_name = 'targets'"),
    "t5x.infer.file_extension": Setting(
        ("jsonl",), "predictions are JSON lines", "file_extension = 'jsonl'"),
    "t5x.infer.keep_aux_as_numpy": Setting(
        (False,), "predictions are JSON lines", "keep_aux_as_numpy = False"),
    "t5x.infer.use_orbax": Setting((True, False), _ORBAX, "leave it out"),
    "t5x.utils.DatasetConfig.use_custom_packing_ops": Setting(
        (False,), "they need tensor2tensor; rows are packed by vishwam_t5x, in plain NumPy",
        "use_custom_packing_ops = False"),
    "t5x.utils.DatasetConfig.trim_output_features": Setting(
        (True,), "a row has no room for more than task_feature_lengths",
        "trim_output_features = True, with longer task_feature_lengths"),
    "t5x.utils.DatasetConfig.runtime_preprocessors": Setting(
        (None, ()), "they are AirIO's", "preprocessors of the SeqIO Task"),
    "t5x.utils.SaveCheckpointConfig.dtype": Setting(
        ("float32", None), "a checkpoint must resume its run exactly",
        "dtype = 'float32'; vishwam convert writes other dtypes"),
    "t5x.utils.SaveCheckpointConfig.keep_dataset_checkpoints": Setting(
        (None,), "the data's position, a few numbers, is in every checkpoint",
        "keep_dataset_checkpoints = None"),
    "t5x.utils.SaveCheckpointConfig.save_dataset": Setting(
        (True, False), "", ""),
    "t5x.utils.SaveCheckpointConfig.checkpointer_cls": Setting(
        (None, _NEWEST, _BEST), _ORBAX, "leave it out"),
    "t5x.utils.SaveCheckpointConfig.checkpoint_manager_cls": Setting((None,), _ORBAX,
                                                                     "leave it out"),
    "t5x.utils.SaveCheckpointConfig.state_transformation_fns": Setting(
        ((), []), _WRITTEN, _RENAME),
    "t5x.utils.SaveCheckpointConfig.use_gda": Setting((True,), "every array is a jax.Array",
                                                      "leave it out"),
    "t5x.utils.RestoreCheckpointConfig.restore_dataset": Setting(
        (False,), "a run's own checkpoints restore the data's position by themselves; another "
        "run's position is of other data", "restore_dataset = False"),
    "t5x.utils.RestoreCheckpointConfig.checkpointer_cls": Setting(
        (None, _NEWEST, _BEST), "the layout is told from the files",
        "leave it out"),
    "t5x.utils.RestoreCheckpointConfig.checkpoint_manager_cls": Setting(
        (None,), "the layout is told from the files", "leave it out"),
    "t5x.utils.RestoreCheckpointConfig.state_transformation_fns": Setting(
        ((), []), _WRITTEN, _RENAME),
    "t5x.utils.RestoreCheckpointConfig.use_gda": Setting((True,), "every array is a jax.Array",
                                                         "leave it out"),
    "t5x.utils.RestoreCheckpointConfig.is_tensorflow": Setting(
        (False,), "checkpoints of Mesh TensorFlow are not read",
        "T5X's own copy of the checkpoint (gs://t5-data/pretrained_models/t5x/…)"),
    "t5x.partitioning.PjitPartitioner.params_on_devices": Setting(
        (True,), "parameters live on the devices",
        "REMAT and a mesh with fsdp save memory: gin/remat/, gin/hardware/"),
    "t5x.partitioning.PjitPartitioner.backend": Setting(
        (None,), "jax chooses the devices", "the environment variable JAX_PLATFORMS"),
    "t5x.partitioning.PjitPartitioner.use_cpu_pjit": Setting(
        (None, False), "CPUs take the same way as accelerators", "leave it out"),
    "t5x.partitioning.PjitPartitioner.use_shardy_partitioner": Setting(
        (None, False, True), "", ""),
    "t5x.models.EncoderDecoderModel.feature_converter_cls": Setting(
        (None,), "inputs and targets are laid into rows by vishwam_t5x", "leave it out"),
    "t5x.models.EncoderDecoderModel.decoder_params": Setting(
        (None, {}), "the settings of decoding are those of the decode_fn",
        "decoding.beam_search.alpha and decoding.temperature_sample.*"),
    "t5x.models.EncoderDecoderModel.default_decoder_params": Setting(
        (None,), "the settings of decoding are those of the decode_fn",
        "decoding.beam_search.alpha and decoding.temperature_sample.*"),
    "t5x.models.EncoderDecoderModel.return_all_decodes": Setting(
        (False,), "the best sequence is the prediction",
        "vishwam infer --return_all_decodes"),
    "t5x.models.DecoderOnlyModel.inputs_bidirectional_attention": Setting(
        (True,), "the inputs of a prefix LM all see each other; a causal one is not built",
        "DecoderOnlyModel.inputs_bidirectional_attention = True"),
    "t5x.models.DecoderOnlyModel.feature_converter_cls": Setting(
        (None,), "inputs and targets are laid into rows by vishwam_t5x", "leave it out"),
    "t5x.decoding.beam_search.min_log_prob": Setting(
        (-1.0e7,), "it bounds a beam that has not begun", "leave it out"),
    "t5x.decoding.beam_search.decoder_hook": Setting((None,), "steps of decoding are compiled "
                                                   "without hooks", "leave it out"),
    "t5x.decoding.temperature_sample.max_decode_steps_hard_limit": Setting(
        (None,), "a text is as long as its row", "temperature_sample.max_decode_steps"),
    "t5x.decoding.temperature_sample.rescale_log_probs": Setting(
        (True, False), "", ""),
    "t5x.decoding.temperature_sample.state_callback_fn": Setting(
        (None,), "steps of decoding are compiled without callbacks", "leave it out"),
    "t5x.decoding.temperature_sample.logit_callback_fn": Setting(
        (None,), "steps of decoding are compiled without callbacks", "leave it out"),
    "seqio.PassThroughVocabulary.eos_id": Setting(
        (None, 1), "a text that is decoded ends with id 1", "eos_id = 1"),
    "seqio.Evaluator.use_memory_cache": Setting((True, False), "", ""),
    "seqio.JSONLogger.write_n_results": Setting(
        (None,), "every prediction is written", "seqio.Evaluator.num_examples"),
}
"""By full name. An empty `why`: every value is honoured in its way, or changes no result."""

IDLE: dict[str, tuple[Any, str]] = {
    "t5x.utils.RestoreCheckpointConfig.strict": (
        True, "it is about checkpoints of Mesh TensorFlow; parameters that another lacks start "
        "afresh with fallback_to_scratch = True"),
    "t5x.adafactor.Adafactor.learning_rate": (
        None, "trainer.Trainer.learning_rate_fn takes its place"),
}
"""What changes nothing in T5X either: its default, and why. Another value runs, and is logged."""

ABSENT: dict[str, tuple[str, str]] = {
    "t5x.config_utils": ("Fiddle configurations are not read", "gin files"),
    "t5x.fiddle_configs": ("Fiddle configurations are not read", "gin files"),
    "t5x.contrib.moe": ("there are no mixtures of experts", "gin/models/"),
    "t5x.contrib.calm": ("layers are not left out in decoding", "gin/models/"),
    "t5x.contrib.gpu": ("its network differs from T5X's by its kernels only",
                        "from t5x.examples.t5 import network"),
    "t5x.export": ("nothing is exported to TensorFlow", "vishwam convert"),
    "t5x.export_lib": ("nothing is exported to TensorFlow", "vishwam convert"),
    "t5x.precompile": ("a run is not compiled apart from running", "vishwam plan"),
    "t5x.interactive_model": ("it is no part of a gin file",
                              "vishwam_t5x.interactive, from Python"),
    "t5x.checkpoint_utils": (_WRITTEN, _RENAME),
    "t5x.checkpoint_importer": ("checkpoints of Mesh TensorFlow are not read",
                                "T5X's own copy of the checkpoint"),
    "t5x.state_utils": (_WRITTEN, _RENAME),
    "t5x.train_state": (_WRITTEN, _RENAME),
    "t5x.tasks": ("they are T5X's own tests'", "the tasks of the package t5"),
    "t5x.trainer.EarlyStoppingAction": (
        "T5X's actions work on T5X's state",
        "from vishwam_t5x import train and train.train.early_stop = @hooks.EarlyStop()"),
    "t5x.trainer.TerminateOnNanAction": (
        "T5X's actions work on T5X's state",
        "nothing is needed: a step that is not finite is skipped, and many end the run"),
    "t5x.trainer.BaseTrainer": ("the loop is vishwam_t5x's", "trainer.Trainer"),
    "t5x.partitioning.BasePartitioner": ("placement is by mesh and rules",
                                         "partitioning.PjitPartitioner"),
    "t5x.utils.get_dataset": (_ORDER, "leave it out: it is T5X's default"),
    "t5x.utils.get_training_eval_datasets": (_ORDER, "leave it out: it is T5X's default"),
    "t5x.utils.override_params_axes_names": (
        "a parameter has the axes that its model gives it",
        "PjitPartitioner.logical_axis_rules"),
    "t5x.utils.TrainStateInitializer": (_WRITTEN, _RENAME),
    "t5x.checkpoints.OrbaxCheckpointManagerInterface": (_ORBAX, "leave it out"),
    "t5x.optimizers.dpsgd": ("gradients of single examples are not taken", "optimizers.sgd"),
    "t5x.optimizers.amos": ("optax has no Amos", "adafactor.Adafactor"),
}
"""Modules and names of T5X's that nothing here stands for: why, and what there is instead."""


def check(owner: str, values: Mapping[str, Any]) -> None:
    """Refuses what is not honoured of an owner's parameters, and logs once what changes nothing.

    Args:
        owner: full name of T5X's function or class, e.g. 't5x.utils.DatasetConfig'.
        values: {parameter: value}; parameters that `SETTINGS` and `IDLE` do not name are passed
            over.

    Raises:
        UserError: the first value that is not accepted, why, and what there is instead.
    """
    for parameter, value in values.items():
        name = f"{owner}.{parameter}"
        if name in IDLE and value != IDLE[name][0]:
            _say_once(f"{name} = {_shown(value)} changes nothing, as in T5X: {IDLE[name][1]}")
        setting = SETTINGS.get(name)
        if setting is not None and not _accepts(setting, value):
            raise UserError(f"{name} is not honoured: {setting.why}",
                            got=f"{parameter} = {_shown(value)}", fix=setting.instead)


def whatever(name: str) -> UserError | None:
    """Returns why a name of T5X's, or something in it, is not here; None if that is not known.

    Args:
        name: full or without its beginning, e.g. 'trainer.EarlyStoppingAction'.
    """
    for known, (why, instead) in ABSENT.items():
        short = known.removeprefix("t5x.")
        if f"{name}.".startswith((f"{known}.", f"{short}.")):
            return UserError(f"{known} is not honoured: {why}", got=name, fix=instead)
    return None


def _accepts(setting: Setting, value: Any) -> bool:
    return any(type(value) is type(known) and value == known
               or isinstance(known, Named) and _is(value, known) for known in setting.accepted)


def _is(value: Any, known: Named) -> bool:
    """Whether a value is what is meant, or what gin made of it; one of the same name is not."""
    module = sys.modules.get(f"{__package__}.{known.module}")
    meant = getattr(module, known.name, None)
    if isinstance(value, type) and isinstance(meant, type):
        # gin binds a class's parameters in a subclass that has its name and module.
        return value is meant or meant in value.__bases__ and (
            value.__module__, value.__qualname__) == (meant.__module__, meant.__qualname__)
    return callable(value) and inspect.unwrap(value) is meant


@functools.cache  # once: a config is built more than once
def _say_once(line: str) -> None:
    logging.warning("%s", line)


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
