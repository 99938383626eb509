"""gin/objectives/*.gin: they parse strictly, build, and make of an example what they promise."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from vishwam_t5x import gin_config
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers

# unified_io2.gin goes behind a model file: tests/planning/test_unified_io2_recipes.py has it.
FILES = sorted(path for path in (pathlib.Path(__file__).parents[2] / "gin" / "objectives").glob(
    "*.gin") if path.stem != "unified_io2")


def read_objective(objective: MixtureOfDenoisers) -> MixtureOfDenoisers:
    return objective


def build(path: pathlib.Path, *bindings: str) -> MixtureOfDenoisers:
    config = gin_config.parse(
        [f"--gin_file={path}", "--gin.read_objective.objective=%OBJECTIVE",
         *(f"--gin.{binding}" for binding in bindings)], "train", roots=[read_objective])
    return config.call(read_objective)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_builds_and_takes_supervised_examples(path):
    objective = build(path)
    clean = {"text_inputs": np.arange(5, 9), "text_targets": np.arange(20, 23)}
    example = objective.apply(clean, seed=0, example=0)
    assert example["inputs/text/tokens"].tolist() == [33_218, 5, 6, 7, 8, 1]
    assert example["targets/text/targets"].tolist() == [20, 21, 22, 1]
    plain = build(path, "MixtureOfDenoisers.mode_tokens=False")
    assert plain.apply(clean, seed=0, example=0)["inputs/text/tokens"].tolist() == [5, 6, 7, 8, 1]


def test_files():
    by_name = {path.stem: build(path) for path in FILES}
    assert set(by_name) == {"ul2_text", "mixture_of_denoisers", "supervised"}
    kinds = lambda name, lengths: {(d.modality, d.paradigm, d.mean_span, d.rate) for d in (
        by_name[name].choose(lengths, seed=0, example=i) for i in range(300))}
    ul2 = {("text", "R", 3.0, 0.15), ("text", "R", 8.0, 0.15), ("text", "S", 0.0, 0.25),
           ("text", "X", 3.0, 0.5), ("text", "X", 8.0, 0.5), ("text", "X", 64.0, 0.15),
           ("text", "X", 64.0, 0.5)}
    assert kinds("ul2_text", {"text": 512}) == ul2
    picture = {"text": 512, "image": 576, "image_codes": 1_024, "audio": 128}
    assert kinds("mixture_of_denoisers", picture) == ul2 | {
        ("image", "R", 0.0, 0.75), ("image", "S", 0.0, 1.0)}
    lengths = by_name["mixture_of_denoisers"].lengths(picture, seed=0, example=0)
    assert lengths.inputs["audio"] == 128
    with pytest.raises(UserError, match="supervised examples only"):
        kinds("supervised", {"text": 512})


def test_a_single_t5_objective_as_the_comment_says():
    path = next(path for path in FILES if path.stem == "ul2_text")
    objective = build(path, "MixtureOfDenoisers.text_weights={'R': 1.0}",
                      "MixtureOfDenoisers.text_r=((3.0, 0.15),)",
                      "MixtureOfDenoisers.mode_tokens=False")
    # T5: 512 tokens become 461 + EOS and 103 + EOS.
    assert objective.lengths({"text": 512}, seed=0, example=3) == ({"text": 462}, {"text": 104})
    with pytest.raises(UserError, match="mean span"):
        build(path, "MixtureOfDenoisers.text_r=((0.15, 3.0),)")


def test_augmentations_are_added_in_gin(tmp_path):
    path = tmp_path / "shifted.gin"
    path.write_text("""
        from __gin__ import dynamic_registration
        from vishwam_t5x.objectives import augmentation
        from vishwam_t5x.objectives import denoisers
        include 'gin/objectives/mixture_of_denoisers.gin'
        denoisers.MixtureOfDenoisers.image_shift = 1
        denoisers.MixtureOfDenoisers.image_augmentations = [@augmentation.RandomShift()]
        augmentation.RandomShift.pixels = 3
    """.replace("\n        ", "\n"))
    steps = build(path).augmentations
    assert [step.pixels for step in steps] == [1, 3]
