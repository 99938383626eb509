"""Images that a model reads as codes: what the objective makes of them, and what does not fit."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.source import DatasetConfig, batch_spec
from vishwam_t5x.models.config import (
    CodeInput,
    CodeOutput,
    EncoderDecoderConfig,
    PatchInput,
    TextInput,
    TextOutput,
)
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.vocabulary import VocabularyLayout, token_id
from vishwam_t5x.training.setup import check_modalities

LAYOUT = VocabularyLayout(100, 20, 0, 0)
OBJECTIVE = MixtureOfDenoisers(vocabulary=LAYOUT, input_modalities=("text", "image"),
                               image=PatchSpec(2, channels=1), code_inputs=("image",))
PIXELS = np.zeros((4, 4, 1), np.float32)
CODES = np.asarray([7, 0, 3, 7])


def test_codes_are_read_and_pixels_beside_them_are_not():
    clean = {"image_inputs": PIXELS, "image_input_codes": CODES, "text_targets": np.arange(5, 8)}
    example = OBJECTIVE.apply(clean, seed=0, example=0)
    assert set(example) == {"inputs/text/tokens", "inputs/image/tokens", "targets/text/targets"}
    assert example["inputs/image/tokens"].tolist() == [9, 2, 5, 9]
    sizes = {name: 4 if name.startswith("image") else 3 for name in clean}
    assert OBJECTIVE.lengths(sizes, seed=0, example=0).inputs == {"text": 2, "image": 4}


def test_frames_stay_patches_where_images_are_codes():
    roles = dataclasses.replace(
        OBJECTIVE, input_modalities=("text", "image", "image_history"))._plan(
        ("image_input_codes", "image_history_inputs", "image_history_input_patches",
         "text_targets"))[0]
    assert roles.patches == {"image_history": "image_history_input_patches"}
    assert roles.inputs["image"] == "image_input_codes"


def test_denoising_gives_codes_whole_or_writes_them():
    clean = {"image": PIXELS, "image_codes": CODES, "text": np.arange(5, 25)}
    sizes = {"image": 4, "image_codes": 4, "text": 20}
    drawn = set()
    for number in range(40):
        example = OBJECTIVE.apply(clean, seed=0, example=number)
        choice = OBJECTIVE.choose(sizes, seed=0, example=number)
        drawn.add((choice.modality, choice.paradigm))
        wanted = OBJECTIVE.lengths(sizes, seed=0, example=number)
        assert wanted.inputs == {key.split("/")[1]: len(value) for key, value in example.items()
                                 if key.endswith("/tokens")}
        if choice.modality == "image":
            assert example["targets/image/targets"].tolist() == [9, 2, 5, 9]
        else:
            assert example["inputs/image/tokens"].tolist() == [9, 2, 5, 9]
    assert {paradigm for modality, paradigm in drawn if modality == "image"} == {"S"}
    assert {modality for modality, _ in drawn} == {"text", "image"}


@pytest.mark.parametrize("names, changes, match", [
    (("image_inputs", "text_targets"), {}, "without 'image_input_codes'"),
    (("image_input_codes", "text_targets"), {"code_inputs": ()}, "reads no codes of image"),
    ((), {"code_inputs": ("pictures",)}, "code_inputs"), ((), {"code_inputs": "image"}, "a list")])
def test_refuses(names, changes, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(OBJECTIVE, **changes).lengths(dict.fromkeys(names, 4), seed=0,
                                                          example=0)


def model(image, offset=140):
    return EncoderDecoderConfig(
        emb_dim=8, num_heads=1, head_dim=8, mlp_dim=8, num_encoder_layers=0, num_decoder_layers=1,
        inputs=(TextInput(vocab_size=192), image),
        targets=(TextOutput(vocab_size=192), CodeOutput(
            modality="image", vocab_size=10, grid=(2, 2), in_table="text", offset=offset)))


def check(config, objective=OBJECTIVE):
    lengths = {"inputs": 16, "targets": 16}
    spec = batch_spec(DatasetConfig("any", batch_size=1, task_feature_lengths=lengths), objective)
    check_modalities(SimpleNamespace(config=config), objective, spec)
    return spec


def read_codes(offset=140):
    return CodeInput(modality="image", vocab_size=10, grid=(2, 2), in_table="text", offset=offset)


def test_the_model_must_read_what_the_objective_gives():
    objective = dataclasses.replace(OBJECTIVE, target_modalities=("text", "image"))
    patches = PatchInput(modality="image", patch_dim=4, grid=(2, 2))
    assert "inputs/image/tokens" in check(model(read_codes()), objective).arrays()
    with pytest.raises(UserError, match="reads the patches of modality 'image'"):
        check(model(patches), objective)
    as_patches = dataclasses.replace(objective, code_inputs=())
    assert isinstance(check(model(patches), as_patches), BatchSpec)
    with pytest.raises(UserError, match="reads the codes of modality 'image'"):
        check(model(read_codes()), as_patches)


def test_codes_and_text_do_not_have_the_same_rows():
    assert LAYOUT.size == 129
    with pytest.raises(UserError, match="that text has too") as error:
        check(model(read_codes(120), offset=120))
    assert "offset = 129" in error.value.fix


def test_a_placeholder_by_its_name():
    assert token_id(LAYOUT, "<image_input>") == LAYOUT.input_start == 120
    with pytest.raises(UserError, match="no such extra token") as error:
        token_id(LAYOUT, "<image_imput>")
    assert "<image_input>" in error.value.fix
