"""Random shifts, and what an augmentation may not do."""

from __future__ import annotations

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.augmentation import RandomShift, augment, shift


def test_shift_moves_and_fills_with_zero():
    image = np.arange(1, 7).reshape(2, 3)
    assert shift(image, 0, 0).tolist() == image.tolist()
    assert shift(image, 1, 0).tolist() == [[0, 0, 0], [1, 2, 3]]
    assert shift(image, -1, 1).tolist() == [[0, 4, 5], [0, 0, 0]]
    assert shift(image, 0, -2).tolist() == [[3, 0, 0], [6, 0, 0]]
    assert shift(image, 2, 0).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_every_shift_is_equally_likely_and_repeatable():
    image = np.zeros((7, 7, 1), np.float32)
    image[3, 3] = 1.0
    step = RandomShift(1)
    where = [int(step(image, np.random.default_rng(i)).argmax()) for i in range(1_800)]
    values, counts = np.unique(where, return_counts=True)
    assert values.tolist() == [16, 17, 18, 23, 24, 25, 30, 31, 32]
    assert np.sum((counts - 200) ** 2 / 200) < 26.1  # 8 degrees of freedom, 99.9 %
    assert where[7] == int(step(image, np.random.default_rng(7)).argmax())


def test_augmentations_may_not_change_shape_or_dtype():
    image, rng = np.zeros((4, 4, 3), np.uint8), np.random.default_rng(0)
    flip = lambda image, rng: image[:, ::-1]
    assert augment(image, [flip, RandomShift(2)], rng).dtype == np.uint8
    with pytest.raises(UserError, match="shape or dtype"):
        augment(image, [lambda image, rng: image[1:]], rng)
    with pytest.raises(UserError, match="uint8 -> "):
        augment(image, [lambda image, rng: image / 255.0], rng)


@pytest.mark.parametrize("pixels", [-1, 1.5, True])
def test_unusable_shift(pixels):
    with pytest.raises(UserError):
        RandomShift(pixels)


def test_some_images_stay_where_they_are():
    image = np.arange(16, dtype=np.float32).reshape(4, 4, 1) + 1
    step = RandomShift(pixels=1, probability=0.5)
    same = [np.array_equal(step(image, np.random.default_rng(seed)), image) for seed in range(400)]
    # Half are not moved, and one ninth of the others by nothing.
    assert 0.46 < np.mean(same) < 0.65
    with pytest.raises(UserError, match="probability"):
        RandomShift(probability=1.5)
