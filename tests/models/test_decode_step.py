"""One token at a time with a cache, against the whole sequence at once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import golden_fixtures, model_fixtures

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models import decoding
from vishwam_t5x.models.beam_search import beam_search, length_penalty
from vishwam_t5x.models.cache import DecodeCache

ALONE = tuple((number,) for number in range(len(model_fixtures.EXAMPLES)))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_equals_uncached(scan_layers):
    """Two decodes per example, of text and of image codes, with keys shared by query heads."""
    model, variables = model_fixtures.build(scan_layers=scan_layers, num_encoder_layers=1)
    batch, where = model_fixtures.lay_out(ALONE, with_index=False)
    whole = jax.jit(functools.partial(model.apply, method="logits"))(variables, batch)
    inputs = {key: array for key, array in batch.items() if key.startswith("inputs/")}
    encoded = jax.jit(functools.partial(model.apply, method="encode"))(variables, inputs)
    for modality, length in (("text", 6), ("image", 6)):
        cache = jax.jit(functools.partial(
            model.apply, max_length=length, num_decodes=2, method="init_cache"))(
                variables, encoded)
        assert isinstance(cache, DecodeCache) and cache.stacked == scan_layers
        assert (cache.max_length, cache.num_rows, cache.num_decodes) == (6, 10, 2)

        @jax.jit
        def step(tokens, cache, modality=modality):
            return model.apply(variables, tokens, cache, modality, method="decode_step")

        found = []
        for column in range(length):
            tokens = jnp.repeat(jnp.asarray(batch[f"targets/{modality}/inputs"][:, column]), 2)
            logits, cache = step(tokens, cache)
            found.append(logits)
        found = np.stack(found, axis=1)
        assert int(cache.index) == length
        compared = 0
        for (example, name), (row, slots) in where.items():
            if name == modality:
                for decode in (2 * example, 2 * example + 1):
                    np.testing.assert_allclose(found[decode, slots], whole[name][row, slots],
                                               atol=1e-5)
                compared += 1
        assert compared == {"text": 4, "image": 2}[modality]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_reordered_rows_go_on_from_their_parent(scan_layers):
    model, variables = model_fixtures.build(scan_layers=scan_layers, num_encoder_layers=1,
                                            **model_fixtures.TEXT_ONLY)
    inputs = {"inputs/text/tokens": np.asarray([[3, 4, 5], [6, 7, 0]], np.int32)}

    @jax.jit
    def last_logits(first, rows, second):
        encoded = model.apply(variables, inputs, method="encode")
        cache = model.apply(variables, encoded, 3, 2, method="init_cache")
        for tokens in (jnp.zeros(4, jnp.int32), first):
            _, cache = model.apply(variables, tokens, cache, "text", method="decode_step")
        return model.apply(variables, second, cache.reorder(rows), "text",
                           method="decode_step")[0]

    first, second = jnp.asarray([10, 20, 30, 40]), jnp.asarray([5, 6, 7, 8])
    rows = jnp.asarray([1, 1, 3, 2])
    moved = last_logits(first, rows, second)
    straight = last_logits(first[rows], jnp.arange(4), second)
    np.testing.assert_allclose(moved, straight, atol=1e-6)
    assert np.abs(moved - last_logits(first, jnp.arange(4), second)).max() > 1e-3


@pytest.fixture(scope="module")
def text_model():
    return model_fixtures.build(num_encoder_layers=1, num_decoder_layers=1,
                                **model_fixtures.TEXT_ONLY)


@functools.cache
def text_logits(model):
    return jax.jit(functools.partial(model.apply, method="logits"))


def sequence_score(model, variables, inputs, tokens):
    """Log-probability of one sequence up to and with its end, by the uncached model."""
    length = int(np.argmax(tokens == 1)) + 1 if (tokens == 1).any() else len(tokens)
    shifted = np.concatenate([[0], tokens[:-1]]).astype(np.int32)
    batch = {"inputs/text/tokens": inputs[None], "targets/text/inputs": shifted[None],
             "targets/text/mask": np.ones((1, len(tokens)), np.int32)}
    logits = text_logits(model)(variables, batch)["text"][0]
    steps = jax.nn.log_softmax(logits)[np.arange(len(tokens)), tokens]
    return float(steps[:length].sum()), length


def decode(model, variables, inputs, modality, length, method, num_decodes, **settings):
    """Decodes with the model's own cache, as an evaluator does."""
    encoded = model.apply(variables, inputs, method="encode")
    cache = model.apply(variables, encoded, length, num_decodes, method="init_cache")

    def step(tokens, cache):
        return model.apply(variables, tokens, cache, modality, method="decode_step")

    settings |= {"batch_size": encoded.hidden.shape[0], "max_length": length}
    if method == "beam":
        return beam_search(step, cache, DecodeCache.reorder, num_beams=num_decodes, **settings)
    return decoding.sample(step, cache, jax.random.key(0), num_decodes=num_decodes, **settings)


