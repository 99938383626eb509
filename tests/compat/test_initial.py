"""The checkpoint that a run of T5X's begins with."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
from checkpointing import t5x_folders

from vishwam_t5x.compat import initial_checkpoint
from vishwam_t5x.compat.t5x_utils import RestoreCheckpointConfig
from vishwam_t5x.core.errors import UserError


def written(folder, step):
    """Writes a checkpoint as T5X does; returns the folder it lies in."""
    t5x_folders.write({"target/decoder/decoder_norm/scale": np.ones(3, np.float32)},
                      folder / f"checkpoint_{step}")
    return folder


def before(path, run):
    """The step that a run begins with."""
    return initial_checkpoint.steps_before(RestoreCheckpointConfig(path=str(path)), str(run))


@pytest.mark.parametrize("name", ["flan-t5-v2", "exp7", "7"])
def test_a_folder_s_name_is_no_step(tmp_path, name):
    folder = written(tmp_path / name, 1000)
    for path in (folder, folder / "checkpoint_1000"):
        assert before(path, tmp_path / "run") == 1000


def test_a_file_has_no_step(tmp_path):
    np.savez(tmp_path / "params2.npz", a=np.ones(3, np.float32))
    assert before(tmp_path / "params2.npz", tmp_path / "run") == 0
    assert before("", tmp_path / "run") == 0


def test_a_run_that_goes_on_remembers(tmp_path):
    """Neither a checkpoint that is gone nor a newer one beside it changes what was counted."""
    first, run = written(tmp_path / "first", 5), tmp_path / "run9"
    assert before(first, run) == 5
    assert json.loads((run / initial_checkpoint.FILE).read_text()) == {
        "path": str(first), "step": 5}
    written(first, 8)
    assert before(first, run) == 8  # it has not begun yet: it would load this one
    (run / "checkpoints" / "2").mkdir(parents=True)
    written(first, 11)
    assert before(first, run) == 8
    shutil.rmtree(first)
    assert before(first, run) == before("", run) == 8
    (run / initial_checkpoint.FILE).write_text("{}")
    with pytest.raises(UserError, match="what the run began with cannot be read"):
        before(first, run)


def test_another_beginning_is_taken_while_there_is_no_checkpoint(tmp_path):
    assert before(written(tmp_path / "first", 5), tmp_path / "run") == 5
    assert before("", tmp_path / "run") == 0
    assert not (tmp_path / "run" / initial_checkpoint.FILE).exists()


def test_steps_of_a_converted_checkpoint_are_the_run_s_own(tmp_path):
    (tmp_path / "run" / "checkpoints" / "1000").mkdir(parents=True)
    assert before(written(tmp_path / "first", 1000), tmp_path / "run") == 0


def test_what_is_not_restored_is_said_once(tmp_path, caplog):
    first, run = written(tmp_path / "first", 5), tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        before(first, run)
    assert "optimizer's state" in caplog.text and f"vishwam convert --from={first}" in caplog.text
    caplog.clear()
    (run / "checkpoints" / "2").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        before(first, run)
    assert not caplog.text
