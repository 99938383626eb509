"""Guided decoding draws from (1 + a) log p(token | text) - a log p(token | no text)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from models.test_decoding import all_sequences, keep_cache, markov

from vishwam_t5x.models import decoding, guidance
from vishwam_t5x.models.beam_search import beam_search

SCALE = 0.5


def guided_chain(batch, decodes):
    """A step function of chains guided away from others, and the table of logits it stands for."""
    step, cache, table = markov(3, 2 * batch, decodes)
    with_text, without = jax.nn.log_softmax(table[0::2]), jax.nn.log_softmax(table[1::2])
    return (guidance.guided(step, SCALE, decodes), cache,
            (1 + SCALE) * with_text - SCALE * without)


def test_samples_have_the_guided_probabilities():
    draws = 6_000
    step, cache, table = guided_chain(2, draws)
    found = jax.jit(lambda: decoding.sample(
        step, cache, jax.random.key(0), batch_size=2, max_length=2, num_decodes=draws))()
    for example in range(2):
        ended, cut = all_sequences(table, example, 2)
        likely = {tokens: score for tokens, score in (ended | cut).items() if score > np.log(0.02)}
        assert len(likely) >= 3
        drawn = np.asarray(found.tokens[example])
        for tokens, score in likely.items():
            same = (drawn == [*tokens, 0][:2]).all(axis=1)
            np.testing.assert_allclose(same.mean(), np.exp(score), atol=0.02)
            np.testing.assert_allclose(np.asarray(found.scores[example])[same], score, rtol=1e-4)


def test_beams_go_on_from_their_own_pair_of_rows():
    batch, beams, length = 3, 27, 4
    step, cache, table = guided_chain(batch, beams)
    # What a row has decoded so far, so that a row that is moved elsewhere is found out.
    history = jnp.zeros((2 * batch * beams, length), jnp.int32)

    def remembering(tokens, cache):
        known, history = cache
        paired = jnp.repeat(tokens.reshape(batch, 1, beams), 2, axis=1).reshape(-1)
        history = history.at[:, known[1]].set(paired)
        logits, known = step(tokens, known)
        # Every row must have read the very tokens that its pair has.
        agree = (history.reshape(batch, 2, beams, -1)[:, 0] == history.reshape(
            batch, 2, beams, -1)[:, 1]).all(-1).reshape(-1, 1)
        return jnp.where(agree, logits, jnp.nan), (known, history)

    def reorder(cache, rows):
        moved = guidance.paired_rows(rows, beams)
        return keep_cache(cache[0], moved), cache[1][moved]

    found = jax.jit(lambda: beam_search(
        remembering, (cache, history), reorder, batch_size=batch, max_length=length,
        num_beams=beams, alpha=0.0))()
    for example in range(batch):
        ended, _ = all_sequences(table, example, length)
        tokens, score = max(ended.items(), key=lambda item: item[1])
        assert tuple(np.asarray(found.tokens[example, -1]))[:len(tokens)] == tokens
        np.testing.assert_allclose(found.scores[example, -1], score, rtol=1e-4)
