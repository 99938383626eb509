"""Prompts: every family asks about its fields in several ways; boxes are location tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import pictures, prompts
from vishwam_t5x.objectives.vocabulary import VocabularyLayout

BOX = np.asarray([0.0, 0.25, 0.5, 1.0])
VALUES = {"caption": "a red cat", "question": "how many?", "answer": "two", "expression": "the cup",
          "transcript": "seven", "instruction": "Sort these.", "input": "b a", "output": "a b",
          "box": BOX, "frames": 2}


@pytest.mark.parametrize("name", prompts.FAMILIES)
def test_every_family_has_phrasings_that_hold_all_it_is_asked(name):
    family, layout = prompts.family(name), VocabularyLayout()
    asked = {prompts.ask(name, VALUES, np.random.default_rng(seed)) for seed in range(40)}
    assert len(asked) == len(family.phrasings) >= 4
    for text, answer in asked:
        assert "{" not in text and (answer is None) == (family.answer is None)
        whole = f"{text} {answer}"
        for field in family.fields:
            if field not in ("box", "frames"):
                assert VALUES[field] in whole
        for token in re.findall(r"<[^>]*>", whole):
            assert token in layout.special_ids, "the vocabulary must know it"


def test_boxes_are_the_bins_that_the_vocabulary_has():
    layout = VocabularyLayout()
    tokens = prompts.box_tokens(BOX).split()
    assert [layout.special_ids[token] for token in tokens] == [
        layout.location(share) for share in BOX]
    assert tokens[0] == "<extra_id_200>" and tokens[3] == "<extra_id_1199>"
    for bad in ([0, 0, 1], [0, 0, 1.1, 1], [0.5, 0, 0.5, 1], [0, 0, np.nan, 1]):
        with pytest.raises(UserError, match="box"):
            prompts.box_tokens(np.asarray(bad))


def test_a_box_goes_where_its_picture_goes():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[10:, 20:] = 255
    found = pictures.place(pixels, pictures.PictureConfig(80, 80)).pixels[..., 0] > 127
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    box = prompts.placed_box(np.asarray([10, 20, 30, 40]), (20, 40), (80, 80)) * 80
    np.testing.assert_allclose(box, [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], atol=1)


def test_inpainting_shows_the_patches_outside_the_box():
    np.testing.assert_array_equal(
        prompts.patches_outside(np.asarray([0, 0.5, 0.5, 1]), (2, 2)), [0, 2, 3])
    for box in ([0, 0, 1, 1], [0, 0, 0.1, 0.1]):
        with pytest.raises(UserError, match="all or none"):
            prompts.patches_outside(np.asarray(box), (2, 2))


def test_what_is_missing_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="has no 'answer'"):
        prompts.ask("question", {"question": "why?"}, rng)
    with pytest.raises(UserError, match="caption is empty"):
        prompts.ask("captioning", {"caption": "  "}, rng)
    with pytest.raises(UserError, match="no frames"):
        prompts.ask("video_captioning", {"caption": "x", "frames": 0}, rng)
    with pytest.raises(UserError, match="captioning"):
        prompts.ask("captionning", {}, rng)
    for seed in range(12):
        asked, _ = prompts.ask("instruction", {**VALUES, "input": ""}, np.random.default_rng(seed))
        assert not asked.endswith(("Given:", " ")) and not asked.startswith(" ")


def test_lines_and_columns_of_a_text_are_kept():
    code = "def f(x):\n    return x"
    for seed in range(12):
        asked, _ = prompts.ask("instruction", {**VALUES, "input": f" {code}\n"},
                               np.random.default_rng(seed))
        assert code in asked and asked == asked.strip()
