"""What an array means where an example lacks it."""

from __future__ import annotations

import numpy as np

from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths


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
