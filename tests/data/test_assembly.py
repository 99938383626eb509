"""What an array means where an example lacks it."""

from __future__ import annotations

import numpy as np
import pytest

from vishwam_t5x.core.batch import BatchSpec, DataPosition, HistorySpec, ModalityLengths
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.data.packing_plan import Packer


def test_codes_are_hidden_only_where_the_example_says():
    spec = BatchSpec.from_feature_lengths(
        2, {"inputs": 4, "targets": 8}, ("text",), ("text", "image"), {}, task_masks=("image",))
    assert [name for name in spec.arrays() if name.endswith("task_mask")] == [
        "targets/image/task_mask"]
    tokens, codes = np.asarray([5, 1], np.int32), np.asarray([4, 5, 6], np.int32)
    hidden = np.asarray([0, 1, 1], np.int32)
    base = {"inputs/text/tokens": tokens, "targets/image/targets": codes}
    examples = ({**base, "targets/image/task_mask": hidden}, base)
    placed = [PlacedExample(0, example_lengths(example), example) for example in examples]
    placed.append(PlacedExample(1, example_lengths(base), base))
    arrays = assemble(spec, 2, placed)
    np.testing.assert_array_equal(arrays["targets/image/task_mask"],
                                  [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(arrays["targets/image/mask"],
                                  [[1] * 6 + [0] * 2, [1] * 3 + [0] * 5])


def history_spec(budget: float | None = None, rows: int = 2) -> BatchSpec:
    """Frames of three patches that become two slots each; four frames a row."""
    return BatchSpec.from_feature_lengths(
        rows, {"inputs": 12, "targets": 4, "inputs/image_history": 8},
        ("audio", "image_history", "text"), ("text",), {"image_history": 5, "audio": 2},
        histories={"image_history": HistorySpec(3, 2, budget)})


def test_frames_take_their_slots_in_packed_rows():
    spec = history_spec()
    assert list(spec.input_capacities) == ["text", "image_history", "audio"], "the model's order"
    shapes = {name: value.shape for name, value in spec.arrays().items()}
    assert shapes["inputs/image_history/input"] == (2, 4, 3, 5)
    assert shapes["inputs/image_history/segment_ids"] == (2, 4)

    def example(frames: int) -> dict[str, np.ndarray]:
        return {"inputs/text/tokens": np.asarray([7, 1], np.int32),
                "inputs/image_history/input": np.full((frames, 3, 5), frames, np.float32),
                "targets/text/targets": np.asarray([4, 1], np.int32)}

    hidden = {**example(1), "inputs/image_history/mask": np.asarray([[1, 1, 0]], np.int32)}
    placed = [PlacedExample(0, example_lengths(each, spec), each) for each in (example(2), hidden)]
    assert placed[0].lengths == ModalityLengths({"text": 2, "image_history": 4}, {"text": 2})
    arrays = assemble(spec, 2, placed)
    prefix = "inputs/image_history"
    np.testing.assert_array_equal(arrays[f"{prefix}/segment_ids"], [[1, 1, 2, 0], [0] * 4])
    np.testing.assert_array_equal(arrays[f"{prefix}/frame_ids"], [[0, 1, 0, 0], [0] * 4])
    np.testing.assert_array_equal(arrays[f"{prefix}/mask"][0],
                                  [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(arrays[f"{prefix}/pos_ids"][0, :3], [[0, 1, 2]] * 3)
    np.testing.assert_array_equal(arrays[f"{prefix}/input"][0, :, 0, 0], [2, 2, 1, 0])
    # Text has slots 0 to 11, frames 12 to 19: two tokens, two frames, two tokens, a frame.
    np.testing.assert_array_equal(arrays["inputs/row/index"],
                                  [[0, 1, 12, 13, 14, 15, 2, 3, 16, 17, -1, -1], [-1] * 12])


class _Examples:
    tasks = (type("Task", (), {"name": "videos"})(),)

    def __init__(self, frames: list[int]) -> None:
        self.frames, self.num_examples = frames, len(frames)

    def locate(self, example):
        return 0, example

    def clean_lengths(self, example):
        return {"frames": self.frames[example]}


class _Objective:
    def lengths(self, clean_lengths, *, seed, example):
        return ModalityLengths({"text": 1, "image_history": 2 * clean_lengths["frames"]},
                               {"text": 1})


def test_a_batch_keeps_to_its_budget_of_frames():
    frames = [2, 1, 2, 0, 1, 3]
    packer = Packer(_Examples(frames), _Objective(), history_spec(budget=1.5), seed=0)
    first = packer.plan(DataPosition())
    assert first.example_ids == (0, 1, 3) and first.end.carried == (2, 4, 5)
    second = packer.plan(first.end)
    assert second.example_ids == (2, 4)
    third = packer.plan(second.end)
    assert third.example_ids == (5,) and packer.plan(third.end) is None
    free = Packer(_Examples(frames), _Objective(), history_spec(), seed=0).plan(DataPosition())
    assert len(free.example_ids) > 3
    with pytest.raises(UserError, match="more frames than 2 rows"):
        Packer(_Examples([4]), _Objective(), history_spec(budget=1.5), seed=0).plan(DataPosition())


def test_a_history_has_room_for_whole_frames():
    with pytest.raises(UserError, match="whole frames"):
        BatchSpec.from_feature_lengths(
            1, {"inputs": 8, "targets": 4, "inputs/image_history": 7}, ("image_history",),
            ("text",), {"image_history": 5}, histories={"image_history": HistorySpec(3, 2)})


def test_a_row_has_no_more_images_than_the_model_takes():
    spec = BatchSpec.from_feature_lengths(
        2, {"inputs": 12, "targets": 12}, ("text", "image"), ("text",), {"image": 5},
        most_a_row={"image": 2})

    class Objective:
        def lengths(self, clean_lengths, *, seed, example):
            image = {"image": 1} if clean_lengths["frames"] else {}
            return ModalityLengths({"text": 1, **image}, {"text": 1})

    packer = Packer(_Examples([1, 1, 1, 0, 1, 1]), Objective(), spec, seed=0)
    rows = packer.plan(DataPosition()).rows
    assert [[place.example for place in row] for row in rows] == [[0, 1, 3], [2, 4]]
    one = BatchSpec(2, 12, 12, {"text": 12, "image": 12}, {"text": 12}, {"image": 5})
    rows = Packer(_Examples([1] * 6), Objective(), one, seed=0).plan(DataPosition()).rows
    assert [len(row) for row in rows] == [6, 0]
