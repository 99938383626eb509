"""The order of examples: mixed by rate, shuffled anew each epoch, addressable at random."""

from __future__ import annotations

import collections

import grain
import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.mixture import Mixture, permute, whole_proportions


class Task:
    """Lengths are the record numbers plus one."""

    features: dict = {}

    def __init__(self, name, num_records):
        self.name, self.num_records = name, num_records

    def clean_lengths(self, record):
        return {"text": record + 1}

    def read(self, record):
        return {"text": np.full((record + 1,), record, np.int32)}


TASKS = [Task("a", 10), Task("b", 37), Task("c", 3)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permutation_is_one_to_one(size):
    image = permute(np.arange(size), size, np.uint64(12345))
    assert sorted(image) == list(range(size))


def test_permutations_of_different_keys_are_all_equally_likely():
    seen = collections.Counter(
        tuple(permute(np.arange(4), 4, np.uint64(key * 0x9E3779B97F4A7C15 % 2**64)))
        for key in range(4800))
    assert len(seen) == 24
    # 200 expected of each, standard deviation 14: six of them.
    assert max(abs(count - 200) for count in seen.values()) < 84


def test_shuffle_leaves_no_neighbours_together():
    image = permute(np.arange(10_000), 10_000, np.uint64(7))
    assert np.mean(np.abs(np.diff(image)) == 1) < 0.002
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05


def test_each_epoch_of_each_task_has_every_record_once_in_a_new_order():
    mixture = Mixture(TASKS, [1, 2, 0.5], seed=3)
    seen = collections.defaultdict(list)
    for example in range(2000):
        task, record = mixture.locate(example)
        seen[task].append(record)
    for task, records in seen.items():
        size = TASKS[task].num_records
        epochs = [records[at:at + size] for at in range(0, len(records) - size + 1, size)]
        assert len(epochs) > 5
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        if size > 3:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_rates_hold_in_every_window():
    mixture = Mixture(TASKS, [0.5, 0.3, 0.2], seed=0)
    which = np.array([mixture.locate(example)[0] for example in range(1000)])
    for begin in range(0, 1000, 100):
        counts = np.bincount(which[begin:begin + 100], minlength=3)
        np.testing.assert_allclose(counts, [50, 30, 20], atol=2)


def test_examples_before_a_number_are_counted_by_task():
    mixture = Mixture(TASKS, [0.5, 0.3, 0.2], seed=0)
    counts = [0, 0, 0]
    for example in range(300):
        assert mixture.count_before(example) == counts
        counts[mixture.locate(example)[0]] += 1


def test_interleaving_is_the_one_of_grain():
    weights = [3, 2, 1]
    starts = np.cumsum([0, *(task.num_records for task in TASKS)])
    theirs = grain.MapDataset.mix(
        [grain.MapDataset.range(int(begin), int(end)).repeat()
         for begin, end in zip(starts, starts[1:], strict=False)], weights=weights)
    ours = Mixture(TASKS, weights, shuffle=False)
    for example in [*range(500), 10**6, 10**9 + 7]:
        task, record = ours.locate(example)
        assert theirs[example] == starts[task] + record


def test_the_order_is_what_it_always_was():
    # A change here breaks the resumption of every run ever saved.
    mixture = Mixture(TASKS, [1, 2, 0.5], seed=3)
    assert [mixture.locate(example) for example in range(8)] == GOLDEN


def test_random_access_equals_sequential_access():
    one, other = (Mixture(TASKS, [1, 1, 1], seed=9) for _ in range(2))
    forward = [one.locate(example) for example in range(9000)]
    backward = [other.locate(example) for example in reversed(range(9000))]
    assert forward == backward[::-1]
    which, record = one.locate_many(np.arange(9000))
    assert forward == list(zip(which.tolist(), record.tolist(), strict=True))


def test_seeds_and_task_names_change_the_order():
    def order(seed, names):
        tasks = [Task(name, 50) for name in names]
        mixture = Mixture(tasks, [1, 1], seed=seed)
        return [mixture.locate(example) for example in range(100)]

    assert order(0, "ab") == order(0, "ab")
    assert order(0, "ab") != order(1, "ab")
    both = order(0, "ab")
    assert [r for t, r in both if t == 0] != [r for t, r in both if t == 1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_evaluation_reads_everything_once(shuffle):
    mixture = Mixture(TASKS, [5, 1, 1], shuffle=shuffle, repeat=False, seed=1)
    places = [mixture.locate(example) for example in range(50)]
    assert mixture.num_examples == 50
    everything = [(task, record) for task in range(3) for record in range(TASKS[task].num_records)]
    assert (places != everything) == shuffle
    assert sorted(places) == everything
    with pytest.raises(IndexError):
        mixture.locate(50)


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_not_positive_is_refused(rate):
    with pytest.raises(UserError, match="'b'"):
        Mixture(TASKS, [1, rate, 1])


def test_a_task_without_records_is_refused():
    with pytest.raises(UserError, match="'empty'"):
        Mixture([*TASKS, Task("empty", 0)], [1, 1, 1, 1])


def test_proportions():
    assert whole_proportions([0.3, 0.2, 0.1]) == [3, 2, 1]
    assert whole_proportions([1 / 3, 2 / 3]) == [1, 2]
    assert whole_proportions([1e-9, 1.0])[0] == 1


GOLDEN = [(0, 3), (1, 27), (1, 26), (0, 7), (1, 0), (1, 12), (2, 2), (0, 1)]
