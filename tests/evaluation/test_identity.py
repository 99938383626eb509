"""What tells checkpoints, functions and vocabularies of one name from each other."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from vishwam_t5x import task_lookup
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation import restoring
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.evaluation_setup import code_of


def test_an_npz_of_other_numbers_is_another(tmp_path):
    path = tmp_path / "a.npz"
    found = []
    for value in (1.0, 2.0, 1.0):
        np.savez(path, **{"encoder/kernel": np.full((3,), value, np.float32)})
        found.append(restoring.identity(str(path)))
    assert found[0] == found[2] != found[1]


def test_a_folder_is_known_by_its_manifest_or_its_files(tmp_path):
    ours, theirs = tmp_path / "7", tmp_path / "huggingface"
    ours.mkdir()
    theirs.mkdir()
    (ours / "manifest.json").write_text("one")
    (theirs / "model.safetensors").write_text("one")
    before = [restoring.identity(folder) for folder in (ours, theirs)]
    (ours / "beside").write_text("")
    assert restoring.identity(ours) == before[0] != before[1]
    (ours / "manifest.json").write_text("two")
    (theirs / "model.safetensors").write_text("three")
    after = [restoring.identity(folder) for folder in (ours, theirs)]
    assert before[0] != after[0] and before[1] != after[1]
    with pytest.raises(FileNotFoundError):
        restoring.identity(tmp_path / "gone")


def scaled(codes, by=1):
    return codes * by


class Drawing:
    def __init__(self, by):
        self.by = by

    def __repr__(self):
        return f"Drawing({self.by})"

    def __call__(self, codes):
        return codes * self.by


def test_functions_are_told_apart_by_name_arguments_and_source(tmp_path, monkeypatch):
    same = [code_of(scaled), code_of(scaled)]
    assert same[0] == same[1] and "test_identity:scaled" in same[0]
    others = [functools.partial(scaled, by=2), functools.partial(scaled, by=3), Drawing(2),
              Drawing(3), Drawing(2).__call__, lambda codes: codes, np.sum, len]
    assert len({same[0], *map(code_of, others)}) == 1 + len(others)
    source = tmp_path / "drawn_here.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    source.write_text("def draw(codes):\n    return codes\n")
    import drawn_here

    before = code_of(drawn_here.draw)
    source.write_text("def draw(codes):\n    return codes + 1\n")
    assert code_of(drawn_here.draw) != before


def test_only_the_data_of_the_run_itself_speaks_for_a_checkpoint(tmp_path):
    class Task:
        name = "captions"
        metadata = {"vocabulary": {"path": "text.model", "sha256": "12"}}

    run = tmp_path / "run"
    step = run / "checkpoints" / "10"
    step.mkdir(parents=True)
    other = json.dumps({"captions": {"vocabulary": "34"}})
    (tmp_path / "data.json").write_text(other)
    copied = tmp_path / "best" / "of" / "10"
    copied.mkdir(parents=True)
    for place in (step, run, copied, tmp_path / "weights.npz"):
        task_lookup.check_vocabulary([Task], str(place))  # that file is of something else
    (run / "data.json").write_text(other)
    for place in (step, run, run / "checkpoints", run / "latest", run / "checkpoints" / "latest"):
        with pytest.raises(UserError, match="of task 'captions' is not the checkpoint's"):
            task_lookup.check_vocabulary([Task], str(place))
    task_lookup.check_vocabulary([Task], str(copied))


def test_a_vocabulary_that_is_given_is_the_tasks_and_the_checkpoint_s(tmp_path, caplog):
    import hashlib

    model, other = tmp_path / "text.model", tmp_path / "other.model"
    model.write_bytes(b"pieces")
    other.write_bytes(b"others")

    class Task:
        name = "captions"
        metadata = {"vocabulary": {"path": str(model),
                                   "sha256": hashlib.sha256(b"pieces").hexdigest()}}

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "data.json").write_text(json.dumps({"captions": {
        "vocabulary": Task.metadata["vocabulary"]["sha256"]}}))
    task_lookup.check_vocabulary([Task], str(run), str(model))
    task_lookup.check_vocabulary([], str(run), str(model))
    with pytest.raises(UserError, match="of task 'captions' is not VOCABULARY_PATH"):
        task_lookup.check_vocabulary([Task], str(run), str(other))
    with pytest.raises(UserError, match="VOCABULARY_PATH is not the checkpoint's"):
        task_lookup.check_vocabulary([], str(run), str(other))
    with pytest.raises(UserError, match="no such file"):
        task_lookup.check_vocabulary([], str(run), str(tmp_path / "gone.model"))
    unsaid = type("Unsaid", (), {"name": "t5", "metadata": {}})
    task_lookup.check_vocabulary([unsaid], str(run), str(other))
    assert "VOCABULARY_PATH is not looked at: t5" in caplog.text


def test_metrics_are_known_by_their_functions():
    def exact(targets, predictions):
        return {"exact": 1.0}

    def near(targets, predictions):
        return {"near": 1.0}

    one, other = (TaskMetrics("captions", (function,)) for function in (exact, near))
    assert [code_of(f) for f in one.metric_fns] != [code_of(f) for f in other.metric_fns]
