"""Which checkpoints are evaluated, and when it ends."""

from __future__ import annotations

import pathlib

import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation import checkpoint_stream


def add(model_dir, *steps):
    for step in steps:
        (model_dir / "checkpoints" / str(step)).mkdir(parents=True)


def found(checkpoint, model_dir, skip=lambda step: False, finished=lambda: True, timeout=None):
    return [int(pathlib.Path(place).name) for place in checkpoint_stream.places(
        checkpoint, str(model_dir), skip, finished, 0.0, timeout)]


def test_one(tmp_path):
    add(tmp_path, 5, 20)
    places = checkpoint_stream.places
    assert list(places("20", str(tmp_path), None, None)) == [str(tmp_path / "checkpoints" / "20")]
    assert list(places("latest", str(tmp_path), None, None)) == [str(tmp_path)]
    assert list(places("gs://b/run,2", str(tmp_path), None, None)) == ["gs://b/run,2"]


def test_all_and_lists_rise_and_leave_out_what_is_done(tmp_path):
    add(tmp_path, 5, 100, 20)
    assert found("all", tmp_path) == [5, 20, 100]
    assert found("all", tmp_path, lambda step: step == 20) == [5, 100]
    assert found("100,5", tmp_path) == [5, 100]
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        found("5,7", tmp_path)
    with pytest.raises(UserError, match="has no checkpoints"):
        found("all", tmp_path / "elsewhere")


def test_watch_takes_each_as_it_comes_until_the_run_is_finished(tmp_path):
    looks = []

    def finished():
        looks.append(1)
        if len(looks) == 2:
            add(tmp_path, 10, 20)
        if len(looks) == 4:
            add(tmp_path, 30)  # written between the look at the ledger and that at the folder
        return len(looks) == 4

    assert found("watch", tmp_path, lambda step: step == 10, finished) == [20, 30]
    assert len(looks) == 4


def test_watch_ends_without_news(tmp_path):
    add(tmp_path, 10)
    assert found("watch", tmp_path, finished=lambda: False, timeout=0.0) == [10]


def test_whether_the_run_is_over_process_0_alone_is_asked(tmp_path, monkeypatch):
    add(tmp_path, 10)
    monkeypatch.setattr(checkpoint_stream, "is_primary", lambda: False)
    said = iter(["[0]", "[10]", "[0]", "[0]", "[1]", "[10]", "[1]"])
    monkeypatch.setattr(checkpoint_stream, "from_primary", lambda name, value: next(said))
    assert found("watch", tmp_path, finished=lambda: pytest.fail("this is not process 0")) == [10]


def test_gone(tmp_path):
    add(tmp_path, 10)
    assert not checkpoint_stream.is_gone(str(tmp_path / "checkpoints" / "10"))
    assert checkpoint_stream.is_gone(str(tmp_path / "checkpoints" / "11"))
