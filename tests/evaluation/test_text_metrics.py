"""Exact match, and the unigram loss, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.metrics.text import exact_match, unigram_loss, words_right


def test_exact_match_counts():
    assert exact_match(["a", "b", "c"], ["a", "B", "c"]) == {"exact_match": pytest.approx(2 / 3)}


def test_right_words_count_at_their_place():
    assert words_right(["the cat sat", "on it"], ["the dog sat there", "on"]) == {
        "words_right": pytest.approx(3 / 5)}
    assert words_right(["a b"], ["b"]) == {"words_right": 0.0}
    for targets, predictions in (([], []), (["a"], []), ([" "], ["a"])):
        with pytest.raises(UserError, match="words_right needs"):
            words_right(targets, predictions)


def test_unigram_loss_by_hand():
    # Counts 3, 1, 0, 0 -> smoothed 4/8, 2/8, 1/8, 1/8.
    loss = unigram_loss([np.array([0, 0]), np.array([[0], [1]])], np.array([0, 1, 3]), 4)
    assert loss == pytest.approx((math.log(2) + math.log(4) + math.log(8)) / 3)


def test_unigram_loss_of_its_own_text_is_near_the_entropy():
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    tokens = np.random.default_rng(0).choice(4, 100_000, p=probabilities)
    entropy = -(probabilities * np.log(probabilities)).sum()
    assert unigram_loss(tokens, tokens, 4) == pytest.approx(entropy, abs=0.01)


def test_nothing_seen_is_uniform():
    assert unigram_loss([], np.array([5]), 100) == pytest.approx(math.log(100))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="leave the vocabulary"):
        unigram_loss(np.array([0, 4]), np.array([0]), 4)
    with pytest.raises(UserError, match="at least one test token"):
        unigram_loss(np.array([0]), [], 4)
    with pytest.raises(UserError, match="as many predictions"):
        exact_match(["a"], [])
