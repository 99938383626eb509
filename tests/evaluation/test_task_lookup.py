"""Tasks whose caches say nothing of text and metrics are asked through SeqIO."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from vishwam_t5x import task_lookup
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import fast_pictures
from vishwam_t5x.data.records import DamagedRecord
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.objectives.text_to_text import TextToText

TASKS = """
import numpy as np
import seqio
import tensorflow as tf

from vishwam_t5x.data.tf.features import text_feature

VOCABULARY = seqio.ByteVocabulary(extra_ids=0)


def same(targets, predictions):
    return {'same': float(np.mean([t == p for t, p in zip(targets, predictions)]))}


def shout(output, example, is_target):
    return output.upper()


seqio.TaskRegistry.add(
    'spell', source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {'text_inputs': ['ab', 'c'], 'text_targets': ['Ab', 'c']}), splits=['test']),
    preprocessors=[lambda dataset, output_features: seqio.preprocessors.tokenize(
        dataset, output_features, copy_pretokenized=False)],
    output_features={'text_inputs': text_feature(VOCABULARY),
                     'text_targets': text_feature(VOCABULARY)},
    postprocess_fn=shout, metric_fns=[same])
"""


def test_seqio_is_asked_where_the_manifest_says_nothing(run_python, tmp_path):
    (tmp_path / "spelling_tasks.py").write_text(TASKS)
    out = run_python(f"""
        import sys
        from vishwam_t5x import task_lookup
        from vishwam_t5x.data.source import DatasetConfig
        from vishwam_t5x.data.tf.cache import cache_task_or_mixture
        from vishwam_t5x.evaluation.task_metrics import ModelOutputs
        from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
        from vishwam_t5x.objectives.vocabulary import VocabularyLayout

        module, cache = {str(tmp_path / "spelling_tasks.py")!r}, {str(tmp_path / "cache")!r}
        cache_task_or_mixture('spell', [module], cache)
        layout = VocabularyLayout(base_size=259, num_sentinels=4, num_location_bins=0)
        objective = MixtureOfDenoisers(vocabulary=layout, supervised_only=True)
        config = DatasetConfig('spell', {{'inputs': 8, 'targets': 8}}, 2, split='test',
                               cache_dir=cache, module=module)
        tasks = task_lookup.open_tasks(config, objective)
        metrics = task_lookup.metrics_of(tasks[0], config)
        codec = task_lookup.text_codec(tasks, config, layout)
        ids = codec.encode('ab')
        assert ids.tolist() == tasks[0].read(0)['text_inputs'].tolist(), ids
        assert codec.decode([layout.prefix('text', 'S'), *ids, 0, layout.sentinel(1), 1, *ids]) == (
            '[Text] [S] ab <extra_id_1>')
        examples = [tasks[0].read(record) for record in (0, 1)]
        targets = [metrics.postprocess(codec.decode(example['text_targets']), example, True)
                   for example in examples]
        print(targets, metrics.compute(targets, ['AB', 'X'], ModelOutputs()))
        for names, message in ((('spel',), "did you mean 'spell'"),):
            try:
                task_lookup.open_tasks(config, objective, names)
            except ValueError as error:
                assert message in str(error), error
            else:
                raise AssertionError('not refused')
    """)
    assert "['AB', 'C'] {'same': 0.5}" in out


class _Records:
    """Two records of a T5 task, the first of them damaged."""

    num_records = 2

    def __init__(self, **ids):
        self.name, self._ids = "t5", {name: np.array(value) for name, value in ids.items()}

    def read(self, record):
        if not record:
            raise DamagedRecord("t5", record, "broken")
        return self._ids


def test_examples_say_where_texts_have_an_end():
    t5, both = TextToText(8, 8), ("inputs", "targets")
    with_ends = _Records(inputs=[5, 6, 1], targets=[7, 1])
    assert task_lookup.text_ends([with_ends], t5) == both
    assert task_lookup.text_ends([_Records(inputs=[5, 6], targets=[7, 1])], t5) == ("targets",)
    assert task_lookup.text_ends([_Records(text_inputs=[5], text_targets=[7])], t5) == ()
    assert task_lookup.text_ends([], t5) == both


def test_different_vocabularies_are_refused():
    class Task:
        def __init__(self, name, digest):
            self.name = name
            self.metadata = {"vocabulary": {"path": f"/{digest}", "sha256": digest}}

    config = DatasetConfig("both", {"inputs": 8, "targets": 8}, 2)
    with pytest.raises(UserError, match="different vocabularies"):
        task_lookup.text_codec([Task("a", "1"), Task("b", "2")], config, None)


def read(resize, feature="image_inputs", step="decode_picture"):
    """What is kept of how a task's files were read."""
    return {"conversions": {f"{feature}: {step}": {"config": {"height": 8, "resize": resize}}}}


def cached(name, **metadata):
    return types.SimpleNamespace(name=name, metadata=metadata)


def test_pictures_are_read_as_the_run_has_read_them(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fast_pictures, "codecs", lambda: object())
    place = tmp_path / "run" / "checkpoints" / "7"
    place.mkdir(parents=True)
    fast, exact = cached("a", **read("fast")), cached("b", **read("exact"))
    assert task_lookup.how_resized([fast], str(place)) == "fast", "the run says nothing"
    assert task_lookup.how_resized([]) == task_lookup.how_resized([cached("old")]) == "exact"
    assert task_lookup.how_resized([fast, cached("c", **read("exact", "image_targets"))]) == "fast"
    assert not caplog.text
    assert task_lookup.how_resized([fast, exact]) == "exact"
    assert "are read exactly" in caplog.text
    (tmp_path / "run" / "data.json").write_text(json.dumps({
        "old": {"rate": 1.0}, "b": read("fast", "image_history_inputs", "decode_frames")}))
    for checkpoint in (place, tmp_path / "run"):
        assert task_lookup.how_resized([exact], str(checkpoint)) == "fast", "the run goes first"
    monkeypatch.setattr(fast_pictures, "codecs", lambda: None)
    assert task_lookup.how_resized([], str(place)) == "exact"


def test_tasks_cached_with_other_settings_than_the_run_has_read_are_named(tmp_path, caplog):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "data.json").write_text(json.dumps({"a": read("fast"), "old": {}}))
    task_lookup.check_learned([cached("a", **read("fast")), cached("a"), cached("other"),
                               cached("old", **read("exact"))], str(run))
    assert not caplog.text
    task_lookup.check_learned([cached("a", **read("exact"))], str(run))
    assert "'a' was cached with other settings" in caplog.text
    assert "decode_picture.config.resize = 'fast', now 'exact'" in caplog.text
