"""T5's span corruption: its counts, its distribution, and that nothing is lost."""

from __future__ import annotations

import collections
import itertools
import pathlib
import re

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives import span_corruption as spans

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "t5_span_masks.npz"
SENTINELS = np.arange(999, 799, -1).astype(np.int32)


def starts(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))


def golden_cases():
    with np.load(GOLDEN) as file:
        for name in file.files:
            mean, percent, length = map(int, re.fullmatch(
                r"[RX]_mu(\d+)_r(\d+)_L(\d+)", name).groups())
            masks = np.unpackbits(file[name], axis=-1)[:, :length].astype(bool)
            yield pytest.param(mean, percent / 100, length, masks, id=name)


@pytest.mark.parametrize("mean,density,length,masks", list(golden_cases()))
def test_counts_are_those_of_t5(mean, density, length, masks):
    noise, count = spans.num_noise_and_spans(length, density, mean)
    assert masks.shape == (8, length)
    assert {int(mask.sum()) for mask in masks} == {noise}
    assert {len(starts(mask)) for mask in masks} == {count}
    for example in range(50):
        mask = spans.noise_mask(length, density, mean, np.random.default_rng(example))
        assert mask.shape == (length,) and mask.dtype == bool
        assert (int(mask.sum()), len(starts(mask))) == (noise, count)
        assert not mask[0] and mask[-1]


@pytest.mark.parametrize("mean,density,length,masks", list(golden_cases()))
def test_span_lengths_are_distributed_as_those_of_t5(mean, density, length, masks):
    """Mean length of the first kept span: the same expectation, within four standard errors."""
    ours = np.array([starts(spans.noise_mask(length, density, mean, np.random.default_rng(i)))[0]
                     for i in range(400)])
    theirs = np.array([starts(mask)[0] for mask in masks])
    error = np.sqrt(ours.var() * (1 / len(ours) + 1 / len(theirs)))
    assert abs(ours.mean() - theirs.mean()) <= 4 * error + 1e-9


def test_compositions_are_uniform():
    """Chi-square over the 20 ways to cut 7 items into 4 parts (19 degrees of freedom)."""
    rng = np.random.default_rng(0)
    draws = 8_000
    counts = collections.Counter(tuple(spans.random_composition(7, 4, rng)) for _ in range(draws))
    ways = [p for p in itertools.product(range(1, 5), repeat=4) if sum(p) == 7]
    assert set(counts) == set(ways) and len(ways) == 20
    expected = draws / len(ways)
    chi_square = sum((counts[way] - expected) ** 2 / expected for way in ways)
    assert chi_square < 43.8  # 99.9 % point; the seed is fixed


def test_masks_are_uniform():
    """Kept and hidden spans are cut independently: 3 x 2 masks of 7 tokens, 3 hidden, 2 spans."""
    rng = np.random.default_rng(1)
    assert spans.num_noise_and_spans(7, 0.43, 1.5) == (3, 2)
    counts = collections.Counter(
        spans.noise_mask(7, 0.43, 1.5, rng).tobytes() for _ in range(6_000))
    assert len(counts) == 6
    assert sum((count - 1_000) ** 2 / 1_000 for count in counts.values()) < 20.5  # 5 d.o.f., 99.9 %


@pytest.mark.parametrize("density,mean", [(0.15, 3.0), (0.5, 3.0), (0.9, 1.0), (0.01, 64.0)])
def test_lengths_are_known_without_sampling(density, mean):
    lengths = np.arange(0, 200)
    noise, count = spans.num_noise_and_spans_many(lengths, density, mean)
    for length in lengths.tolist():
        assert (noise[length], count[length]) == spans.num_noise_and_spans(length, density, mean)
        tokens = np.arange(length, dtype=np.int32)
        mask = spans.noise_mask(length, density, mean, np.random.default_rng(length))
        inputs, targets = spans.corrupt(tokens, mask, SENTINELS)
        assert (len(inputs), len(targets)) == spans.span_lengths(length, density, mean)


def restore(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """Puts the target's spans back where the input has their sentinels."""
    pieces, current = {}, None
    for token in targets.tolist():
        if token in SENTINELS:
            current = pieces.setdefault(token, [])
        else:
            current.append(token)
    return [token for item in inputs.tolist()
            for token in (pieces[item] if item in SENTINELS else [item])]


def test_input_and_target_together_are_the_text():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        length = int(rng.integers(0, 40))
        tokens = rng.integers(3, 800, length).astype(np.int32)
        mask = rng.random(length) < rng.random()  # Any mask, not only those T5 draws.
        inputs, targets = spans.corrupt(tokens, mask, SENTINELS)
        assert inputs.dtype == targets.dtype == np.int32
        assert restore(inputs, targets) == tokens.tolist()
        used = [token for token in inputs.tolist() if token in SENTINELS]
        assert used == SENTINELS[:len(used)].tolist() == [
            token for token in targets.tolist() if token in SENTINELS]


def test_example_by_hand():
    tokens = np.array([10, 11, 12, 13, 14, 15], np.int32)
    mask = np.array([0, 1, 1, 0, 0, 1], bool)
    inputs, targets = spans.corrupt(tokens, mask, SENTINELS)
    assert inputs.tolist() == [10, 999, 13, 14, 998]
    assert targets.tolist() == [999, 11, 12, 998, 15]


@pytest.mark.parametrize("length", [0, 1])
def test_texts_too_short_to_corrupt_are_given_whole(length):
    mask = spans.noise_mask(length, 0.5, 3.0, np.random.default_rng(0))
    assert mask.tolist() == [False] * length
    inputs, targets = spans.corrupt(np.full((length,), 7, np.int32), mask, SENTINELS)
    assert inputs.tolist() == [7] * length and targets.tolist() == []
    assert spans.span_lengths(length, 0.5, 3.0) == (length, 0)


def test_two_tokens_hide_the_second():
    assert spans.noise_mask(2, 0.15, 3.0, np.random.default_rng(0)).tolist() == [False, True]


def test_more_spans_than_sentinels():
    tokens = np.arange(100, dtype=np.int32)
    mask = spans.noise_mask(100, 0.5, 1.0, np.random.default_rng(0))
    with pytest.raises(UserError, match="num_sentinels") as caught:
        spans.corrupt(tokens, mask, SENTINELS[:49])
    assert "50 spans in a text of 100 tokens, 49 sentinels" in str(caught.value)
    spans.corrupt(tokens, mask, SENTINELS[:50])


@pytest.mark.parametrize("density,mean", [(0.0, 3.0), (1.0, 3.0), (0.5, 0.5), (float("nan"), 3.0)])
def test_unusable_parameters(density, mean):
    with pytest.raises(UserError):
        spans.noise_mask(10, density, mean, np.random.default_rng(0))


def test_suffix_lengths():
    assert [spans.suffix_length(n, 0.25) for n in (0, 1, 2, 3, 4, 100)] == [0, 1, 1, 1, 1, 25]
    assert [spans.suffix_length(n, 1.0) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]
    lengths = np.repeat(np.arange(60), 20)
    shares = np.tile(np.linspace(0, 1, 20), 60)
    assert spans.suffix_length_many(lengths, shares).tolist() == [
        spans.suffix_length(n, share) for n, share in zip(lengths.tolist(), shares, strict=True)]
