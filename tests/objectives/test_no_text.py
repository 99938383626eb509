"""Examples shown without their text, for classifier-free guidance."""

from __future__ import annotations

import numpy as np
import pytest
from objectives.test_denoisers import VOCABULARY, make_clean, objective

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.vocabulary import EOS_ID


@pytest.mark.parametrize("names", [("text_inputs", "image_inputs", "image_target_codes"),
                                   ("text", "image_codes"), ("text", "image", "image_codes"),
                                   ("text_inputs", "text_targets", "image_target_codes")])
def test_some_images_are_generated_without_their_text(names):
    """A tenth, told by (seed, example) alone; the lengths know; never in an evaluation."""
    bare = objective(no_text_rates={"image": 0.1}, no_text={"image": (9, 8)}, text_weights={},
                     image_weights={"S": 1.0})
    clean, whole = make_clean(names, 4, text_length=5), objective(
        text_weights={}, image_weights={"S": 1.0})
    lengths = {name: len(array) if "codes" in name or "text" in name else 16
               for name, array in clean.items()}
    number, seen = 400, 0
    many = bare.lengths_many({name: np.full(number, size) for name, size in lengths.items()},
                             np.arange(number), seed=3)
    for i in range(number):
        example = bare.apply(clean, seed=3, example=i)
        usual = whole.apply(clean, seed=3, example=i)
        text, before = example["inputs/text/tokens"], usual["inputs/text/tokens"]
        promised = bare.lengths(lengths, seed=3, example=i)
        assert len(text) == promised.inputs["text"] == many.inputs["text"][i]
        assert promised in bare.possible_lengths(lengths)
        if text.tolist() == before.tolist():
            continue
        seen += 1
        assert text.tolist() == [VOCABULARY.prefix("image", "S"), 9, 8, EOS_ID]
        assert text.tolist() == bare.without_text(before, "image").tolist()
        assert all(np.array_equal(example[key], usual[key]) for key in usual
                   if key != "inputs/text/tokens")
    assert seen == 0 if "text_targets" in names else 20 < seen < 62
    judged = bare.without_augmentation()
    assert len({judged.apply(clean, seed=3, example=i)["inputs/text/tokens"].tobytes()
                for i in range(30)}) == 1


def test_what_restores_an_image_keeps_its_text():
    mixture = objective(no_text_rates={"image": 0.9}, image_weights={"R": 1.0}, text_weights={})
    clean = make_clean(("text", "image", "image_codes"), 4, text_length=5)
    assert {len(mixture.apply(clean, seed=3, example=i)["inputs/text/tokens"])
            for i in range(20)} == {7}


@pytest.mark.parametrize(("options", "match"), [
    ({"no_text_rates": {"image": 1.0}}, "is no share"),
    ({"no_text_rates": {"video": 0.1}}, "video"), ({"no_text": {"image": (1,)}}, "without the end"),
    ({"no_text": {"image": (VOCABULARY.prefix_start,)}}, "ids of text"),
    ({"no_text": {"image": "nothing"}}, "text_ids")])
def test_refuses_to_leave_out_text_in_other_ways(options, match):
    with pytest.raises(UserError, match=match):
        objective(**options)