@pytest.mark.parametrize("method, num_decodes, settings", [
    ("sample", 1, {"temperature": 0.0}),
    ("sample", 3, {"temperature": 0.7, "top_k": 10, "top_p": 0.9}), ("beam", 3, {"alpha": 0.8})])
def test_scores_are_true_log_probabilities(text_model, method, num_decodes, settings):
    model, variables = text_model
    tokens = np.asarray([[3, 4, 5, 6], [7, 8, 0, 0]], np.int32)
    decoded = jax.jit(lambda variables: decode(
        model, variables, {"inputs/text/tokens": tokens}, "text", 5, method, num_decodes,
        **settings))(variables)
    assert decoded.tokens.shape == (2, num_decodes, 5)
    assert (np.diff(decoded.scores, axis=1) >= 0).all()
    for example in range(2):
        best = np.asarray(decoded.best[example])
        score, length = sequence_score(model, variables, tokens[example], best)
        if method == "beam" and (best == 1).any():
            score /= length_penalty(length, settings["alpha"])
        np.testing.assert_allclose(decoded.scores[example, -1], score, rtol=1e-4)


def test_a_grid_is_decoded_whole():
    model, variables = model_fixtures.build(num_encoder_layers=1, num_decoder_layers=1)
    inputs = {"inputs/text/tokens": np.asarray([[3, 4]], np.int32)}
    decoded = jax.jit(lambda: decode(
        model, variables, inputs, "image", 6, "sample", 4, temperature=5.0, eos_id=None,
        logits_hook=lambda logits, _: logits.at[:, :2].set(-jnp.inf)))()
    assert decoded.tokens.shape == (1, 4, 6)
    assert decoded.tokens.min() >= 2 and np.isfinite(decoded.scores).all()
    with pytest.raises(UserError, match="unknown target modality"):
        decode(model, variables, inputs, "audio", 6, "sample", 1)


@pytest.mark.parametrize("masks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cached_grids_of_the_golden_model_equal_uncached(masks):
    """Codes of an image, and of a sound whose angles are those of another grid than its layout;
    with the patterns and the dynamic mask of the paper, and without. Nothing is hidden from an
    encoder that only reads what is to be drawn."""
    targets = tuple(dataclasses.replace(golden_fixtures.TARGETS[name], pattern_mask=masks,
                                        dynamic_mask=masks) for name in ("image", "audio"))
    assert targets[1].grid != targets[1].layout
    config = golden_fixtures.config(("text",), targets)
    model = model_fixtures.EncoderDecoder(config)
    variables = golden_fixtures.variables("input_encoders_i", "input_encoders_a", "input_image",
                                          "input_audio", "vision", "target_encoders_text")
    rng = np.random.default_rng(0)
    batch = {"inputs/text/tokens": np.asarray([[3, 4, 5], [6, 7, 8]], np.int32)}
    for target in targets:
        batch |= golden_fixtures.target(
            target.modality, rng.integers(*target.token_range, (2, target.num_tokens)).astype(
                np.int32), np.ones((2, target.num_tokens), np.int32))
    whole = jax.jit(functools.partial(model.apply, method="logits"))(variables, batch)

    @jax.jit
    def by_token(variables):
        encoded = model.apply(variables, {"inputs/text/tokens": batch["inputs/text/tokens"]},
                              method="encode")
        found = {}
        for target in targets:
            def step(cache, tokens, modality=target.modality):
                logits, cache = model.apply(variables, tokens, cache, modality,
                                            method="decode_step")
                return cache, logits

            cache = model.apply(variables, encoded, target.num_tokens, method="init_cache")
            found[target.modality] = jax.lax.scan(
                step, cache, jnp.asarray(batch[f"targets/{target.modality}/inputs"].T))[1]
        return found

    for modality, logits in by_token(variables).items():
        np.testing.assert_allclose(logits.swapaxes(0, 1), whole[modality], atol=1e-5)
