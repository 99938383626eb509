"""Metric functions are called as SeqIO calls them, from a Task or from a cache's manifest."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.task_metrics import ModelOutputs, TaskMetrics


def exact(targets, predictions):
    return {"exact": float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


def mean_score(targets, scores):
    return {"mean_score": float(np.mean(scores)), "targets": len(targets)}


def with_aux(targets, predictions, aux_values):
    return {"best": predictions[int(np.argmax(aux_values["scores"]))]}


def lower(output, example, is_target):
    return output.lower() + (str(example["meta_id"]) if is_target else "0")


EXAMPLES = [{"meta_id": 0}, {"meta_id": 1}, {"meta_id": 0}]
OUTPUTS = ModelOutputs(tokens=[np.array([3])] * 3,
                       prediction_scores=[-3.0, -1.0, -2.0], target_scores=[-1.0, -2.0, -6.0])


def test_functions_get_postprocessed_values_by_the_names_of_their_arguments():
    metrics = TaskMetrics("t", (exact, mean_score, with_aux), lower)
    targets = [metrics.postprocess(text, example, is_target=True)
               for text, example in zip(["a", "B", "x"], EXAMPLES, strict=True)]
    predictions = [metrics.postprocess(text, example, is_target=False)
                   for text, example in zip("ABC", EXAMPLES, strict=True)]
    got = metrics.compute(targets, predictions, OUTPUTS)
    # 'a0' == 'a0'; 'b1' != 'b0'; 'x0' != 'c0'
    assert got == {"exact": pytest.approx(1 / 3), "mean_score": -3.0, "targets": 3.0, "best": "b0"}
    assert metrics.needs_predictions and metrics.needs_scores


def test_only_what_is_needed():
    assert not TaskMetrics("t", (mean_score,)).needs_predictions
    assert not TaskMetrics("t", (exact,)).needs_scores
    assert not TaskMetrics("t").has_metrics


def test_mistakes_of_a_metric_are_named():
    with pytest.raises(UserError, match="metric 'f' of task 't' has unknown arguments"):
        def f(targets, guesses):
            return {}
        TaskMetrics("t", (f,))
    with pytest.raises(UserError, match="two metrics of task 't' are called 'exact'"):
        TaskMetrics("t", (exact, exact)).compute("AAA", "AAA", OUTPUTS)

    def broken(targets, predictions):
        raise KeyError("lost")
    with pytest.raises(UserError, match="'broken' of task 't' failed"):
        TaskMetrics("t", (broken,)).compute("AAA", "AAA", OUTPUTS)
    with pytest.raises(UserError, match="'postprocess_fn' of task 't' failed"):
        TaskMetrics("t", (exact,), lower).postprocess(3, {}, is_target=False)


def test_metadata_gives_addresses(monkeypatch):
    module = types.ModuleType("made_up_metrics")
    module.exact, module.lower = exact, lower
    monkeypatch.setitem(sys.modules, "made_up_metrics", module)
    metrics = TaskMetrics.from_metadata("t", {"metric_fns": ["made_up_metrics:exact"],
                                              "postprocess_fn": "made_up_metrics:lower"})
    assert metrics == TaskMetrics("t", (exact,), lower)
    assert TaskMetrics.from_metadata("t", {}) is None
    assert TaskMetrics.from_metadata("t", {"metric_fns": ["m:f.<locals>.g"]}) is None
    assert TaskMetrics.from_metadata("t", {"metric_fns": []}) == TaskMetrics("t")
    with pytest.raises(UserError, match="names a function that does not exist"):
        TaskMetrics.from_metadata("t", {"metric_fns": ["made_up_metrics:gone"]})


def test_seqio_task_functions_and_objects(run_python):
    out = run_python("""
        import dataclasses
        import flax, numpy as np, seqio, tensorflow as tf
        from vishwam_t5x.data.tf.metrics import seqio_metrics
        from vishwam_t5x.evaluation.task_metrics import ModelOutputs, TaskMetrics

        def length(targets, predictions):
            return {'length': seqio.metrics.Scalar(len(predictions)),
                    'histogram': seqio.metrics.Histogram(np.arange(3))}

        @flax.struct.dataclass
        class Hits(seqio.metrics.CollectingMetric):
            model_output_type = seqio.metrics.ModelOutputType.PREDICTION

            def actual_compute(self, examples, features, target_field_name, cached=None):
                decode = features[target_field_name].vocabulary.decode
                tokens = self.values['model_output']
                hits = [decode(list(row)) == decode(list(example[target_field_name]))
                        for row, example in zip(np.asarray(tokens), examples)]
                return {'hits': sum(hits)}, {'targets': []}

        seqio.TaskRegistry.add(
            'tiny', source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: tf.data.Dataset.range(2), splits=['test']),
            output_features={'text_targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
            metric_fns=[length], metric_objs=[Hits])
        found = seqio_metrics('tiny')
        metrics = TaskMetrics('tiny', *found)
        assert metrics.needs_predictions
        examples = [{'text_targets': np.array([100, 101], np.int32)},
                    {'text_targets': np.array([102], np.int32)}]
        outputs = ModelOutputs(tokens=[np.array([100, 101]), np.array([103])])
        print(metrics.compute(['ab', 'd'], ['ab', 'c'], outputs, examples, 'text_targets'))
        try:
            seqio_metrics('tinny')
        except Exception as error:
            print(error)
    """)
    assert "{'length': 2.0, 'hits': 1.0}" in out
    assert "did you mean 'tiny'?" in out
