"""The loss of a split is the exact sum over its examples, however they are packed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluation import small_model

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.records import DamagedRecord
from vishwam_t5x.evaluation.evaluator import Evaluator
from vishwam_t5x.evaluation.generator import Generator
from vishwam_t5x.evaluation.loss_evaluator import LossEvaluator
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism.mesh import make_mesh

LOSS = LossConfig()


def evaluator(module, tasks, max_examples=None, **config) -> LossEvaluator:
    return LossEvaluator(module, LOSS, small_model.objective(image_shift=1),
                         small_model.dataset_config(**config), make_mesh(), None, max_examples,
                         tasks)


@pytest.fixture(scope="module")
def tiny():
    module = small_model.model()
    return module, small_model.params(module)


def test_equals_the_sum_over_single_examples_and_compiles_once(tiny):
    module, params = tiny
    tasks = [small_model.text_task(), small_model.image_task(), small_model.denoising_task()]
    evaluate = evaluator(module, tasks)
    got = evaluate(params)
    expected, count = {}, 0
    for task in tasks:
        sums = small_model.losses_one_by_one(module, params, task, small_model.objective(), LOSS)
        for modality, (loss, weight, correct) in sums.items():
            assert got[f"loss/{task.name}/{modality}"] == pytest.approx(loss / weight, rel=1e-5)
            assert got[f"accuracy/{task.name}/{modality}"] == pytest.approx(correct / weight)
            assert got[f"weight_sum/{task.name}/{modality}"] == weight
            expected[modality] = expected.get(modality, 0) + np.array([loss, weight, correct])
        count += task.num_records
    assert got["num_examples"] == count
    for modality, (loss, weight, _) in expected.items():
        assert got[f"loss/{modality}"] == pytest.approx(loss / weight, rel=1e-5)
    assert got["loss"] == pytest.approx(
        sum(loss / weight for loss, weight, _ in expected.values()), rel=1e-5)
    # A mean of the tasks' means is something else.
    means = [got[f"loss/{name}/text"] for name in ("captions", "texts")]
    assert got["loss/text"] != pytest.approx(np.mean(means), rel=1e-4)
    assert "loss/drawings/text" not in got
    assert evaluate.num_compiles == 1
    assert evaluate(params) == got
    captions = evaluate.split_sums(params, "captions").metrics(LOSS)
    assert captions["num_examples"] == 11
    assert captions["loss"] == captions["loss/text"] == got["loss/captions/text"]


def test_one_task_has_no_breakdown_and_a_limit_takes_the_first(tiny):
    module, params = tiny
    few = evaluator(module, [small_model.text_task(11)], max_examples=4)(params)
    sums = small_model.losses_one_by_one(
        module, params, _First(small_model.text_task(11), 4), small_model.objective(), LOSS)
    assert few["loss/text"] == pytest.approx(sums["text"][0] / sums["text"][1], rel=1e-5)
    assert few["num_examples"] == 4
    assert not [name for name in few if "captions" in name]
    with pytest.raises(UserError, match="at least 1"):
        evaluator(module, [small_model.text_task()], max_examples=0)


class _First:
    def __init__(self, task, count):
        self.num_records, self.read = count, task.read


def test_batch_size_does_not_matter(tiny):
    module, params = tiny
    tasks = [small_model.text_task(), small_model.image_task()]
    small = evaluator(module, tasks)(params)
    large = evaluator(module, tasks, batch_size=7)(params)
    assert large == pytest.approx(small, rel=1e-5)


class _Damaged:
    """A task one of whose records cannot be read."""

    def __init__(self, task, record):
        self._task, self._record, self.name = task, record, task.name
        self.num_records, self.features = task.num_records, task.features
        self.clean_lengths, self.length_table = task.clean_lengths, task.length_table

    def read(self, record):
        if record == self._record:
            raise DamagedRecord(self.name, record, "on purpose")
        return self._task.read(record)


def test_damaged_records_are_left_out_counted_and_named(tiny, caplog):
    module, params = tiny
    task = small_model.text_task(5)
    got = evaluator(module, [_Damaged(task, 2)])(params)
    assert got["num_examples"] == 4 and got["num_damaged"] == 1
    assert "captions record 2: on purpose" in caplog.text


def test_says_beforehand_which_metrics_it_gives(tiny):
    module, params = tiny
    for tasks in ([small_model.text_task()], [small_model.text_task(), small_model.image_task()]):
        evaluate = evaluator(module, tasks)
        assert set(evaluate(params)) <= set(evaluate.metric_names())


def test_target_tokens_are_those_that_count(tiny):
    module, params = tiny
    evaluate = evaluator(module, [small_model.text_task()])
    tokens = np.concatenate(list(evaluate.target_tokens("captions", "text")))
    assert len(tokens) == evaluate(params)["weight_sum/text"]
    expected = np.concatenate([
        [*small_model.text_task().read(record)["text_targets"], 1] for record in range(11)])
    assert sorted(tokens.tolist()) == sorted(expected.tolist())


def test_eight_devices_give_the_same_numbers(tiny, eight_devices):
    module, params = tiny
    one = evaluator(module, [small_model.text_task(), small_model.image_task()],
                    batch_size=8)(params)
    out = eight_devices("""
        import sys, json
        sys.path.insert(0, 'tests')
        import jax
        from evaluation import small_model
        from vishwam_t5x.evaluation.loss_evaluator import LossEvaluator
        from vishwam_t5x.objectives.losses import LossConfig
        from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
        from vishwam_t5x.parallelism import sharding
        module, loss = small_model.model(), LossConfig()
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        boxed = jax.eval_shape(module.init, jax.random.key(0))['params']
        params = jax.device_put(small_model.params(module),
                                sharding.parameter_shardings(boxed, mesh))
        evaluate = LossEvaluator(
            module, loss, small_model.objective(), small_model.dataset_config(8), mesh,
            tasks=[small_model.text_task(), small_model.image_task()])
        from vishwam_t5x.evaluation.evaluator import Evaluator
        from vishwam_t5x.evaluation.generator import Generator
        from vishwam_t5x.evaluation.task_metrics import TaskMetrics
        writer = Evaluator(Generator(module, mesh, None, 8, {}, 6, {'text': 48, 'image': 16}),
                           small_model.objective(), str)
        lines = writer.evaluate(params, small_model.image_task(), TaskMetrics('drawings'),
                                write_all=True).predictions
        print(json.dumps([evaluate(params), evaluate.num_compiles,
                          [line.prediction.tolist() for line in lines]]))
    """)
    metrics, compiles, written = json.loads(out.strip().splitlines()[-1])
    assert metrics == pytest.approx(one, rel=2e-5)
    assert compiles == 1
    here = Evaluator(Generator(module, make_mesh(), None, 8, {}, 6, {"text": 48, "image": 16}),
                     small_model.objective(), str)
    lines = here.evaluate(params, small_model.image_task(), TaskMetrics("drawings"),
                          write_all=True).predictions
    assert written == [line.prediction.tolist() for line in lines]
