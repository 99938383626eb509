"""All five inputs of Unified-IO 2 in a small run: videos and sounds, packed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from evaluation import small_run
from models import model_fixtures

import helpers
import media
from vishwam_t5x import gin_config
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.data import records_writer, synthetic
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.evaluate import evaluate
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x_tasks import quickstart_fitted

RECIPE = """
from __gin__ import dynamic_registration
from vishwam_t5x import train
from vishwam_t5x.data import recordings
from vishwam_t5x.data import spectrogram
from vishwam_t5x.models import config
from vishwam_t5x.objectives import denoisers
from vishwam_t5x.objectives import masking
from vishwam_t5x.objectives import vocabulary

include 'gin/runs/pretrain.gin'
include 'gin/models/unified_io2/tiny.gin'
include 'gin/runs/evaluate.gin'
include 'gin/runs/infer.gin'
include 'gin/objectives/unified_io2.gin'
include 'gin/optimizers/adafactor_unified_io2.gin'
include 'gin/hardware/cpu.gin'

MIXTURE_OR_TASK_NAME = 'everything'
INPUT_MODALITIES = ('text', 'image', 'image_history', 'audio', 'audio_history')
TARGET_MODALITIES = ('text', 'image', 'audio')
TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 96, 'inputs/image_history': 12,
                        'inputs/audio_history': 6}
TEXT_VOCAB_SIZE = 1152
IMAGE_VOCAB_SIZE = 66
AUDIO_VOCAB_SIZE = 34
IMAGE_HISTORY_GRID = (2, 2)
IMAGE_HISTORY_LATENTS = 3
AUDIO_HISTORY_GRID = (4, 2)
AUDIO_HISTORY_LATENTS = 2
IMAGE_FRAME_BUDGET = 2.0
FRAME_BUDGET_ROWS = 2
train.train.train_eval_dataset_cfg = None

config.ImageTransformer:
  patch_dim = 48
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_layers = 2
  position_grid = (2, 2)
config.AudioTransformer:
  patch_dim = 16
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_layers = 2
config.ImageInput.grid = (4, 4)
config.AudioInput.grid = (4, 2)
image/config.CodeOutput.grid = (4, 4)
image/config.CodeOutput.num_codes = 64
audio/config.CodeOutput.grid = (4, 4)
audio/config.CodeOutput.layout = (8, 2)
audio/config.CodeOutput.num_codes = 32
denoisers.MixtureOfDenoisers.text_r = ((3.0, 0.15),)
denoisers.MixtureOfDenoisers.text_x = ((3.0, 0.5),)
vocabulary.VocabularyLayout.base_size = 1024
vocabulary.VocabularyLayout.num_sentinels = 32
vocabulary.VocabularyLayout.num_location_bins = 0
image/masking.PatchSpec.patch_size = 4
audio/masking.PatchSpec.patch_size = 4
audio/masking.PatchSpec.code_grid = (8, 2)

LOG_MEL = @recordings.RecordingConfig()
recordings.RecordingConfig.log_mel = @spectrogram.LogMelConfig()
recordings.RecordingConfig.segment = @spectrogram.SegmentConfig()
recordings.RecordingConfig.max_segments = 4
spectrogram.LogMelConfig.sample_rate = 8000
spectrogram.LogMelConfig.fft_size = 256
spectrogram.LogMelConfig.hop = 128
spectrogram.LogMelConfig.num_mels = 8
spectrogram.LogMelConfig.max_hertz = 4000.0
spectrogram.SegmentConfig.samples = 1920
spectrogram.SegmentConfig.least_rest = 0
"""
PATCHES = {"image": PatchSpec(4), "audio": PatchSpec(4, channels=1)}
TEXT = SyntheticFeature(2, 9, num_ids=1024)
FRAMES = SyntheticFeature(0, 4, rest=(8, 8, 3), dtype="uint8")
SEGMENTS = SyntheticFeature(0, 3, rest=(16, 8), dtype="float32")
IMAGE = SyntheticFeature(16, 16, rest=(16, 3), dtype="uint8")
SOUND = SyntheticFeature(16, 16, rest=(8,), dtype="float32")
CODES = {name: SyntheticFeature(16, 16, num_ids=number) for name, number in (
    ("image", 64), ("audio", 32))}
TASKS = {
    "videos": {"image_history_inputs": FRAMES, "text_inputs": TEXT, "text_targets": TEXT},
    "everything_in": {"text_inputs": TEXT, "image_inputs": IMAGE, "image_history_inputs": FRAMES,
                      "audio_inputs": SOUND, "audio_history_inputs": SEGMENTS,
                      "text_targets": TEXT, "image_target_codes": CODES["image"],
                      "audio_target_codes": CODES["audio"]},
    "words": {"text": SyntheticFeature(4, 20, num_ids=1024)},
    "sounds": {"text_prompt": TEXT, "audio": SOUND, "audio_codes": CODES["audio"],
               "audio_history": SEGMENTS}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe, beside the caches of its tasks."""
    folder = tmp_path_factory.mktemp("everything")
    for name, features in TASKS.items():
        synthetic.write_cache(SyntheticTask(name, features, 60, patch_specs=PATCHES), folder)
        synthetic.write_cache(SyntheticTask(name, features, 4, patch_specs=PATCHES), folder, "test")
    records_writer.write_mixture(folder, "everything", dict.fromkeys(TASKS, 1.0))
    (folder / "recipe.gin").write_text(RECIPE)
    return folder


