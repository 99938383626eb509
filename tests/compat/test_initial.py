"""The checkpoint that a run of T5X's begins with."""

from __future__ import annotations

import numpy as np
import pytest
from checkpointing import t5x_folders

from vishwam_t5x.compat import initial_checkpoint
from vishwam_t5x.compat.t5x_utils import RestoreCheckpointConfig


def written(folder, step):
    """Writes a checkpoint as T5X does; returns the folder it lies in."""
    t5x_folders.write({"target/decoder/decoder_norm/scale": np.ones(3, np.float32)},
                      folder / f"checkpoint_{step}")
    return folder


@pytest.mark.parametrize("name", ["flan-t5-v2", "exp7", "7"])
def test_a_folder_s_name_is_no_step(tmp_path, name):
    folder = written(tmp_path / name, 1000)
    for path in (folder, folder / "checkpoint_1000"):
        assert initial_checkpoint.steps_before(RestoreCheckpointConfig(path=str(path))) == 1000


def test_a_file_has_no_step(tmp_path):
    np.savez(tmp_path / "params2.npz", a=np.ones(3, np.float32))
    assert initial_checkpoint.steps_before(
        RestoreCheckpointConfig(path=str(tmp_path / "params2.npz"))) == 0
    assert initial_checkpoint.steps_before(RestoreCheckpointConfig(path=[])) == 0
