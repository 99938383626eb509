"""Every recipe of Unified-IO 2 makes a training program whose parts fit together."""

from __future__ import annotations

import pathlib

import pytest

import helpers
from vishwam_t5x import gin_config, train
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.planning.program import Recipe

FOLDER = pathlib.Path(helpers.ROOT, "gin", "recipes", "unified_io2")
SHARED = "finetune"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.gin") if path.stem != SHARED)


def recipe(name: str, *arguments: str) -> tuple[Recipe, dict]:
    needed = ["--gin.MODEL_DIR='unused'"]
    if name != "base_pretrain":
        needed += ["--gin.INITIAL_CHECKPOINT_PATH='large-3m'", "--gin.MIXTURE_OR_TASK_NAME='mine'"]
    given = gin_config.parse([f"--gin_file={FOLDER}/{name}.gin", *needed, *arguments], "train",
                             flags=train.FLAGS).arguments(train.train)
    return Recipe.from_arguments(given), given


def test_there_is_one_for_every_size():
    assert {name.partition("_")[0] for name in RECIPES} == {"tiny", "base", "large", "xl", "xxl"}


@pytest.mark.parametrize("name", RECIPES)
def test_its_parts_fit_together(name):
    found, given = recipe(name)
    config, size = found.model.config, name.partition("_")[0]
    assert config.emb_dim == {"tiny": 16, "base": 768, "large": 1024, "xl": 2048, "xxl": 3072}[size]
    assert set(found.spec.input_capacities) == set(config.input_modalities)
    assert set(found.spec.target_capacities) == set(config.target_modalities)
    assert found.spec.batch_size % found.step.num_microbatches == 0
    peak = max(float(found.optimizer.schedule(step)) for step in (0, 999, 2000, 10_000, 10**6))
    assert peak == pytest.approx(1e-2 if name == "base_pretrain" else 2.9e-4, rel=1e-5)
    assert given["train_dataset_cfg"].pack and found.optimizer.global_norm_clip == 1.0
    assert (found.optimizer.beta1 is None) == (name == "large_one_gpu")
    assert found.flops() > 0
    numbers = {m.modality: m.max_per_row for m in config.inputs if hasattr(m, "max_per_row")}
    assert numbers and found.spec.most_a_row == numbers


def test_the_model_alone_says_how_many_images_a_row_may_hold():
    found, _ = recipe("tiny_finetune", "--gin.config.ImageInput.max_per_row=8")
    assert found.spec.most_a_row == {"image": 8}


def test_more_modalities_by_two_lists():
    found, _ = recipe("large_finetune", "--gin.INPUT_MODALITIES=('text', 'image', 'audio')",
                      "--gin.TARGET_MODALITIES=('text', 'image')")
    assert found.model.config.input_modalities == ("text", "image", "audio")
    assert set(found.spec.target_capacities) == {"text", "image"}


EVERYTHING = ("--gin.INPUT_MODALITIES=('text', 'image', 'image_history', 'audio', 'audio_history')",
              "--gin.TARGET_MODALITIES=('text', 'image', 'audio')",
              "--gin.TASK_FEATURE_LENGTHS={'inputs': 864, 'targets': 1664, "
              "'inputs/image_history': 128, 'inputs/audio_history': 64}")


def test_histories_by_the_same_two_lists():
    found, _ = recipe("tiny_finetune", *EVERYTHING, "--gin.IMAGE_FRAME_BUDGET=2.0",
                      "--gin.BATCH_SIZE=16", "--gin.FRAME_BUDGET_ROWS=4")
    assert found.spec.frame_limits() == {"image_history": (8, 4)}
    assert found.spec.rows_together == 4
    shapes = {name: feature.shape for name, feature in found.spec.arrays().items()}
    assert shapes["inputs/image_history/input"] == (16, 4, 256, 768)
    assert shapes["inputs/audio_history/input"] == (16, 4, 128, 256)
    budgets = {module.modality: module.frame_budget for module in found.model.config.inputs
               if module.modality.endswith("_history")}
    assert budgets == {"image_history": 2.0, "audio_history": None}
    more, _ = recipe("tiny_finetune", *EVERYTHING, "--gin.BATCH_SIZE=16")
    assert found.flops() < more.flops(), "frames beyond the budget cost nothing"


@pytest.mark.parametrize("binding, why", [
    ("image_history/config.HistoryInput.frame_budget=1.0", "budget of frames"),
    ("audio_history/masking.FrameSpec.latents=8", "latents of a frame"),
    ("TASK_FEATURE_LENGTHS={'inputs': 864, 'targets': 1280, 'inputs/image_history': 100}",
     "whole frames")])
def test_model_and_objective_must_agree_about_frames(binding, why):
    with pytest.raises(UserError, match=why):
        recipe("tiny_finetune", *EVERYTHING, f"--gin.{binding}")