def vishwam(recipe, verb, model_dir, *more):
    done = helpers.vishwam(
        verb, f"--gin_file={recipe / 'recipe.gin'}", f"--gin.MODEL_DIR='{model_dir}'",
        f"--gin.CACHE_DIR='{recipe}'", "--gin.BATCH_SIZE=16", "--gin.TRAIN_STEPS=2",
        "--gin.LOG_PERIOD=1", *more)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def losses(model_dir):
    return [{name: value for name, value in json.loads(line).items() if name.startswith("loss")}
            for line in (model_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_inputs_train_packed_are_looked_at_and_scored(recipe, tmp_path, monkeypatch):
    vishwam(recipe, "train", tmp_path / "one", "--gin.NUM_MICROBATCHES=2")
    found = losses(tmp_path / "one")
    assert len(found) == 2 and {"loss/text", "loss/image", "loss/audio"} <= found[0].keys()
    # Frames beyond the budget of two rows, in one microbatch, would not be finite.
    assert all(np.isfinite(value) for record in found for value in record.values())
    vishwam(recipe, "inspect", tmp_path / "one", f"--output={tmp_path / 'page.html'}")
    assert "image_history, 3 frames" in (tmp_path / "page.html").read_text()

    monkeypatch.setenv("VISHWAM_CACHE_DIR", str(tmp_path / "cache"))
    vocabulary = quickstart_fitted.vocabulary_path()
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(
            media.png(np.full((9, 7, 3), 60 + 120 * number, np.uint8)))
    (tmp_path / "a.wav").write_bytes(media.wav(media.hum(0.6, 16000), 16000))
    asked = {"text": "what is it?", "target": "the digit"}
    (tmp_path / "lines.jsonl").write_text("".join(
        json.dumps({**asked, **line}) + "\n" for line in (
            {"frames": ["0.png", "1.png", "0.png"]}, {"frames": ["1.png", "1.png", "0.png"]},
            {"frames": ["0.png"] * 3}, {"audio": "a.wav"}, {"frames": ["0.png"] * 9},
            {"frames": ["0.png"] * 5})))
    done = vishwam(recipe, "infer", tmp_path / "one", "--mode=score",
                   f"--input_file={tmp_path / 'lines.jsonl'}",
                   f"--output_file={tmp_path / 'out.jsonl'}",
                   f"--gin.VOCABULARY_PATH='{vocabulary}'", "--gin.DECODE_BATCH_SIZE=4")
    assert "line 5: an example has too many frames (9, at most 8)" in done.stdout
    assert "line 6: the image_history is too long (15 slots, at most 12)" in done.stdout
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["example"] for line in out] == [1, 2, 3, 4]
    assert out[0]["frames"] == ["0.png", "1.png", "0.png"]
    assert out[3]["input_slots"] == {"text": 6, "audio": 8, "audio_history": 2}
    assert len({line["score"] for line in out}) == 4 and np.isfinite(out[0]["score"])


@pytest.mark.slow
def test_histories_are_evaluated(tmp_path, monkeypatch):
    """Videos and sounds that were cached, by the verb: losses, and answers that a task judges."""
    words = small_run.vocabulary(tmp_path / "text.model")
    for name, features in TASKS.items():
        features = {key: dataclasses.replace(feature, num_ids=64) if key.startswith("text")
                    else feature for key, feature in features.items()}
        metrics = ["vishwam_t5x.evaluation.metrics.text:exact_match"] if name == "videos" else []
        for split in ("train", "test"):
            synthetic.write_cache(SyntheticTask(name, features, 4, patch_specs=PATCHES), tmp_path,
                                  split, {"vocabulary": words, "metric_fns": metrics})
    records_writer.write_mixture(tmp_path, "everything", dict.fromkeys(TASKS, 1.0))
    (tmp_path / "recipe.gin").write_text(RECIPE.replace("base_size = 1024", "base_size = 64"))
    monkeypatch.setenv("VISHWAM_CACHE_DIR", str(tmp_path))
    config = gin_config.parse(
        [f"--gin_file={tmp_path / 'recipe.gin'}", f"--gin.MODEL_DIR='{tmp_path / 'run'}'",
         f"--gin.CACHE_DIR='{tmp_path}'", "--gin.TEXT_VOCAB_SIZE=128", "--gin.BATCH_SIZE=4",
         "--gin.DECODE_BATCH_SIZE=4"], "evaluate")
    params = model_fixtures.draw_variables(config.macro("MODEL"))["params"]
    saver = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig())
    saver.save(1, {"params": params})
    saver.close()
    rows = {result.task: result.metrics for result in config.call(evaluate).results}
    assert rows["videos"]["exact_match"] == 0 and rows["videos"]["num_examples"] == 4
    assert {"loss/text", "loss/image", "loss/audio"} <= rows["everything_in"].keys()
    assert all(np.isfinite(row["loss"]) for row in rows.values()) and "loss/audio" in rows["sounds"]
