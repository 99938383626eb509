"""A cache knows which code it was written by."""

import logging
import types

from vishwam_t5x.data import task_code


def module(name, path):
    made = types.ModuleType(name)
    made.__file__ = str(path)
    return made


def test_only_files_that_changed_are_named(tmp_path, caplog):
    for name in ("tasks.py", "sources.py", "note.txt"):
        (tmp_path / name).write_text("before")
    whole_package = task_code.digests([module("package.tasks", tmp_path / "tasks.py")])
    assert {path.rpartition("/")[2] for path in whole_package} == {"tasks.py", "sources.py"}
    alone = task_code.digests([module("tasks", tmp_path / "tasks.py")])
    assert list(alone) == [str(tmp_path / "tasks.py")]

    metadata = {task_code.METADATA_KEY: whole_package}
    with caplog.at_level(logging.WARNING):
        task_code.warn_of_changes("mixed", [metadata, metadata])
    assert not caplog.records
    (tmp_path / "sources.py").write_text("after")
    with caplog.at_level(logging.WARNING):
        task_code.warn_of_changes("mixed", [metadata, metadata])
    (record,) = caplog.records
    assert record.getMessage().count("sources.py") == 1
    assert "--task_or_mixture=mixed --overwrite" in record.getMessage()
    assert "tasks.py" not in record.getMessage().replace("--task_or_mixture", "")


def test_nothing_is_said_where_nothing_is_known(tmp_path):
    assert task_code.changed({}) == []
    assert task_code.changed({task_code.METADATA_KEY: {str(tmp_path / "gone.py"): "0"}}) == []


def test_code_of_something_without_a_file():
    assert task_code.digests([types.ModuleType("built_in")]) == {}
