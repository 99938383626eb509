"""A batch file in this project's keys or in T5X's is the same batch."""

from __future__ import annotations

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.batch_file import positions, read_batch, shift_right

TEXT = ("text",)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_t5x_names_are_text(tmp_path):
    targets = np.array([[7, 8, 1, 9, 1, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    path = save(tmp_path / "b.npz", encoder_input_tokens=np.array([[5, 6, 1, 0]]),
                decoder_target_tokens=targets, decoder_segment_ids=segments,
                decoder_loss_weights=np.array([[1, 0.5, 1, 1, 1, 0]]))
    batch = read_batch(path, TEXT, TEXT)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "inputs/text/tokens": [[5, 6, 1, 0]], "inputs/text/mask": [[1, 1, 1, 0]],
        "inputs/text/pos_ids": [[0, 1, 2, 3]],
        "targets/text/targets": targets.tolist(), "targets/text/segment_ids": segments.tolist(),
        "targets/text/loss_mask": [[1, 0.5, 1, 1, 1, 0]],
        "targets/text/mask": [[1, 1, 1, 1, 1, 0]],
        "targets/text/pos_ids": [[0, 1, 2, 0, 1, 0]],
        "targets/text/inputs": [[0, 7, 8, 0, 9, 0]]}
    assert batch["inputs/text/tokens"].dtype == np.int32
    assert batch["targets/text/loss_mask"].dtype == np.float32


def test_own_names_keep_what_is_given(tmp_path):
    arrays = {"batch/inputs/image/input": np.ones((2, 3, 4), np.float64),
              "batch/inputs/image/mask": np.array([[1, 1, 0]] * 2),
              "batch/targets/text/targets": np.array([[4, 1]] * 2),
              "batch/targets/text/inputs": np.array([[9, 9]] * 2)}
    batch = read_batch(save(tmp_path / "b.npz", **arrays), ("text", "image"), ("text", "image"))
    assert batch["inputs/image/input"].dtype == np.float32
    assert batch["inputs/image/mask"].tolist() == [[1, 1, 0]] * 2
    assert batch["targets/text/inputs"].tolist() == [[9, 9]] * 2
    assert not any(name.startswith("targets/image") for name in batch)


def test_histories_have_frames_of_patches(tmp_path):
    arrays = {"inputs/image_history/input": np.zeros((2, 3, 4, 5)),
              "inputs/image_history/segment_ids": np.array([[1, 1, 2], [1, 0, 0]]),
              "targets/text/targets": np.array([[4, 1]] * 2)}
    modalities = ("text", "image_history")
    batch = read_batch(save(tmp_path / "b.npz", **arrays), modalities, TEXT)
    assert batch["inputs/image_history/frame_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert batch["inputs/image_history/mask"].shape == (2, 3, 4)
    assert batch["inputs/image_history/pos_ids"][1, 2].tolist() == [0, 1, 2, 3]
    for name, shape in (("mask", (2, 3)), ("pos_ids", (2, 12)), ("segment_ids", (2, 3, 4)),
                        ("frame_ids", (2, 4))):
        wrong = {**arrays, f"inputs/image_history/{name}": np.ones(shape, np.int32)}
        with pytest.raises(UserError, match="different shapes"):
            read_batch(save(tmp_path / "c.npz", **wrong), modalities, TEXT)
    flat = {"inputs/image_history/input": np.zeros((2, 3, 5)),
            "inputs/image_history/frame_ids": np.zeros((2, 3), np.int32),
            "targets/text/targets": np.array([[4, 1]] * 2)}
    with pytest.raises(UserError, match="for histories"):
        read_batch(save(tmp_path / "d.npz", **flat), modalities, TEXT)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"inputs/txt/tokens": [[1]], "targets/text/targets": [[1]]}, "did you mean 'inputs/text"),
    ({"inputs/text/tokens": [[1]]}, "holds no targets"),
    ({"inputs/text/mask": [[1]], "targets/text/targets": [[1]]}, "but not its tokens"),
    ({"inputs/text/tokens": [[1, 2]], "inputs/text/mask": [[1]], "targets/text/targets": [[1]]},
     "different shapes"),
    ({"inputs/text/tokens": [[1], [2]], "targets/text/targets": [[1]]}, "numbers of rows"),
    ({"inputs/text/tokens": [[2**40]], "targets/text/targets": [[1]]}, "does not fit in int32"),
    ({"inputs/text/tokens": [1, 2], "targets/text/targets": [[1]]}, "must have 2 axes"),
    ({"decoder_target_tokens": [[1]], "targets/text/targets": [[1]]}, "under two names"),
])
def test_mistakes_are_named(tmp_path, arrays, message):
    path = save(tmp_path / "b.npz", **{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(UserError, match=message):
        read_batch(path, TEXT, TEXT)


def test_unreadable_file(tmp_path):
    (tmp_path / "b.npz").write_text("no zip")
    with pytest.raises(UserError, match="cannot be read"):
        read_batch(tmp_path / "b.npz", TEXT, TEXT)
    np.save(tmp_path / "c.npy", np.ones(3))
    with pytest.raises(UserError, match="cannot be read"):
        read_batch(tmp_path / "c.npy", TEXT, TEXT)


def test_segments_restart_positions_and_inputs():
    segments = np.array([[1, 1, 2, 3, 3, 3]])
    assert positions(segments).tolist() == [[0, 1, 0, 0, 1, 2]]
    assert shift_right(np.array([[4, 5, 6, 7, 8, 9]]), segments).tolist() == [[0, 4, 0, 0, 7, 8]]
