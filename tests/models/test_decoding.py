"""Decoding as pure functions of a step function: against exhaustive search and frequencies."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models import decoding
from vishwam_t5x.models.beam_search import beam_search, length_penalty

VOCAB, EOS = 5, 1


def markov(seed: int, batch: int, decodes: int, eos_bias: float = 0.0):
    """Step function of a chain whose table depends on the example and on how many tokens came.

    The cache holds the example of each row and the position.
    """
    table = np.random.default_rng(seed).normal(size=(batch, 8, VOCAB, VOCAB)) * 2
    table[..., 0] = -1e4  # the padding token is never predicted
    table[..., EOS] += eos_bias
    table = jnp.asarray(table, jnp.float32)

    def step(tokens, cache):
        example, position = cache
        return table[example, position, tokens], (example, position + 1)

    return step, (jnp.repeat(jnp.arange(batch), decodes), jnp.zeros((), jnp.int32)), table


def keep_cache(cache, rows):
    return cache[0][rows], cache[1]


def all_sequences(table, example, length):
    """{tokens: log-probability} of every sequence that ends within `length`, and of those cut."""
    log_probs = np.asarray(jax.nn.log_softmax(table[example]))
    ended, cut = {}, {}
    for size in range(1, length + 1):
        for body in itertools.product((2, 3, 4), repeat=size - 1):
            for last in (EOS, 2, 3, 4) if size == length else (EOS,):
                tokens = (*body, last)
                score = sum(log_probs[i, before, token] for i, (before, token) in
                            enumerate(zip((0, *tokens[:-1]), tokens, strict=True)))
                (ended if last == EOS else cut)[tokens] = score
    return ended, cut


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_wide_beam_search_is_exhaustive(alpha):
    batch, length, beams = 3, 4, 27  # as many beams as prefixes: nothing can be pruned away
    step, cache, table = markov(0, batch, beams)
    found = jax.jit(lambda: beam_search(
        step, cache, keep_cache, batch_size=batch, max_length=length, num_beams=beams,
        alpha=alpha))()
    assert (np.diff(found.scores, axis=1) >= 0).all()
    for example in range(batch):
        ended, _ = all_sequences(table, example, length)
        ranked = sorted(((score / length_penalty(len(tokens), alpha), tokens)
                         for tokens, score in ended.items()), reverse=True)[:5]
        for place, (score, tokens) in enumerate(ranked, start=1):
            got = np.asarray(found.tokens[example, -place])
            assert tuple(got[:len(tokens)]) == tokens and (got[len(tokens):] == 0).all()
            np.testing.assert_allclose(found.scores[example, -place], score, rtol=1e-4)


def test_beam_search_without_an_end_returns_what_grew():
    step, cache, table = markov(1, 2, 9, eos_bias=-np.inf)
    found = beam_search(step, cache, keep_cache, batch_size=2, max_length=3, num_beams=9)
    for example in range(2):
        _, cut = all_sequences(table, example, 3)
        tokens, score = max(cut.items(), key=lambda item: item[1])
        assert tuple(np.asarray(found.tokens[example, -1])) == tokens
        np.testing.assert_allclose(found.scores[example, -1], score, rtol=1e-4)


def test_greedy_takes_the_most_probable_token_and_reports_its_score():
    step, cache, table = markov(2, 6, 1)
    found = jax.jit(lambda: decoding.greedy(step, cache, batch_size=6, max_length=6))()
    log_probs = np.asarray(jax.nn.log_softmax(table))
    ends = 0
    for example in range(6):
        last, score = 0, 0.0
        for position, token in enumerate(np.asarray(found.tokens[example, 0])):
            if last == EOS:
                assert token == 0
                continue
            assert token == log_probs[example, position, last].argmax()
            score += log_probs[example, position, last, token]
            last = token
            ends += token == EOS
        np.testing.assert_allclose(found.scores[example, 0], score, rtol=1e-4)
    assert 0 < ends < 6  # both kinds occurred


def test_sampling_draws_with_the_probabilities_asked_for():
    draws = 4000
    step, cache, table = markov(3, 1, draws)
    for settings in ({}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.6, "temperature": 1.5}):
        found = decoding.sample(step, cache, jax.random.key(4), batch_size=1, max_length=1,
                                num_decodes=draws, **settings)
        logits = np.asarray(table[0, 0, 0]) / settings.get("temperature", 1.0)
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        order = np.argsort(-probs)
        kept = order[:settings.get("top_k", VOCAB)]
        if "top_p" in settings:
            before = np.cumsum(probs[order]) - probs[order]
            kept = order[before < settings["top_p"]]
            assert 1 <= len(kept) < VOCAB - 1
        expected = np.zeros(VOCAB)
        expected[kept] = probs[kept] / probs[kept].sum()
        share = np.bincount(np.asarray(found.tokens).ravel(), minlength=VOCAB) / draws
        np.testing.assert_allclose(share, expected, atol=0.03)
        assert (share[expected == 0] == 0).all()


def test_sampling_is_a_function_of_the_key():
    step, cache, _ = markov(5, 4, 2)

    def tokens(seed):
        return np.asarray(decoding.sample(step, cache, jax.random.key(seed), batch_size=4,
                                          max_length=6, num_decodes=2).tokens)

    np.testing.assert_array_equal(tokens(0), tokens(0))
    assert (tokens(0) != tokens(1)).any()


def test_decoding_stops_when_all_have_ended():
    steps = []

    def step(tokens, cache):
        jax.debug.callback(lambda: steps.append(1))
        return jnp.zeros((2, VOCAB)).at[:, EOS].set(9.0), cache

    decoding.greedy(step, (), batch_size=2, max_length=50)
    jax.effects_barrier()
    assert len(steps) == 1
    found = decoding.greedy(step, (), batch_size=2, max_length=50, eos_id=None)
    jax.effects_barrier()
    assert len(steps) == 51 and (found.tokens == EOS).all()


def test_prompt_is_kept_and_scored():
    step, cache, table = markov(6, 2, 3)
    prompt = jnp.asarray([[3, 4], [2, 0]])
    found = decoding.sample(step, cache, jax.random.key(0), batch_size=2, max_length=4,
                            num_decodes=3, prompt=prompt)
    assert (found.tokens[0, :, :2] == jnp.asarray([3, 4])).all()
    assert (found.tokens[1, :, 0] == 2).all()
    log_probs = np.asarray(jax.nn.log_softmax(table))
    for example, decode in itertools.product(range(2), range(3)):
        last, score = 0, 0.0
        for position, token in enumerate(np.asarray(found.tokens[example, decode])):
            score += 0 if last == EOS else log_probs[example, position, last, token]
            last = EOS if last == EOS else token
        np.testing.assert_allclose(found.scores[example, decode], score, rtol=1e-4)


def test_hook_forbids_tokens():
    step, cache, _ = markov(7, 3, 1)
    found = decoding.greedy(step, cache, batch_size=3, max_length=4, eos_id=None,
                            logits_hook=lambda logits, _: logits.at[:, :3].set(-jnp.inf))
    assert (found.tokens >= 3).all() and np.isfinite(found.scores).all()


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0},
                                      {"num_decodes": 0}, {"max_length": 0}])
def test_settings_out_of_range(settings):
    step, cache, _ = markov(8, 1, 1)
    values = {"batch_size": 1, "max_length": 3, **settings}
    with pytest.raises(UserError, match=next(iter(settings))):
        decoding.sample(step, cache, jax.random.key(0), **values)
