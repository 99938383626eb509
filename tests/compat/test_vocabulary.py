"""Ids and vocabularies of T5's tasks are held against the model's."""

from __future__ import annotations

import dataclasses
import hashlib
import types

import pytest
from compat import t5x_runs
from models import t5_fixtures

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import directory, fit, source
from vishwam_t5x.data.records import TaskCache
from vishwam_t5x.objectives.text_to_text import TextToText


def cached(tmp_path):
    """A task of T5's features whose ids go up to 258."""
    t5x_runs.cache(tmp_path)
    return TaskCache.open(directory.task_directory(tmp_path, "copy", "train"))


def of_rows(rows):
    """Config of a model with a text table of so many rows."""
    config = t5_fixtures.config()
    text = lambda modules: tuple(
        dataclasses.replace(module, vocab_size=rows) for module in modules)
    return dataclasses.replace(config, inputs=text(config.inputs), targets=text(config.targets))


def test_ids_beyond_the_table_are_refused(tmp_path):
    task = cached(tmp_path)
    largest = max(task.manifest.largest_ids["inputs"], task.manifest.largest_ids["targets"])
    fit.check_model([task], of_rows(largest + 1))
    with pytest.raises(UserError, match=f"the text table has {largest} rows") as error:
        fit.check_model([task], of_rows(largest))
    assert f"vocab_size = {largest + 1} or more" in error.value.fix


@pytest.mark.parametrize("side", ["inputs", "targets"])
def test_each_side_is_looked_at(side):
    task = types.SimpleNamespace(name="one", manifest=types.SimpleNamespace(
        largest_ids={"inputs": 9, "targets": 9} | {side: 40}))
    with pytest.raises(UserError, match=f"id 40 in '{side}'"):
        fit.check_model([task], of_rows(32))


def described(path, digest=None):
    return types.SimpleNamespace(name="one", metadata={
        "vocabulary": {"path": path, "sha256": digest}})


def test_vocabularies_are_compared_by_content(tmp_path):
    file = tmp_path / "mine.model"
    file.write_bytes(b"pieces")
    objective = TextToText(4, 4, vocabulary_files=(str(file),))
    same = hashlib.sha256(b"pieces").hexdigest()
    fit.check_vocabularies([described("/else/where.model", same),
                            types.SimpleNamespace(name="says nothing")], objective)
    with pytest.raises(UserError, match="'one' is not the model's"):
        fit.check_vocabularies([described(str(file), "other")], objective)


def test_and_by_name_where_the_file_is_elsewhere(caplog):
    objective = TextToText(4, 4, vocabulary_files=("gs://far/cc_all/words.model",))
    with caplog.at_level("INFO"):
        fit.check_vocabularies([described("/here/words.model", "12")], objective)
    assert "by name alone" in caplog.text
    with pytest.raises(UserError, match="vocabulary of task 'one'") as error:
        fit.check_vocabularies([described("/here/other.model", "12")], objective)
    assert "by name alone" in error.value.got


def test_opening_a_dataset_compares_them(tmp_path, monkeypatch):
    t5x_runs.cache(tmp_path)
    monkeypatch.setattr(TaskCache, "metadata", {"vocabulary": {"path": "/a", "sha256": "12"}})
    config = source.DatasetConfig("copy", {"inputs": 16, "targets": 16}, 2,
                                  cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="vocabulary of task 'copy'"):
        source.open_dataset(config, TextToText(16, 16, vocabulary_files=("/b",)))
