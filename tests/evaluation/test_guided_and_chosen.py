"""The generator guides, constrains and chooses as the uncached model says."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import small_model, small_run
from flax.core import meta

from vishwam_t5x import gin_config
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation import options, programs
from vishwam_t5x.evaluation.constraints import AllowedAnswers
from vishwam_t5x.evaluation.evaluator import Evaluator
from vishwam_t5x.evaluation.generator import DecodingConfig, Generator
from vishwam_t5x.evaluation.options import OptionReader, OptionScoring
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.parallelism.mesh import make_mesh

GOAL = small_model.objective(no_text={"image": (7, 8), "text": (9,)})
RAN = {"encode": 0}


class Counting(EncoderDecoder):
    """Counts how often the encoder is run, not traced."""

    def encode(self, *args, **kwargs):
        jax.debug.callback(lambda: RAN.update(encode=RAN["encode"] + 1))
        return super().encode(*args, **kwargs)


@pytest.fixture(scope="module")
def tiny():
    module = small_model.model()
    return Counting(module.config), small_model.params(module)


def generator(module, scoring=OptionScoring(), **decoding) -> Generator:
    return Generator(module, make_mesh(), None, 2, decoding, 8, {"text": 48, "image": 16},
                     without_text=GOAL.without_text, encode=encode, option_scoring=scoring)


def encode(text: str) -> np.ndarray:
    return np.asarray([ord(letter) % 50 + 3 for letter in text], np.int32)


def decode(ids) -> str:
    return " ".join(str(token) for token in np.asarray(ids) if token != 1)


def requests(task, number=2):
    return [Request.from_example(GOAL.apply(task.read(record), seed=0, example=record), record)
            for record in range(number)]


def test_a_guided_image_is_that_of_both_forward_passes(tiny):
    """Token by token (1 + a) log p(token | text) - a log p(token | no text), with its score."""
    module, params = tiny
    asked = requests(small_model.image_task())
    found = {done.tag: done for done in generator(
        module, image=DecodingConfig(guidance=3.0)).generate(params, asked, "image")}
    logits = jax.jit(lambda batch: module.apply({"params": params}, batch, method="logits"))
    for request in asked:
        text = request.inputs["inputs/text/tokens"]
        bare = np.asarray([text[0], 7, 8, 1])
        assert text[0] == small_model.LAYOUT.prefix("image", "S")
        tokens = np.zeros((2, 16), np.int32)
        tokens[0, :len(text)], tokens[1, :4] = text, bare
        written, score, plain = [], 0.0, []
        for place in range(4):
            shifted = np.zeros((2, 4), np.int32)
            shifted[:, 1:place + 1] = written
            both = jax.nn.log_softmax(logits({
                "inputs/text/tokens": tokens, "inputs/text/mask": (tokens > 0).astype(np.int32),
                "targets/image/inputs": shifted,
                "targets/image/mask": np.ones((2, 4), np.int32)})["image"][:, place])
            plain.append(int(np.argmax(both[0, 2:])) + 2)
            guided = np.full(18, -np.inf)
            guided[2:] = (4 * both[0] - 3 * both[1])[2:]
            written.append(int(np.argmax(guided)))
            score += guided[written[-1]] - np.logaddexp.reduce(guided)
        assert found[request.tag].tokens["image"].tolist() == written
        assert found[request.tag].scores["image"] == pytest.approx(score, rel=1e-4)
    assert written != plain, "the guidance changed nothing"


def test_guided_and_constrained_scores_add_up(tiny):
    module, params = tiny
    answers = ("yes", "yesno", "no")
    writer = generator(module, text=DecodingConfig(
        method="sample", num_decodes=2, guidance=1.0, allowed=AllowedAnswers(answers)))
    ids = [encode(answer).tolist() for answer in answers]
    for done in writer.generate(params, requests(small_model.text_task()), "text",
                                token_scores=True):
        assert all(tokens.tolist() in ids for tokens, _ in done.decodes["text"])
        assert done.whole["text"][-1] == 1
        assert done.token_scores["text"].sum() == pytest.approx(done.scores["text"], rel=1e-4)


def test_a_function_that_leaves_nothing_is_named(tiny):
    module, params = tiny
    writer = generator(module, text=DecodingConfig(
        allowed=lambda tokens, position: jnp.zeros((128,), bool)))
    found = list(writer.generate(params, requests(small_model.text_task()), "text"))
    assert [done.tag for done in found] == [0, 1]
    assert all("left nothing to write" in done.why for done in found)
    with pytest.raises(UserError, match="no record of task 'captions' can be used") as error:
        Evaluator(writer, GOAL, decode).evaluate(
            params, small_model.text_task(2), TaskMetrics("captions"), write_all=True)
    assert "captions record 0: DecodingConfig.allowed left nothing" in error.value.got
    assert " at 0x" not in writer.description


CHOICES = (("abc", "b", "cd"), ("x", "yz", "longer", "w"))


@pytest.fixture(scope="module")
def one_by_one(tiny):
    """The log-probabilities of the tokens of each option, each the target of its example."""
    module, params = tiny
    asked = [dataclasses.replace(request, targets={"targets/text/targets": ids}, tag=(row, text))
             for row, request in enumerate(requests(small_model.text_task()))
             for text, ids in zip(CHOICES[row], OptionReader(encode).ids(CHOICES[row]),
                                  strict=True)]
    return {done.tag: done.token_scores["text"] for done in generator(module).score(params, asked)}


@pytest.fixture(scope="module")
def chooser(tiny):
    """Scores at most five tokens at a time: each example needs several rounds."""
    return generator(tiny[0], OptionScoring("mean", max_tokens=5))


def test_options_are_scored_side_by_side_as_one_by_one(tiny, one_by_one, chooser):
    _, params = tiny
    asked = [dataclasses.replace(request, options=OptionReader(encode).ids(choices))
             for request, choices in zip(requests(small_model.text_task()), CHOICES, strict=True)]
    RAN.update(encode=0)
    found = list(chooser.generate(params, asked, "text", token_scores=True))
    jax.effects_barrier()
    assert RAN["encode"] == 1
    for done in found:
        each = [one_by_one[done.tag, text] for text in CHOICES[done.tag]]
        expected = [scores.mean() for scores in each]
        assert OptionScoring().of(each[0]) == pytest.approx(each[0].sum())
        np.testing.assert_allclose(done.option_scores, expected, atol=1e-5)
        best = int(np.argmax(expected))
        assert done.option == best
        assert done.tokens["text"].tolist() == encode(CHOICES[done.tag][best]).tolist()
        assert done.scores["text"] == pytest.approx(each[best].sum(), abs=1e-5)
        np.testing.assert_allclose(done.token_scores["text"], each[best], atol=1e-5)
        assert [score for _, score in done.decodes["text"]] == sorted(done.option_scores)


def test_a_model_without_an_encoder_takes_one_option_at_a_time():
    """Traced alone: nothing is compiled. What comes out is held against scores below."""
    module = small_model.model(num_encoder_layers=0,
                               targets=small_model.model().config.targets[:1])
    writer = generator(module)
    writer._encode = lambda params, batch: jax.eval_shape(
        lambda *given: module.apply({"params": given[0]}, given[1], method="encode"), params, batch)
    writer._choose = lambda params, encoded, targets: np.zeros(jax.eval_shape(
        lambda *given: programs.score_tokens(module, *given), params, encoded, targets).shape)
    params = meta.unbox(jax.eval_shape(module.init, jax.random.key(0)))["params"]
    asked = [dataclasses.replace(request, options=OptionReader(encode).ids(CHOICES[1]))
             for request in requests(small_model.text_task())]
    assert [len(done.option_scores) for done in writer.generate(params, asked, "text")] == [4, 4]


class WithOptions:
    """A task whose examples can be chosen among, but for one."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def read(self, record):
        given = b"[1]" if record == 2 else json.dumps(["abc", "b", "cd"]).encode()
        return {**self._task.read(record), options.FEATURE: given}


