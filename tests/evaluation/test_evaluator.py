"""What the model writes is the cached equivalent of teacher forcing, and the task judges it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import small_model

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.records import DamagedRecord
from vishwam_t5x.evaluation.evaluator import Evaluator
from vishwam_t5x.evaluation.generator import DecodingConfig, Generator
from vishwam_t5x.evaluation.requests import Generated, Request, Scored
from vishwam_t5x.evaluation.shapes import Shapes, bucket
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.parallelism.mesh import make_mesh

MAX_LENGTH = 8


def text_of(ids) -> str:
    return " ".join(str(token) for token in np.asarray(ids) if token != 1)


def count(targets, predictions):
    return {"count": len(targets), "same": sum(map(_same, targets, predictions))}


def _same(left, right) -> bool:
    return bool(np.array_equal(left, right))


@pytest.fixture(scope="module")
def tiny():
    module = small_model.model()
    return module, small_model.params(module)


@pytest.fixture(scope="module")
def plain(tiny):
    """The evaluator most tests share, so that its programs are compiled once."""
    return evaluator(tiny[0])


def generator(module, batch_size=4, **decoding) -> Generator:
    return Generator(module, make_mesh(), None, batch_size, decoding, MAX_LENGTH,
                     {"text": 48, "image": 16})


def evaluator(module, **options) -> Evaluator:
    return Evaluator(generator(module, **options), small_model.objective(image_shift=1), text_of)


@pytest.fixture(scope="module")
def next_logits(tiny):
    """Logits of the token after a prefix, by the uncached forward pass."""
    module, params = tiny
    apply = jax.jit(lambda batch: module.apply({"params": params}, batch, method="logits"))

    def logits(inputs, modality, prefix):
        batch = {key: jnp.asarray(value)[None] for key, value in inputs.items()}
        length = 16
        tokens = np.zeros((1, length), np.int32)
        tokens[0, 1:len(prefix) + 1] = prefix
        batch[f"targets/{modality}/inputs"] = jnp.asarray(tokens)
        batch[f"targets/{modality}/mask"] = jnp.ones((1, length), jnp.int32)
        return np.asarray(apply(batch)[modality][0, len(prefix)], np.float64)

    return logits


def greedily(next_logits, inputs, modality, steps, allowed=slice(None)):
    prefix, score = [], 0.0
    for _ in range(steps):
        logits = np.full_like(values := next_logits(inputs, modality, prefix), -np.inf)
        logits[allowed] = values[allowed]
        log_probs = logits - np.logaddexp.reduce(logits)
        prefix.append(int(np.argmax(log_probs)))
        score += log_probs[prefix[-1]]
        if modality == "text" and prefix[-1] == 1:
            break
    return prefix, score


def test_text_equals_uncached_greedy_decoding(tiny, plain, next_logits):
    _, params = tiny
    task, goal = small_model.text_task(6), small_model.objective()
    result = plain.evaluate(params, task, TaskMetrics("captions", (count,)))
    assert [line.example for line in result.predictions] == list(range(6))
    for line in result.predictions:
        clean = task.read(line.example)
        inputs = Request.from_example(goal.apply(clean, seed=0, example=line.example)).inputs
        tokens, score = greedily(next_logits, inputs, "text", MAX_LENGTH)
        assert line.prediction == text_of(tokens)
        assert line.score == pytest.approx(score, abs=1e-4)
        assert line.target == text_of(clean["text_targets"])
        assert line.inputs == text_of(inputs["inputs/text/tokens"])
        assert line.input_slots == {"text": len(inputs["inputs/text/tokens"]), "image": 4}
    assert result.metrics["count"] == result.metrics["num_examples"] == 6


def test_codes_are_a_whole_grid_of_codes(tiny, plain, next_logits):
    _, params = tiny
    task, goal = small_model.image_task(3), small_model.objective()
    result = plain.evaluate(params, task, TaskMetrics("drawings", (count,)))
    for line in result.predictions:
        inputs = Request.from_example(
            goal.apply(task.read(line.example), seed=0, example=line.example)).inputs
        tokens, score = greedily(next_logits, inputs, "image", 4, slice(2, 18))
        assert line.prediction.tolist() == [token - 2 for token in tokens]
        assert line.score == pytest.approx(score, abs=1e-4)
        assert line.target.tolist() == task.read(line.example)["image_target_codes"].tolist()


def test_few_programs_and_results_independent_of_the_batch(tiny):
    module, params = tiny
    task = small_model.text_task(11)
    several = [evaluator(module, batch_size=size) for size in (4, 1)]
    results = [one.evaluate(params, task, TaskMetrics("t", (count,))) for one in several]
    assert [line.prediction for line in results[0].predictions] == [
        line.prediction for line in results[1].predictions]
    # Inputs of 4 to 11 tokens are one shape.
    assert several[0]._generator.num_compiles == 1


def test_buckets_grow_by_two_and_stop_at_the_row():
    assert [bucket(n, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    assert bucket(576, 576) == 576 and bucket(65) == 128


def test_sampling_is_a_function_of_its_seed(tiny):
    module, params = tiny
    task, metrics = small_model.image_task(5), TaskMetrics("drawings", (count,))

    def drawn(seed):
        config = DecodingConfig(method="sample", temperature=2.0, seed=seed)
        result = evaluator(module, image=config).evaluate(params, task, metrics)
        return [line.prediction.tolist() for line in result.predictions]

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    assert all(0 <= code < 16 for codes in first for code in codes)


def test_beams_find_at_least_the_greedy_score(tiny, plain):
    module, params = tiny
    task, metrics = small_model.image_task(5), TaskMetrics("drawings", (count,))
    beam = DecodingConfig(method="beam", num_decodes=8, alpha=0.0)
    best = evaluator(module, image=beam).evaluate(params, task, metrics).predictions
    greedy = plain.evaluate(params, task, metrics).predictions
    assert all(one.score >= other.score - 1e-4 for one, other in zip(best, greedy, strict=True))
    assert all(len(line.prediction) == 4 for line in best)


def test_score_metrics_get_the_log_probability_of_the_target(tiny, plain, next_logits):
    _, params = tiny
    task = small_model.text_task(3)
    seen = {}

    def score(targets, scores):
        seen["scores"] = scores
        return {"mean": float(np.mean(scores))}

    result = plain.evaluate(params, task, TaskMetrics("captions", (score,)))
    assert result.predictions == [] and result.metrics["num_examples"] == 3
    for record, got in enumerate(seen["scores"]):
        example = small_model.objective().apply(task.read(record), seed=0, example=record)
        targets, expected = example["targets/text/targets"], 0.0
        for index, target in enumerate(targets):
            logits = next_logits(Request.from_example(example).inputs, "text", targets[:index])
            expected += logits[target] - np.logaddexp.reduce(logits)
        assert got == pytest.approx(expected, abs=1e-4)


def test_postprocessor_gets_the_clean_example(tiny, plain):
    _, params = tiny
    task = small_model.image_task(2)

    def postprocess(output, example, is_target):
        assert np.array_equal(example["text_inputs"], task.read(example_number[0])["text_inputs"])
        example_number[0] += is_target is False
        return ("target" if is_target else "output", output.tolist())

    def metric(targets, predictions):
        assert [kind for kind, _ in targets] == ["target"] * 2
        return {"ok": float([kind for kind, _ in predictions] == ["output"] * 2)}

    example_number = [0]
    result = plain.evaluate(params, task, TaskMetrics("d", (metric,), postprocess),
                                        num_samples=1)
    assert result.metrics["ok"] == 1.0
    assert len(result.samples) == 1 and result.samples[0].output[0] == "output"


def test_a_task_without_metrics_shows_samples_only(tiny, plain):
    _, params = tiny
    result = plain.evaluate(params, small_model.denoising_task(),
                                        TaskMetrics("texts"), num_samples=2)
    assert len(result.predictions) == len(result.samples) == 2
    assert result.metrics == {}
    everything = plain.evaluate(params, small_model.denoising_task(),
                                            TaskMetrics("texts"), write_all=True)
    assert len(everything.predictions) == 9


class _Damaged:
    def __init__(self, task, bad):
        self._task, self._bad, self.name = task, bad, task.name
        self.num_records, self.features = task.num_records, task.features
        self.clean_lengths = task.clean_lengths

    def read(self, record):
        if record in self._bad:
            raise DamagedRecord(self.name, record, "on purpose")
        return self._task.read(record)


def test_damaged_records_are_counted_and_named(tiny, plain, caplog):
    _, params = tiny
    metrics = TaskMetrics("captions", (count,))
    result = plain.evaluate(params, _Damaged(small_model.text_task(4), {1}), metrics)
    assert [line.example for line in result.predictions] == [0, 2, 3]
    assert result.metrics["num_damaged"] == 1 and result.metrics["count"] == 3
    assert "captions record 1: on purpose" in caplog.text
    with pytest.raises(UserError, match="no record of task 'captions' can be read"):
        plain.evaluate(params, _Damaged(small_model.text_task(2), {0, 1}), metrics)


class _Echo:
    """A generator that gives each target back, if it is no longer than three tokens."""

    def misfit(self, request, modality=None):
        size = request.target_slots()["text"]
        return f"{size} tokens" if size > 3 else None

    def generate(self, params, requests, modality, stream, token_scores):
        for request in requests:
            ids = request.targets["targets/text/targets"]
            yield Generated(request.tag, {"text": ids}, {"text": -1.0}, {"text": ids},
                            {"text": [(ids, -1.0)]})

    def score(self, params, requests):
        for request in requests:
            yield Scored(request.tag, {"text": -2.0}, {"text": np.full(1, -2.0)})


def test_examples_that_are_too_long_are_counted_and_left_out(caplog):
    task, echo = small_model.text_task(8), Evaluator(_Echo(), small_model.objective(), text_of)
    sizes = [len(task.read(record)["text_targets"]) + 1 for record in range(8)]
    short = [record for record in range(8) if sizes[record] <= 3]
    assert 0 < len(short) < 8

    def scores(targets, scores):
        return {"scored": len(scores)}

    result = echo.evaluate(None, task, TaskMetrics("captions", (count, scores)))
    assert [line.example for line in result.predictions] == short
    assert result.metrics == {"count": len(short), "same": len(short), "scored": len(short),
                              "num_examples": len(short), "num_left_out": 8 - len(short)}
    assert caplog.text.count("left out of the evaluation: captions record") == 8 - len(short)
    for mode in ("predict", "score"):
        lines, left_out = echo.answer(None, task, range(8), mode)
        assert [line.example for line in lines] == short and len(left_out) == 8 - len(short)
    with pytest.raises(UserError, match="no record of task 'captions' can be used"):
        echo.evaluate(None, _Only(task, [record for record in range(8) if record not in short]),
                      TaskMetrics("captions", (count,)))


class _Only(_Damaged):
    """The records of a task with these numbers."""

    def __init__(self, task, records):
        super().__init__(task, ())
        self.num_records = len(records)
        self.clean_lengths = lambda record: task.clean_lengths(records[record])
        self.read = lambda record: task.read(records[record])


@pytest.mark.parametrize(("settings", "message"), [
    ({"method": "gready"}, "did you mean 'greedy'"),
    ({"temperature": 0.5}, "has no temperature"),
    ({"method": "sample", "temperature": 0.0}, "above 0"),
    ({"method": "beam", "top_k": 3}, "has no top_k"),
    ({"method": "sample", "top_p": 0.0}, "out of its range"),
    ({"max_length": 0}, "at least 1 token"),
])
def test_settings_of_decoding_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        DecodingConfig(**settings)


def test_decoding_of_a_modality_the_model_does_not_write(tiny):
    with pytest.raises(UserError, match="target modality of this model"):
        generator(tiny[0], audio=DecodingConfig())
    with pytest.raises(UserError, match="always written whole"):
        generator(tiny[0], image=DecodingConfig(max_length=3))


def test_codes_are_scored_knowing_which_the_task_hid():
    goal = small_model.objective(task_masks=True)
    clean = {"text_inputs": np.asarray([5], np.int32),
             "image_target_codes": np.asarray([1, 2, 3, 4], np.int32)}
    hidden = {"image_target_task_masks": np.asarray([0, 1, 1, 0], np.int32)}
    asked = [Request.from_example(goal.apply(each, seed=0, example=0))
             for each in (clean, {**clean, **hidden})]
    arrays = Shapes(2, {}, {}).arrays(asked, True)
    np.testing.assert_array_equal(arrays["targets/image/task_mask"][:, :4],
                                  [[0, 0, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(arrays["targets/image/loss_mask"][:, :4],
                                  [[1, 1, 1, 1], [0, 1, 1, 0]])
