"""What learns of each input encoder, by its own switch and by groups of the optimizer."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import golden_fixtures, model_fixtures

from vishwam_t5x import gin_config, train
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

GROUPS = ("^(input_image_encoder|image_transformer)/", "^(input_audio_encoder|audio_transformer)/",
          "^input_encoders_(image|audio)_history/")


def learning(modality: str, **changes) -> set[str]:
    """Beginnings of the names of the parameters that an input's gradient reaches."""
    module = golden_fixtures.INPUTS[modality]
    deep = {"transformer": dataclasses.replace(module.transformer, num_layers=2)}
    if hasattr(module, "resampler"):
        deep["resampler"] = dataclasses.replace(module.resampler, num_layers=1)
    module = dataclasses.replace(module, **deep, **changes)
    model = EncoderDecoder(dataclasses.replace(
        golden_fixtures.config(("text",), ("text",)), inputs=(module,)))
    places = module.grid[0] * module.grid[1]
    shape = (1, 2, places) if hasattr(module, "resampler") else (1, places)
    patches = np.random.default_rng(0).normal(size=(*shape, module.patch_dim))

    def total(params):
        found = model.apply({"params": params}, {"input": jnp.asarray(patches, jnp.float32)},
                            method=lambda self, fields: self.input_encoders[modality](fields))
        return jnp.sum(jnp.sin(found.embeddings))

    params = model_fixtures.draw_variables(model)["params"]
    gradients = flatten_names(jax.jit(jax.grad(total))(params))
    return {"/".join(name.split("/")[:2]) if name.startswith("input") else name.split("/")[0]
            for name, values in gradients.items() if np.abs(values).max() > 0}


@pytest.mark.parametrize("modality, changes, learns", [
    ("image", {"freeze": True}, {"projection", "modality_embedding"}),
    ("image_history", {"freeze": True}, {"modality_embedding"}),
    pytest.param("audio", {"freeze": False}, {"projection", "modality_embedding",
                                              "audio_transformer"}, marks=pytest.mark.slow),
    pytest.param("image_history", {}, {"pre_projection", "resampler", "post_projection",
                                       "modality_embedding"}, marks=pytest.mark.slow),
    pytest.param("audio_history", {"freeze": True}, {"modality_embedding"},
                 marks=pytest.mark.slow)])
def test_a_switch_of_each_input(modality, changes, learns):
    found = {name.split("/")[-1] for name in learning(modality, **changes)}
    assert found == learns


def test_groups_freeze_whole_inputs_by_the_names_in_the_head_of_the_file():
    text = (golden_fixtures.GOLDEN.parents[2] / "gin/modalities/unified_io2.gin").read_text()
    assert all(f"'{pattern}'" in text for pattern in GROUPS)
    given = gin_config.parse([
        "--gin_file=gin/recipes/unified_io2/tiny_finetune.gin",
        "--gin_file=gin/optimizers/adafactor_groups.gin", "--gin.MODEL_DIR='unused'",
        "--gin.INITIAL_CHECKPOINT_PATH='unused'", "--gin.MIXTURE_OR_TASK_NAME='mine'",
        f"--gin.OPTIMIZER_GROUPS={tuple((pattern, None) for pattern in GROUPS)}"],
        "train", flags=train.FLAGS).arguments(train.train)
    names = list(golden_fixtures.params())
    frozen = [name for name in names if given["optimizer"].frozen(name)]
    assert {name.split("/")[0] for name in frozen} == {
        "input_image_encoder", "image_transformer", "input_audio_encoder", "audio_transformer",
        "input_encoders_image_history", "input_encoders_audio_history"}
    assert all(any(re.search(pattern, name) for name in frozen) for pattern in GROUPS)


def test_switches_by_gin():
    given = gin_config.parse([
        "--gin_file=gin/recipes/unified_io2/tiny_finetune.gin", "--gin.MODEL_DIR='unused'",
        "--gin.INITIAL_CHECKPOINT_PATH='unused'", "--gin.MIXTURE_OR_TASK_NAME='mine'",
        "--gin.INPUT_MODALITIES=('text', 'image', 'image_history', 'audio', 'audio_history')",
        "--gin.config.ImageInput.freeze=True", "--gin.config.AudioInput.freeze=False",
        "--gin.image_history/config.HistoryInput.freeze=True"],
        "train", flags=train.FLAGS).arguments(train.train)
    assert {module.modality: module.freeze for module in given["model"].config.inputs
            if module.modality != "text"} == {
        "image": True, "image_history": True, "audio": False, "audio_history": False}