def test_a_task_s_examples_are_answered_by_the_best_of_their_options(tiny, chooser):
    _, params = tiny
    task = WithOptions(small_model.text_task(3))
    judge = TaskMetrics("captions", (lambda targets, predictions: {
        "known": sum(said in ("abc", "b", "cd") for said in predictions)},))
    result = Evaluator(chooser, GOAL, decode, read_options=OptionReader(encode)).evaluate(
        params, task, judge)
    assert result.metrics["known"] == 2 and result.metrics["num_left_out"] == 1
    for line in result.predictions:
        scores = json.loads(line.to_json())["scores"]
        assert max(scores, key=scores.get) == line.prediction


@pytest.mark.parametrize("given", [["one"], ["a", "a"], "ab", [1, 2]])
def test_what_are_no_options(given):
    with pytest.raises(UserError, match="options"):
        options.checked(given)


def test_options_that_do_not_fit_are_told_why(tiny):
    writer = generator(tiny[0])
    ids = OptionReader(encode).ids(("a", "a" * 8))
    assert writer.misfit(Request({}, options=ids), "text") == (
        "an option is too long (9 tokens, with the end, at most 8)")
    assert "but what is to be written is image" in writer.misfit(Request({}, options=ids), "image")
    with pytest.raises(UserError, match="without its text"):
        Generator(tiny[0], make_mesh(), None, 2, {"image": DecodingConfig(guidance=1.0)}, 8, {})


