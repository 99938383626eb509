"""Scratch folders of runs in a bucket: one a process, none left behind for long."""

from __future__ import annotations

import tempfile

import pytest

import helpers
from vishwam_t5x.training import scratch


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_of_a_killed_process_goes_and_of_a_living_one_stays(tmp_path):
    mine, alive = scratch.make()
    (mine / "metrics.jsonl").write_text("x")
    helpers.run_python("""
        import os
        from vishwam_t5x.training import scratch
        folder, file = scratch.make()
        (folder / "metrics.jsonl").write_text("x")
        os._exit(0)
        """, env={"TMPDIR": str(tmp_path)})
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "vishwam-run-just-made").mkdir()  # its lock is not there yet
    other, held = scratch.make()
    assert sorted(tmp_path.iterdir()) == sorted([mine, other, tmp_path / "vishwam-run-just-made"])
    scratch.remove(other, held)
    scratch.remove(mine, alive)
    assert [path.name for path in tmp_path.iterdir()] == ["vishwam-run-just-made"]
