"""The generator on T5X's model: its numbers, and that it does no work that is not needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import t5_fixtures as t5

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.generator import DecodingConfig, Generator
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.parallelism.mesh import make_mesh

ROWS = 4
RAN = {"encode": 0, "decode_step": 0}


class Counting(EncoderDecoder):
    """Counts how often the encoder and a step of the decoder are run, not traced."""

    def encode(self, *args, **kwargs):
        jax.debug.callback(lambda: RAN.update(encode=RAN["encode"] + 1))
        return super().encode(*args, **kwargs)

    def decode_step(self, *args, **kwargs):
        jax.debug.callback(lambda: RAN.update(decode_step=RAN["decode_step"] + 1))
        return super().decode_step(*args, **kwargs)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, t5.variables("params_trained")["params"])


def generator(max_length=24, batch_size=ROWS, **decoding):
    return Generator(Counting(t5.config()), make_mesh(), None, batch_size,
                     {"text": DecodingConfig(**decoding)}, max_length, {"text": 48})


def unpadded(row):
    return row[:np.flatnonzero(row)[-1] + 1]


def requests(targets=False, prompts=False):
    batch = t5.arrays("decode_batch")
    prompted = t5.arrays("decode_prompt_batch")["decoder_input_tokens"][:, 1:]
    for row in range(ROWS):
        inputs = {"inputs/text/tokens": unpadded(batch["encoder_input_tokens"][row])}
        written = batch["decoder_target_tokens"][row] if targets else prompted[row]
        yield Request(inputs, {"targets/text/targets": unpadded(written)}
                      if targets or prompts else {}, row)


def test_scores_are_those_of_t5x(params):
    found = {done.tag: done for done in generator().score(params, requests(targets=True))}
    golden = t5.numbers()["score_batch_trained"]
    np.testing.assert_allclose([found[row].scores["text"] for row in range(ROWS)], golden,
                               rtol=1e-5)
    for row, request in enumerate(requests(targets=True)):
        each = found[row].token_scores["text"]
        assert len(each) == len(request.targets["targets/text/targets"])
        assert each.sum() == pytest.approx(golden[row], rel=1e-5)


@pytest.mark.parametrize("decoding", [{}, {"method": "beam", "num_decodes": 4}])
def test_the_encoder_runs_once_and_decoding_ends_with_the_last_row(params, decoding):
    RAN.update(encode=0, decode_step=0)
    writer = generator(max_length=200, **decoding)
    one_shape = [one for one in requests() if len(one.inputs["inputs/text/tokens"]) <= 16]
    assert len(one_shape) > 1
    found = list(writer.generate(params, one_shape, "text"))
    jax.effects_barrier()
    longest = max(len(tokens) for done in found for tokens, _ in done.decodes["text"]) + 1
    assert RAN["encode"] == 1
    if not decoding:
        assert RAN["decode_step"] == longest < 60
    else:  # beams that grow on may not win any more: T5X's bound on that is loose
        assert longest <= RAN["decode_step"] < 200
    list(writer.generate(params, one_shape, "text"))
    assert writer.num_compiles == 1


def test_prompts_are_those_of_t5x(params):
    found = {done.tag: done.whole["text"] for done in generator(prompt_with_targets=True).generate(
        params, requests(prompts=True), "text")}
    for row, tokens in enumerate(t5.arrays("decodes")["prompted_greedy/decodes"][:, 0]):
        np.testing.assert_array_equal(found[row], unpadded(tokens))
    with pytest.raises(UserError, match="no room"):
        list(generator(max_length=2, prompt_with_targets=True).generate(
            params, requests(targets=True), "text"))
    with pytest.raises(UserError, match="'beam' has no prompt_with_targets"):
        DecodingConfig(method="beam", prompt_with_targets=True)


def test_what_does_not_fit_is_said_before_it_is_asked():
    writer = generator(max_length=3, prompt_with_targets=True)

    def misfit(size, modality):
        return writer.misfit(Request({}, {"targets/text/targets": np.full(size, 5)}), modality)

    assert misfit(3, None) is None
    assert misfit(4, None) == "the target is too long to be scored (4 tokens, at most 3)"
    assert misfit(2, "text") is None
    assert "no room for what is to be written (3 tokens, at most 3 in all)" in misfit(3, "text")
    assert generator(max_length=3).misfit(
        Request({}, {"targets/text/targets": np.full(9, 5)}), "text") is None


def test_token_scores_of_what_is_written_add_up(params):
    for decoding in ({}, {"method": "sample", "num_decodes": 3, "temperature": 2.0}):
        writer = generator(max_length=6, **decoding)  # cut: not all of them have an end
        for done in writer.generate(params, requests(), "text", token_scores=True):
            assert len(done.token_scores["text"]) == len(done.whole["text"])
            assert done.token_scores["text"].sum() == pytest.approx(done.scores["text"], rel=1e-4)
            scores = [score for _, score in done.decodes["text"]]
            assert scores == sorted(scores) and scores[-1] == done.scores["text"]
            assert len(scores) == decoding.get("num_decodes", 1)


def test_another_stream_draws_other_tokens(params):
    writer = generator(method="sample", temperature=3.0, max_length=6)

    def drawn(stream):
        return [done.tokens["text"].tolist() for done in
                writer.generate(params, requests(), "text", stream)]

    assert drawn(0) == drawn(0) != drawn(1)
