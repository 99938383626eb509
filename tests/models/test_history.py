"""Frames and pictures through transformers: budgets, limits and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import golden_fixtures

from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.data import source
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.models.config import (
    AudioInput,
    AudioTransformer,
    EncoderDecoderConfig,
    HistoryInput,
    ImageTransformer,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.vocabulary import VocabularyLayout

BATCH, FRAMES = 2, 3


def embed(module, fields):
    """What the model's only input makes of the arrays of its modality."""
    config = dataclasses.replace(golden_fixtures.config(("text",), ("text",)), inputs=(module,))
    model = EncoderDecoder(config)

    def encode(self, fields):
        return self.input_encoders[module.modality](fields)

    apply = jax.jit(functools.partial(model.apply, method=encode))
    return apply(golden_fixtures.variables(), fields)


def frames(present):
    patches = np.random.default_rng(0).normal(size=(BATCH, FRAMES, 9, 768)).astype(np.float32)
    mask = np.asarray(present, np.int32)[..., None] * np.ones((1, 1, 9), np.int32)
    return {"input": patches, "mask": mask}


@pytest.fixture(scope="module")
def history():
    return golden_fixtures.INPUTS["image_history"]


def test_a_budget_changes_nothing_but_the_cost(history):
    fields = frames([[1, 0, 1], [0, 1, 0]])
    fields["frame_ids"] = np.asarray([[0, 1, 2], [0, 0, 1]], np.int32)
    expected = embed(history, fields)
    found = embed(dataclasses.replace(history, frame_budget=1.5), fields)
    np.testing.assert_array_equal(found.segment_ids, np.repeat(
        [[1, 0, 1], [0, 1, 0]], history.resampler.num_latents, axis=1))
    np.testing.assert_array_equal(found.segment_ids, expected.segment_ids)
    valid = np.asarray(found.segment_ids) > 0
    np.testing.assert_allclose(np.asarray(found.embeddings)[valid],
                               np.asarray(expected.embeddings)[valid], atol=1e-5)
    assert np.isfinite(found.embeddings).all()
    # Positions follow the number of the frame, not the slot it lies in.
    latents = history.resampler.num_latents
    np.testing.assert_array_equal(found.angles[1, :latents], found.angles[1, latents:2 * latents])
    np.testing.assert_array_equal(found.angles[0, latents:2 * latents],
                                  found.angles[1, 2 * latents:])


@pytest.mark.slow
def test_frames_beyond_the_budget_are_not_dropped_in_silence(history):
    found = embed(dataclasses.replace(history, frame_budget=1.5),
                  frames([[1, 1, 1], [0, 1, 0]]))
    lost = np.isnan(np.asarray(found.embeddings)).all(-1)
    latents = history.resampler.num_latents
    assert lost[1, latents:2 * latents].all() and lost.sum() == latents


def test_pictures_beyond_the_limit_of_a_row_are_not_encoded_wrong():
    module = dataclasses.replace(golden_fixtures.INPUTS["image"], max_per_row=2)
    patches = np.random.default_rng(0).normal(size=(1, 6, 768)).astype(np.float32)
    found = embed(module, {"input": patches, "mask": np.asarray([[1, 0, 1, 1, 1, 1]], np.int32),
                           "segment_ids": np.asarray([[1, 1, 1, 4, 4, 5]], np.int32)})
    lost = np.isnan(np.asarray(found.embeddings)).any(-1)
    np.testing.assert_array_equal(lost, [[False] * 5 + [True]])


