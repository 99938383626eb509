"""Five inputs and three outputs from clean examples to logits: several a row, and one a row."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from models import golden_fixtures, model_fixtures

from vishwam_t5x.core.batch import ROW_ORDER, BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.data.source import DatasetConfig, batch_spec
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import FrameSpec, PatchSpec
from vishwam_t5x.objectives.vocabulary import VocabularyLayout
from vishwam_t5x.training import setup

GREY = PatchSpec(16, channels=1)
OBJECTIVE = MixtureOfDenoisers(
    vocabulary=VocabularyLayout(200, num_sentinels=16, num_location_bins=0),
    input_modalities=ROW_ORDER, target_modalities=("text", "image", "audio"), audio=GREY,
    image_history=FrameSpec(PatchSpec(16), (3, 3), 4),
    audio_history=FrameSpec(GREY, (4, 2), 2))
SHAPES = {"image_inputs": (64, 64, 3), "image_history_inputs": (48, 48, 3),
          "audio_inputs": (64, 32), "audio_history_inputs": (64, 32)}
CODES = {"image_target_codes": (36, 64), "audio_target_codes": (32, 32)}
# Features of each example and how many frames its histories have.
EXAMPLES = (
    ({"text_inputs", "text_targets", *SHAPES, *CODES}, 2),
    ({"text_inputs", "audio_inputs", "audio_history_inputs", "text_targets"}, 3),
    ({"text_inputs", "image_history_inputs", "image_target_codes"}, 1),
    ({"text_inputs", "image_inputs", "audio_target_codes"}, 0),
    ({"text_inputs", "text_targets", "image_history_inputs", "image_inputs"}, 1))
ROWS = ((0, 3), (2, 1, 4))


def small() -> EncoderDecoder:
    """The model of the goldens with as few layers as can be."""
    config = golden_fixtures.config()

    def shallow(part, layers):
        return dataclasses.replace(part, num_layers=layers)

    inputs = [module if module.transformer is None else dataclasses.replace(
        module, transformer=shallow(module.transformer, 2),
        **({"resampler": shallow(module.resampler, 1)} if hasattr(module, "resampler") else {}))
        for module in config.inputs]
    return EncoderDecoder(dataclasses.replace(config, inputs=tuple(inputs), num_encoder_layers=1,
                                              num_decoder_layers=1))


def clean(number: int) -> dict[str, np.ndarray]:
    names, frames = EXAMPLES[number]
    rng = np.random.default_rng(number)
    found = {}
    for name in sorted(names):
        if name in CODES:
            found[name] = rng.integers(0, CODES[name][1], CODES[name][0]).astype(np.int32)
        elif name.startswith("text"):
            found[name] = rng.integers(3, 200, 3 + number).astype(np.int32)
        else:
            many = (frames,) if "history" in name else ()
            found[name] = rng.random((*many, *SHAPES[name]), np.float32)
    return found


def spec(rows: int, packed: bool) -> BatchSpec:
    # Frames come and go: of each row's four places for frames some stay empty.
    return batch_spec(DatasetConfig(
        "made up", {"inputs": 96, "targets": 112, "inputs/image": 32, "inputs/image_history": 16,
                    "inputs/audio": 16, "inputs/audio_history": 8}, rows, pack=packed), OBJECTIVE)


@functools.cache
def applied():
    model = small()
    variables = model_fixtures.draw_variables(model)
    return functools.partial(jax.jit(functools.partial(model.apply, method="logits")), variables)


def logits(rows: tuple[tuple[int, ...], ...], packed: bool):
    shapes = spec(len(rows), packed)
    placed = []
    for row, numbers in enumerate(rows):
        for number in numbers:
            example = OBJECTIVE.apply(clean(number), seed=0, example=number)
            placed.append(PlacedExample(row, example_lengths(example, shapes), example))
    batch = assemble(shapes, len(rows), placed)
    return applied()(batch), batch


# The layout of packed rows is compiled once for both; the other is another program.
@pytest.mark.parametrize("layout", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_several_examples_a_row_equal_one_a_row(layout):
    packed, batch = logits((*ROWS, (), (), ()), packed=True)
    alone, single = logits(tuple((number,) for row in ROWS for number in row), packed=layout)
    for modality in ("text", "image", "audio"):
        mask, expected = (arrays[f"targets/{modality}/loss_mask"] > 0 for arrays in (batch, single))
        assert mask.sum() == expected.sum() > 30 or modality == "text"
        # Both are in the order of rows, and of examples within them.
        np.testing.assert_array_equal(batch[f"targets/{modality}/targets"][mask],
                                      single[f"targets/{modality}/targets"][expected])
        np.testing.assert_allclose(np.asarray(packed[modality])[mask],
                                   np.asarray(alone[modality])[expected], atol=1e-5)
    assert batch["inputs/image_history/segment_ids"].tolist() == [
        [1, 1, 0, 0], [1, 3, 0, 0], *[[0] * 4] * 3]
    assert batch["inputs/audio_history/frame_ids"].tolist() == [
        [0, 1, 0, 0], [0, 1, 2, 0], *[[0] * 4] * 3]


def changed(**changes) -> MixtureOfDenoisers:
    return MixtureOfDenoisers(**{
        "vocabulary": OBJECTIVE.vocabulary, "input_modalities": ROW_ORDER,
        "audio": GREY, "image_history": OBJECTIVE.image_history,
        "audio_history": OBJECTIVE.audio_history, **changes})


@pytest.mark.parametrize("frames, why", [
    (FrameSpec(PatchSpec(16), (3, 3), 5), "latents of a frame"),
    (FrameSpec(PatchSpec(16), (3, 4), 4), "patches of a frame"),
    (FrameSpec(PatchSpec(16), (3, 3), 4, budget=1.5), "budget of frames"),
    (FrameSpec(PatchSpec(8), (3, 3), 4), "patches of modality 'image_history'")])
def test_model_and_objective_must_mean_the_same_by_a_frame(frames, why):
    mixture = changed(image_history=frames)
    model = EncoderDecoder(golden_fixtures.config())
    lengths = {"inputs": 100, "targets": 112, "inputs/image_history": 20}
    shapes = batch_spec(DatasetConfig("made up", lengths, 2), mixture)
    with pytest.raises(UserError, match=why):
        setup.check_modalities(model, mixture, shapes)