GIN = """
from vishwam_t5x.evaluation import constraints
from vishwam_t5x.evaluation import options
from vishwam_t5x.serving import tokenizer
MODEL_DIR = 'run'
CACHE_DIR = None
DECODING = {'text': @generator.DecodingConfig(), 'image': @image/generator.DecodingConfig()}
generator.DecodingConfig.allowed = @constraints.AllowedAnswers()
constraints.AllowedAnswers.answers = ('yes', 'no')
image/generator.DecodingConfig.max_length = None
image/generator.DecodingConfig.allowed = @constraints.AllowedTokens()
constraints.AllowedTokens.tokens = (2, 3)
image/generator.DecodingConfig.guidance = 10
options.OptionScoring.score = 'mean'
denoisers.MixtureOfDenoisers.no_text_rates = {'image': 0.1}
denoisers.MixtureOfDenoisers.no_text = {'image': @tokenizer.text_ids()}
tokenizer.text_ids.text = 'what'
tokenizer.text_ids.model = 'MODEL'
"""


def test_gin_says_it_all(tmp_path):
    small_run.vocabulary(tmp_path / "text.model")
    file = tmp_path / "recipe.gin"
    file.write_text(small_run.GIN + GIN.replace("MODEL'", f"{tmp_path}/text.model'"))
    parsed = gin_config.parse([f"--gin_file={file}"], "infer")
    decoding = parsed.macro("DECODING")
    assert decoding["text"].allowed == AllowedAnswers(("yes", "no"))
    assert decoding["image"].guidance == 10 and list(decoding["image"].allowed.tokens) == [2, 3]
    assert parsed.arguments(OptionScoring) == {"score": "mean"}
    goal = parsed.macro("OBJECTIVE")
    assert goal.no_text_rates == {"image": 0.1} and len(goal.no_text["image"]) >= 1


@pytest.mark.slow
def test_one_guided_beam_writes_what_is_written_greedily(tiny):
    module, params = tiny
    asked = requests(small_model.text_task(), 5)
    greedy, beam = ({done.tag: done for done in generator(module, text=DecodingConfig(
        guidance=2.0, **how)).generate(params, asked, "text")}
        for how in ({}, {"method": "beam", "alpha": 0.0}))
    for tag, done in greedy.items():
        assert beam[tag].tokens["text"].tolist() == done.tokens["text"].tolist()
        assert beam[tag].scores["text"] == pytest.approx(done.scores["text"], rel=1e-4)
    wide = generator(module, text=DecodingConfig(
        guidance=2.0, method="beam", num_decodes=3, alpha=0.0))
    for done in wide.generate(params, asked, "text"):
        assert done.scores["text"] >= greedy[done.tag].scores["text"] - 1e-4


@pytest.mark.slow
def test_a_model_without_an_encoder_guides_and_chooses_too():
    module = small_model.model(num_encoder_layers=0,
                               targets=small_model.model().config.targets[:1])
    params = small_model.params(module)
    asked = requests(small_model.text_task())
    writer = generator(module, text=DecodingConfig(guidance=1.0))
    for done in writer.generate(params, asked, "text", token_scores=True):
        assert done.token_scores["text"].sum() == pytest.approx(done.scores["text"], rel=1e-4)
    ids = [OptionReader(encode).ids(choices) for choices in CHOICES]
    alone = {done.tag: done.scores["text"] for done in writer.score(params, [
        dataclasses.replace(request, targets={"targets/text/targets": option}, tag=(row, number))
        for row, request in enumerate(asked) for number, option in enumerate(ids[row])])}
    for done in writer.generate(params, [dataclasses.replace(request, options=ids[row])
                                         for row, request in enumerate(asked)], "text"):
        np.testing.assert_allclose(done.option_scores, [
            alone[done.tag, number] for number in range(len(ids[done.tag]))], atol=1e-5)