def test_rows_are_packed_for_the_model_whatever_the_objective():
    """Pictures of one patch, many of which fit in a row: none may be one too many for the model."""
    module = dataclasses.replace(golden_fixtures.INPUTS["image"], max_per_row=2)
    model = dataclasses.replace(golden_fixtures.config(("text",), ("text",)),
                                inputs=(golden_fixtures.INPUTS["text"], module))
    words = {"text_inputs": SyntheticFeature(1, 3, num_ids=64),
             "text_targets": SyntheticFeature(1, 3, num_ids=64)}
    pixels = {"image_inputs": SyntheticFeature(16, 16, rest=(16, 3), dtype="uint8")}
    goal = MixtureOfDenoisers(
        vocabulary=VocabularyLayout(64, num_sentinels=4, num_location_bins=0),
        input_modalities=("text", "image"), target_modalities=("text",))
    mixture = Mixture([SyntheticTask("thumbnails", pixels | words, 12,
                                     patch_specs={"image": goal.image}),
                       SyntheticTask("words", words, 12)], [2.0, 1.0])
    shapes = source.DatasetConfig("both", {"inputs": 32, "targets": 32, "inputs/image": 6}, BATCH)
    found = {}
    for config in (None, model):
        batch = source.assemble(shapes, goal, mixture, config).batches.batch(DataPosition())
        fields = {name.rpartition("/")[2]: array for name, array in batch.arrays.items()
                  if name.startswith("inputs/image/")}
        found[config is model] = (fields["mask"].sum(axis=1).max(),
                                  np.isnan(np.asarray(embed(module, fields).embeddings)).any(),
                                  max(map(len, batch.plan.rows)))
    assert found[False][0] > 2 and found[False][1], "as many as fit end a run"
    assert found[True][:2] == (2, False)
    assert found[True][2] > 2, "texts alone are not counted"


@pytest.mark.slow
def test_a_transformer_that_is_not_frozen_learns():
    module = dataclasses.replace(golden_fixtures.INPUTS["image"], freeze=False)
    patches = np.random.default_rng(0).normal(size=(1, 3, 768)).astype(np.float32)
    config = dataclasses.replace(golden_fixtures.config(("text",), ("text",)), inputs=(module,))
    model, params = EncoderDecoder(config), golden_fixtures.variables()["params"]

    def total(part):
        sequence = model.apply(
            {"params": {**params, "image_transformer": part}}, {"input": jnp.asarray(patches)},
            method=lambda self, fields: self.input_encoders["image"](fields))
        return jnp.sum(jnp.square(sequence.embeddings))

    gradients = flatten_names(jax.jit(jax.grad(total))(params["image_transformer"]))
    assert all(np.abs(array).max() > 0 for name, array in gradients.items()
               # Keys differ by what is alike for all of them, which softmax does not see.
               if not name.endswith("key/bias"))


def test_settings_of_a_shared_transformer_must_agree(history):
    other = dataclasses.replace(history, transformer=ImageTransformer(patch_dim=768))
    with pytest.raises(UserError, match="share the transformer 'image_transformer', but differ"):
        dataclasses.replace(golden_fixtures.config(("text",), ("text",)),
                            inputs=(golden_fixtures.INPUTS["image"], other))
    assert isinstance(golden_fixtures.config(("image", "image_history")), EncoderDecoderConfig)


@pytest.mark.parametrize("changes, match", [
    ({"frame_budget": 0}, "more than 0"), ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
    ({"mean": (0.5, 0.5, 0.5, 0.5, 0.5)}, "a number for each channel")])
def test_refuses(history, changes, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(history, **changes)


def test_patches_of_another_size_are_refused(history):
    with pytest.raises(UserError, match=r"\[rows, frames, patches, 768\]"):
        embed(history, {"input": np.zeros((1, 2, 9, 12), np.float32)})
    assert isinstance(history, HistoryInput)


def test_transformers_refuse_what_they_would_answer_wrongly():
    """More places than positions would share the last one; one block has no second."""
    audio = AudioInput(transformer=AudioTransformer(num_positions=512), grid=(64, 16))
    with pytest.raises(UserError, match="num_positions = 1024"):
        dataclasses.replace(golden_fixtures.config(("text",), ("text",)), inputs=(audio,))
    for build, why in ((lambda: ImageTransformer(num_layers=1), "at least 2"),
                       (lambda: AudioTransformer(num_layers=1), "at least 2"),
                       (lambda: ImageTransformer(position_grid=14), "rows, columns")):
        with pytest.raises(UserError, match=why):
            build()
