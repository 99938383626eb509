"""The published sizes of Unified-IO 2 have its parameters, name by name, and any subset of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter

import jax
import numpy as np
import pytest
from flax.core import meta
from models import golden_fixtures
from models.model_fixtures import GOLDEN

from vishwam_t5x import gin_config
from vishwam_t5x.checkpointing.convert import unified_io2
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.models.config import TextInput, choose
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

PUBLISHED = {"large": 1_080_595_919, "xl": 3_175_415_247, "xxl": 6_864_176_143}
TRANSFORMERS, CODECS = 157_270_272, 118_485_711


@functools.cache
def model(size, *arguments):
    parsed = gin_config.parse([f"--gin_file=gin/models/unified_io2/{size}.gin",
                               "--gin_file=gin/modalities/unified_io2_codecs.gin", *arguments],
                              "forward")
    return parsed.macro("MODEL")


def shapes(config):
    boxed = jax.eval_shape(EncoderDecoder(config).init, jax.random.key(0))
    return {name: leaf.shape for name, leaf in flatten_names(meta.unbox(boxed["params"])).items()}


def parameters(config):
    """How often each shape is there by its published name, layers taken together.

    Nothing is allocated, and two layers of each stack stand for all: they are alike.
    """
    def shallow(module):
        if module.transformer is None:
            return module
        return dataclasses.replace(
            module, transformer=dataclasses.replace(module.transformer, num_layers=2))

    small = dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1,
                                inputs=tuple(shallow(module) for module in config.inputs))
    depth = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    found = {}
    for name, shape in shapes(small).items():
        theirs = unified_io2.parameter_to_unified_io2(name)
        starred = re.sub(r"(layers|ResidualAttentionBlock)_\d+", r"\1_*", theirs)
        stack, _, inside = name.partition("/")
        number = 1
        if stack in depth and inside.startswith("layers_"):
            number = depth[stack]
        elif "ResidualAttentionBlock" in name:
            number = config.transformers[stack].num_layers
        elif "/layers_" in name:
            number = 2
        found[starred] = [number, *shape]
    return found


def count(found):
    parts = Counter()
    for name, shape in found.items():
        part = ("codecs" if "discrete_vae" in name else
                "transformers" if "vision_transformer" in name else
                "tables" if "embedder" in name else
                name.split("/")[0] if name.startswith(("encoder/", "decoder/")) else "adapters")
        parts[part] += math.prod(shape)
    return parts


@pytest.mark.parametrize("size", [
    "tiny", pytest.param("large", marks=pytest.mark.slow),
    pytest.param("xl", marks=pytest.mark.slow), "xxl"])
def test_every_parameter_of_a_published_size(size):
    tree = json.loads((GOLDEN / "trees.json").read_text())[size]
    found = parameters(model(size).config)
    if size == "tiny":  # its resamplers have one layer
        found = {name: [1, *shape[1:]] if "resampler/" in name else shape
                 for name, shape in found.items()}
    parts = count(found)
    with np.load(GOLDEN / "codec_trees.npz") as file:
        codecs = {f"target_encoders_{modality}/discrete_vae/{name}": [1, *shape]
                  for modality in file for name, (shape, _) in
                  json.loads(file[modality].tobytes()).items()}
    assert found == {**tree["parameters"], **codecs}
    assert parts["transformers"] == TRANSFORMERS and parts["codecs"] == tree["codecs"] == CODECS
    if size in PUBLISHED:
        assert sum(parts.values()) == PUBLISHED[size]


@pytest.mark.slow
def test_base():
    assert count(parameters(model("base").config)) == {
        "encoder": 84_955_392, "decoder": 113_277_696, "tables": 44_630_016,
        "transformers": TRANSFORMERS, "adapters": 33_082_880, "codecs": CODECS}


def read_both(model, objective):
    return model.config, objective


def test_pixels_by_one_binding():
    config, objective = gin_config.parse([
        *(f"--gin_file=gin/{name}.gin" for name in (
            "models/unified_io2/tiny", "modalities/unified_io2_codecs",
            "objectives/mixture_of_denoisers")),
        "--gin.read_both.model=%MODEL", "--gin.read_both.objective=%OBJECTIVE",
        "--gin.TARGET_CODECS={'image': %IMAGE_CODEC}"], "train", roots=[read_both]).call(read_both)
    assert objective.signals == {"image": config.codecs["image"].signal}
    assert objective.lengths({"text_inputs": 3, "image_targets": 256}, seed=0, example=0) == (
        {"text": 5}, {"image": 1024})
    assert gin_config.parse(["--gin_file=gin/models/unified_io2/tiny.gin"], "forward").macro(
        "MODEL").config.codecs == {}


def test_a_subset_by_one_list():
    config = model("tiny", "--gin.INPUT_MODALITIES=('image_history', 'text')",
                   "--gin.TARGET_MODALITIES=('text',)").config
    assert config.input_modalities == ("text", "image_history")
    assert config.target_modalities == ("text",) and list(config.tables) == ["text"]
    assert list(config.transformers) == ["image_transformer"]
    with pytest.raises(UserError, match="did you mean 'audio_history'"):
        model("tiny", "--gin.INPUT_MODALITIES=('text', 'audio_histori')")
    with pytest.raises(UserError, match="must be a list"):
        choose((TextInput(vocab_size=8),), "text")
    with pytest.raises(UserError, match="must be a list"):
        choose((TextInput(vocab_size=8),), None)


@pytest.mark.parametrize("inputs", [("text", "image_history"), ("audio_history", "image")])
def test_a_subset_finds_all_it_needs_in_a_full_checkpoint(inputs):
    """The original cannot: there the shared transformer is named after what is built first."""
    full = {name: value.shape for name, value in golden_fixtures.params().items()}
    part = shapes(golden_fixtures.config(inputs, ("text", "audio")))
    assert part.items() <= full.items() and len(part) < len(full)


def test_names_there_and_back():
    for name in golden_fixtures.params():
        theirs = unified_io2.parameter_to_unified_io2(name)
        assert unified_io2.parameter_from_unified_io2(theirs) == name
    alone = "input_encoders_image_history/vit_image_encoder/vision_transformer/pre_ln/bias"
    assert unified_io2.parameter_from_unified_io2(alone) == "image_transformer/pre_ln/bias"
