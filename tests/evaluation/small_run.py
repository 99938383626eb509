"""A MODEL_DIR with a checkpoint of the tiny model, and caches of its tasks with a vocabulary."""

from __future__ import annotations

import hashlib
import io
import pathlib

import numpy as np
import sentencepiece
from evaluation import small_model

from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.data import records_writer
from vishwam_t5x.data.synthetic import write_cache
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

MIXTURE = "tiny_mixture"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "what", "is", "this", "draw", "a")


def pixels(codes: np.ndarray) -> np.ndarray:
    """Codes [4] of a 2 x 2 grid as a picture [2, 2, 1]."""
    return (np.asarray(codes, np.float32) / 15).reshape(2, 2, 1)


def picture(output, example, is_target):
    """Postprocesses codes."""
    return int(output[0]) if is_target else pixels(output)


def brightness(targets, predictions):
    """A metric of pictures."""
    assert all(isinstance(target, int) for target in targets)
    return {"brightness": float(np.mean(np.stack(predictions)))}


def vocabulary(path: pathlib.Path) -> dict:
    """Fits a vocabulary of 64 pieces and describes it as a cache's manifest does."""
    model = io.BytesIO()
    rng = np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choice(WORDS, 8)) for _ in range(200)]),
        model_writer=model, vocab_size=64, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, character_coverage=1.0, minloglevel=2, model_type="bpe")
    path.write_bytes(model.getvalue())
    return {"path": str(path), "sha256": hashlib.sha256(model.getvalue()).hexdigest()}


def write(folder: pathlib.Path, module: EncoderDecoder, params) -> tuple[str, str]:
    """Writes caches and a checkpoint of step 7; returns (cache directory, MODEL_DIR)."""
    cache_dir, model_dir = folder / "cache", folder / "run"
    cache_dir.mkdir(parents=True)
    words = vocabulary(cache_dir / "text.model")
    judged = {
        "captions": {"metric_fns": ["vishwam_t5x.evaluation.metrics.text:exact_match"]},
        "drawings": {"metric_fns": ["evaluation.small_run:brightness"],
                     "postprocess_fn": "evaluation.small_run:picture"},
        "texts": {"metric_fns": [], "postprocess_fn": None}}
    for split, sizes in (("train", (20, 20, 20)), ("test", (6, 5, 7))):
        tasks = (small_model.text_task(sizes[0]), small_model.image_task(sizes[1]),
                 small_model.denoising_task(sizes[2]))
        for task in tasks:
            write_cache(task, cache_dir, split, {"vocabulary": words, **judged[task.name]})
    records_writer.write_mixture(cache_dir, MIXTURE, dict.fromkeys(judged, 1.0))
    saver = Checkpoints(model_dir / "checkpoints", CheckpointConfig())
    saver.save(7, {"params": params})
    saver.close()
    return str(cache_dir), str(model_dir)


GIN = """
from __gin__ import dynamic_registration
from vishwam_t5x.evaluation import generator
from vishwam_t5x.models import config
from vishwam_t5x.models import encoder_decoder
from vishwam_t5x.objectives import denoisers
from vishwam_t5x.objectives import masking
from vishwam_t5x.objectives import vocabulary

include 'gin/hardware/cpu.gin'
include 'gin/runs/evaluate.gin'
include 'gin/runs/infer.gin'

MIXTURE_OR_TASK_NAME = 'tiny_mixture'
MIXTURE_OR_TASK_MODULE = None
TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 40, 'inputs/image': 16, 'targets/image': 16}
BATCH_SIZE = 2
DECODE_BATCH_SIZE = 4
DECODING = {'text': @generator.DecodingConfig()}
generator.DecodingConfig.max_length = 6
MODEL = @encoder_decoder.EncoderDecoder()
encoder_decoder.EncoderDecoder.config = @config.EncoderDecoderConfig()
config.EncoderDecoderConfig:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 32
  num_encoder_layers = 1
  num_decoder_layers = 1
  precision = %PRECISION
  remat_policy = %REMAT
  inputs = (@config.TextInput(), @config.PatchInput())
  targets = (@config.TextOutput(), @config.CodeOutput())
config.TextInput.vocab_size = 128
config.TextOutput.vocab_size = 128
config.PatchInput:
  modality = 'image'
  patch_dim = 4
  grid = (2, 2)
config.CodeOutput:
  modality = 'image'
  vocab_size = 18
  grid = (2, 2)
OBJECTIVE = @denoisers.MixtureOfDenoisers()
denoisers.MixtureOfDenoisers:
  vocabulary = @vocabulary.VocabularyLayout()
  input_modalities = ('text', 'image')
  target_modalities = ('text', 'image')
  image = @masking.PatchSpec()
  text_r = ((3.0, 0.15),)
  text_x = ((3.0, 0.5),)
masking.PatchSpec:
  patch_size = 2
  channels = 1
vocabulary.VocabularyLayout:
  base_size = 64
  num_sentinels = 16
  num_location_bins = 0
"""
