"""Scores of big vocabularies never hold all logits, and are those of all logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import small_model

from vishwam_t5x.evaluation import programs
from vishwam_t5x.evaluation.decoding_config import DecodingConfig
from vishwam_t5x.models import guidance
from vishwam_t5x.models.config import CodeOutput
from vishwam_t5x.objectives import chunked_loss

ROWS, TOKENS, VOCAB = 8, 64, 16512
ALL_LOGITS = 4 * ROWS * TOKENS * VOCAB


@pytest.fixture(scope="module")
def drawn():
    """A model with the original's table of codes, and grids to score."""
    text, image = small_model.model().config.targets
    module = small_model.model(targets=(text, dataclasses.replace(
        image, vocab_size=VOCAB, grid=(8, 8))))
    assert isinstance(module.config.targets[1], CodeOutput)
    rng = np.random.default_rng(0)
    codes = rng.integers(2, 16386, (ROWS, TOKENS)).astype(np.int32)
    mask = np.ones_like(codes)
    mask[1, 40:] = 0
    return module, small_model.params(module), {
        "inputs/text/tokens": rng.integers(3, 64, (ROWS, 4)).astype(np.int32),
        "targets/image/targets": codes, "targets/image/mask": np.ones_like(codes),
        "targets/image/inputs": np.pad(codes, ((0, 0), (1, 0)))[:, :-1],
        "targets/image/loss_mask": mask}


def test_all_logits_are_never_there(drawn):
    module, params, batch = drawn
    compiled = jax.jit(lambda params, batch: programs.score(module, params, batch, None)).lower(
        params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < ALL_LOGITS / 6
    sums, each = compiled(params, batch)["image"]
    log_probs = jax.nn.log_softmax(jax.jit(lambda: module.apply(
        {"params": params}, batch, method="logits"))()["image"])
    expected = np.take_along_axis(np.asarray(log_probs), batch["targets/image/targets"][..., None],
                                  -1)[..., 0] * batch["targets/image/loss_mask"]
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums, expected.sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("chunks", [1, 5])
def test_guided_and_constrained_scores_are_the_same_in_chunks(drawn, monkeypatch, chunks):
    """Without a division of the length, and so with padding."""
    module, params, batch = drawn
    monkeypatch.setattr(programs, "num_chunks_for", lambda *sizes: chunks)
    hidden = np.random.default_rng(1).normal(size=(4, 7, 16)).astype(np.float32)
    targets = batch["targets/image/targets"][:2, :7]

    def allowed(tokens, position):
        """Some tokens here, and what is as even or odd as what was written last."""
        last = jnp.take(tokens, jnp.maximum(position - 1, 0), axis=1)
        ids = jnp.arange(VOCAB)
        return (ids[None] % 2 == last[:, None] % 2) | (ids[None] % 3 == position % 3)

    how = programs.Writing("image", DecodingConfig(guidance=2.0, allowed=allowed), 7, None, allowed)
    found = jax.jit(lambda: programs._token_scores(
        module, params, "image", hidden, targets, how))()
    logits = guidance.guide(*guidance.pairs(module.apply(
        {"params": params}, hidden, "image", method="logits_of")), 2.0)
    assert 0 < np.isneginf(found).sum() < found.size
    for place in range(7):
        before = np.where(np.arange(7) < place, targets, 0)
        kept = jnp.where(allowed(before, place), logits[:, place], -jnp.inf)
        np.testing.assert_allclose(
            found[:, place], jax.nn.log_softmax(kept)[np.arange(2), targets[:, place]], rtol=1e-5)


def test_chunks_are_those_of_the_loss():
    assert chunked_loss.num_chunks_for(64, 1024, VOCAB, None, 1, "gpu", 1024) == 128
