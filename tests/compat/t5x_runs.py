"""Gin files as T5X's users write them, and a task for them to train on."""

from __future__ import annotations

import pathlib
import textwrap

import numpy as np

from vishwam_t5x.data import directory, records, records_writer

# As `t5x/examples/t5/t5_1_1/base.gin` says it, in small.
MODEL = """
    from __gin__ import dynamic_registration

    import seqio
    from t5x import adafactor
    from t5x import decoding
    from t5x import models
    from t5x.examples.t5 import network

    DROPOUT_RATE = %gin.REQUIRED
    Z_LOSS = 0.0001
    LOSS_NORMALIZING_FACTOR = None
    VOCABULARY = @seqio.ByteVocabulary()

    OPTIMIZER = @adafactor.Adafactor()
    adafactor.Adafactor:
      decay_rate = 0.8
      step_offset = 0
      logical_factor_rules = @adafactor.standard_logical_factor_rules()

    MODEL = @models.EncoderDecoderModel()
    models.EncoderDecoderModel:
      module = @network.Transformer()
      input_vocabulary = %VOCABULARY
      output_vocabulary = %VOCABULARY
      optimizer_def = %OPTIMIZER
      z_loss = %Z_LOSS
      loss_normalizing_factor = %LOSS_NORMALIZING_FACTOR

    network.Transformer.config = @network.T5Config()
    network.T5Config:
      vocab_size = 384
      dtype = 'float32'
      emb_dim = {emb_dim}
      num_heads = 4
      num_encoder_layers = {layers}
      num_decoder_layers = {layers}
      head_dim = 16
      mlp_dim = {mlp_dim}
      mlp_activations = ('gelu', 'linear')
      dropout_rate = %DROPOUT_RATE
      logits_via_embedding = False
    """

# As T5X's pretrain.gin was before `PjitPartitioner` had its name.
PRETRAIN = """
    from __gin__ import dynamic_registration

    import __main__ as train_script
    import my_own_tasks
    from t5x import gin_utils
    from t5x import partitioning
    from t5x import trainer
    from t5x import utils

    include 'model.gin'

    MIXTURE_OR_TASK_NAME = 'copy'
    TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 16}
    TRAIN_STEPS = 3
    MODEL_DIR = %gin.REQUIRED
    DROPOUT_RATE = 0.1
    RANDOM_SEED = 3

    train_script.train:
      model = %MODEL
      model_dir = %MODEL_DIR
      train_dataset_cfg = @train/utils.DatasetConfig()
      train_eval_dataset_cfg = @train_eval/utils.DatasetConfig()
      infer_eval_dataset_cfg = None
      checkpoint_cfg = @utils.CheckpointConfig()
      partitioner = @partitioning.ModelBasedPjitPartitioner()
      trainer_cls = @trainer.Trainer
      total_steps = %TRAIN_STEPS
      eval_steps = 2
      eval_period = 3
      stats_period = 1
      random_seed = %RANDOM_SEED
      summarize_config_fn = @gin_utils.summarize_gin_config

    partitioning.ModelBasedPjitPartitioner:
      num_partitions = 1
      model_parallel_submesh = ()

    train/utils.DatasetConfig:
      mixture_or_task_name = %MIXTURE_OR_TASK_NAME
      task_feature_lengths = %TASK_FEATURE_LENGTHS
      split = 'train'
      batch_size = 4
      shuffle = True
      seed = None
      use_cached = True
      pack = True

    train_eval/utils.DatasetConfig:
      mixture_or_task_name = %MIXTURE_OR_TASK_NAME
      task_feature_lengths = %TASK_FEATURE_LENGTHS
      split = 'validation'
      batch_size = 4
      shuffle = False
      seed = 42
      use_cached = True
      pack = True

    utils.CheckpointConfig:
      restore = @utils.RestoreCheckpointConfig()
      save = @utils.SaveCheckpointConfig()
    utils.RestoreCheckpointConfig.path = []
    utils.SaveCheckpointConfig:
      period = 1000
      dtype = 'float32'
      keep = None

    trainer.Trainer:
      num_microbatches = None
      learning_rate_fn = @utils.create_learning_rate_scheduler()
      weight_metrics_computer = @trainer.WeightMetricsComputer()

    utils.create_learning_rate_scheduler:
      factors = 'constant * rsqrt_decay'
      base_learning_rate = 1.0
      warmup_steps = 10000
    """

# What T5X's own tasks are made of.
TASKS = """
    import seqio
    import tensorflow as tf

    WORDS = [f"{a} {b}" for a in ("red", "old", "new") for b in ("cat", "dog", "house", "stone")]

    def examples(split, shuffle_files, seed=None):
        words = WORDS[:9] if split == "train" else WORDS[9:]
        return tf.data.Dataset.from_tensor_slices(
            {"inputs": words, "targets": [word[::-1] for word in words]})

    def exact(targets, predictions):
        return {"exact": sum(map(str.__eq__, targets, predictions)) / len(targets)}

    TEXT = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    seqio.TaskRegistry.add(
        "reversed", source=seqio.FunctionDataSource(
            examples, splits=("train", "validation", "test")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": TEXT, "targets": TEXT}, metric_fns=[exact])
    """


def write(folder: pathlib.Path, name: str, text: str) -> pathlib.Path:
    """Writes an indented text to a file."""
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def model_file(folder: pathlib.Path, emb_dim: int = 64, mlp_dim: int = 64, layers: int = 1
               ) -> pathlib.Path:
    """Writes MODEL in a size."""
    return write(folder, "model.gin", MODEL.format(emb_dim=emb_dim, mlp_dim=mlp_dim, layers=layers))


def pretrain_file(folder: pathlib.Path) -> pathlib.Path:
    """Writes PRETRAIN, the model it includes and an empty module of tasks that it imports."""
    model_file(folder)
    write(folder, "my_own_tasks.py", "raise AssertionError('needed by nobody')")
    return write(folder, "pretrain.gin", PRETRAIN)


def cache(folder: pathlib.Path, task: str = "copy") -> None:
    """Writes a cached task of T5's features, so that no TensorFlow is needed."""
    features = {name: records.FeatureInfo((None,), "int32") for name in ("inputs", "targets")}
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 10)):
        writer = records_writer.TaskCacheWriter(
            directory.task_directory(folder, task, split), task, split, features)
        part = writer.part(0)
        for _ in range(count):
            ids = rng.integers(3, 259, rng.integers(2, 8)).astype(np.int32)
            part.write({"inputs": np.append(ids, np.int32(1)),
                        "targets": np.append(ids[::-1], np.int32(1))})
        part.close()
        writer.finish()
