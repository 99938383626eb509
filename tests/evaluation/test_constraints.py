"""What may be written is all that is written, however it is searched for; or it is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_decoding import EOS, VOCAB, keep_cache, markov

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.constraints import (
    AllowedAnswers,
    AllowedTokens,
    Written,
    locations,
    mask_of,
)
from vishwam_t5x.evaluation.decoding_config import DecodingConfig
from vishwam_t5x.models import decoding
from vishwam_t5x.models.beam_search import NEVER, beam_search
from vishwam_t5x.objectives.vocabulary import VocabularyLayout

LENGTH = 4
IDS = {"a": 2, "b": 3, "c": 4}


def encode(text: str) -> np.ndarray:
    return np.asarray([IDS.get(letter, 2 if letter == "?" else 90) for letter in text], np.int32)


WRITTEN = Written("text", VOCAB, LENGTH, True, encode)
ANSWERS = ("b", "bb", "bc", "ccb")


def restricted(table, example, prefix, allowed):
    """Log-probabilities of the next token among the allowed ones."""
    logits = np.asarray(table)[example, len(prefix), (0, *prefix)[-1]].astype(np.float64)
    kept = np.full_like(logits, -np.inf)
    kept[sorted(allowed)] = logits[sorted(allowed)]
    return kept - np.logaddexp.reduce(kept)


def answer_scores(table, example, answers):
    """{tokens with their end: log-probability} of answers, by the tree that they form."""
    ids = [(*encode(answer).tolist(), EOS) for answer in answers]
    scores = {}
    for tokens in ids:
        scores[tokens] = sum(
            restricted(table, example, tokens[:place], {
                other[place] for other in ids if other[:place] == tokens[:place]
                and len(other) > place})[tokens[place]] for place in range(len(tokens)))
    return scores


@pytest.mark.parametrize("method", [
    "greedy", pytest.param("sample", marks=pytest.mark.slow), "beam"])
def test_only_answers_are_written(method):
    batch, decodes = 3, 6
    step, cache, table = markov(5, batch, 1 if method == "greedy" else decodes)
    shared = {"batch_size": batch, "max_length": LENGTH,
              "allowed": mask_of(AllowedAnswers(ANSWERS), WRITTEN)}
    if method == "greedy":
        found = jax.jit(lambda: decoding.greedy(step, cache, **shared))()
    elif method == "sample":
        found = jax.jit(lambda: decoding.sample(
            step, cache, jax.random.key(1), num_decodes=decodes, temperature=3.0, top_k=2,
            **shared))()
    else:
        found = jax.jit(lambda: beam_search(step, cache, keep_cache, num_beams=decodes, alpha=0.0,
                                            **shared))()
    for example in range(batch):
        scores = answer_scores(table, example, ANSWERS)
        written = [(tuple(row[:list(row).index(EOS) + 1].tolist()), float(score))
                   for row, score in zip(np.asarray(found.tokens[example]),
                                         found.scores[example], strict=True)
                   if score > NEVER / 2]
        for tokens, score in written:
            np.testing.assert_allclose(score, scores[tokens], rtol=1e-4)
        if method == "beam":  # and all of them, the other beams left out
            assert sorted(scores.items(), key=lambda item: item[1]) == [
                (tokens, pytest.approx(score, rel=1e-4)) for tokens, score in written]
        else:
            assert len(written) == found.tokens.shape[1]


def test_exactly_so_many_of_some_tokens():
    layout = VocabularyLayout(base_size=3, num_sentinels=1, num_location_bins=2, num_history=0)
    assert list(locations(layout, 2).tokens) == [3, 4]  # the bins of the chain's vocabulary
    step, cache, _ = markov(7, 2, 8)
    found = jax.jit(lambda: decoding.sample(
        step, cache, jax.random.key(0), batch_size=2, max_length=LENGTH, num_decodes=8,
        allowed=mask_of(locations(layout, 2), WRITTEN)))()
    tokens = np.asarray(found.tokens).reshape(-1, LENGTH)
    assert np.isin(tokens[:, :2], (3, 4)).all() and (tokens[:, 2] == EOS).all()
    free = mask_of(AllowedTokens((4,)), WRITTEN)(jnp.zeros((1, LENGTH), jnp.int32), jnp.int32(3))
    assert np.flatnonzero(free[0]).tolist() == [EOS, 4]


def test_a_function_of_ones_own():
    """No token twice in a row; where it leaves nothing the score says so."""
    def no_repeat(tokens, position):
        last = jnp.take(tokens, position - 1, axis=1)
        return (jnp.arange(VOCAB) != last[:, None]) & (jnp.arange(VOCAB) > 1)

    step, cache, _ = markov(2, 2, 4)
    found = jax.jit(lambda: decoding.sample(
        step, cache, jax.random.key(0), batch_size=2, max_length=LENGTH, num_decodes=4,
        allowed=mask_of(no_repeat, WRITTEN)))()
    tokens = np.asarray(found.tokens)
    assert (tokens[..., 1:] != tokens[..., :-1]).all() and np.isfinite(found.scores).all()
    nothing = mask_of(lambda tokens, position: jnp.zeros(VOCAB, bool) | (position < 2), WRITTEN)
    row, position = jnp.zeros((1, LENGTH), jnp.int32), jnp.int32(2)
    assert (decoding.next_log_probs(jnp.ones((1, VOCAB)), row, position, None, nothing)
            == -jnp.inf).all(), "and it is no NaN"


@pytest.mark.parametrize(("constraint", "match"), [
    (AllowedTokens(()), "allows no token"), (AllowedTokens((9,)), "not in the table of text"),
    (AllowedTokens((1,)), "not in the table"), (AllowedTokens((2,), 2, 1), "no number of tokens"),
    (AllowedTokens((2,), 4, 4), "4 tokens and an end have no room"),
    (AllowedAnswers(()), "must be a list"), (AllowedAnswers("yes"), "must be a list"),
    (AllowedAnswers(("b", "")), "cannot be written: ''"),
    (AllowedAnswers(("bbbb",)), "4 tokens and an end, at most 4"),
    (AllowedAnswers(("?",)), "no piece"), (AllowedAnswers(("z",)), "of a table of 5")])
def test_what_cannot_be_written_is_refused(constraint, match):
    with pytest.raises(UserError) as error:
        mask_of(constraint, WRITTEN)
    assert match in f"{error.value.problem} {error.value.got}"


def test_what_is_no_constraint_is_refused():
    with pytest.raises(UserError, match="no vocabulary"):
        mask_of(AllowedAnswers(("b",)), Written("text", VOCAB, LENGTH, True))
    with pytest.raises(UserError, match="written whole"):
        mask_of(AllowedTokens((2,), 1), Written("image", VOCAB, LENGTH, False))
    with pytest.raises(UserError, match="as a bool"):
        mask_of(lambda tokens, position: jnp.ones(3), WRITTEN)(jnp.zeros((1, 2)), 0)
    for allowed in ("yes", AllowedAnswers):  # a class: gin without its brackets
        with pytest.raises(UserError, match="nothing that allows"):
            DecodingConfig(allowed=allowed)
    with pytest.raises(UserError, match="prompt"):
        DecodingConfig(allowed=AllowedTokens((2,)), prompt_with_targets=True)
    with pytest.raises(UserError, match="must not be negative"):
        DecodingConfig(guidance=-1.0)
