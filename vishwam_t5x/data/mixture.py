"""Which task and record is global example i: stateless mixing and shuffling with random access.

The order is a pure function of (seed, task names and sizes, rates); nothing is stored, no host is
known, any example can be asked for first. Tasks take turns in exact proportion to their rates, by
the nested-floor rule that grain's `MapDataset.mix` uses (a test compares the two); within a task
every epoch is a new permutation.

Measured on one x86 core: grain's range -> shuffle -> repeat -> mix answers in 33 us an example, in
Python; the same arithmetic here over blocks of NumPy integers in 1 us, and a newer grain cannot
change the order of a run that is to be resumed.
"""

from __future__ import annotations

import fractions
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.records import TaskRecords

_BLOCK = 4096
"""Consecutive examples located together."""
_MAX_PROPORTION_SUM = 2**24
_NUM_ROUNDS = 8


def whole_proportions(rates: Sequence[float]) -> list[int]:
    """Returns the smallest whole numbers in proportion to `rates`.

    Exact where the rates are simple fractions; otherwise to 2**-24 of their sum, and at least 1.
    """
    exact = [fractions.Fraction(rate).limit_denominator(10**6) for rate in rates]
    scale = math.lcm(*(part.denominator for part in exact))
    whole = [int(part * scale) for part in exact]
    common = math.gcd(*whole)
    if common and min(whole) > 0 and sum(whole) // common <= _MAX_PROPORTION_SUM:
        return [part // common for part in whole]
    total = math.fsum(rates)
    return [max(1, round(rate / total * _MAX_PROPORTION_SUM)) for rate in rates]


def interleave(examples: Int[np.ndarray, "N"], proportions: Sequence[int]
               ) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Returns (dataset, number within that dataset) of each example of an endless interleaving.

    Of the first k examples, floor(k (S - p) / S) do not belong to a dataset of proportion p among
    S; those are dealt to the others by the same rule. The dataset of example k is the one whose
    count grows from k to k + 1.
    """
    remaining = sum(proportions)
    assert not examples.size or int(examples.max()) < 2**62 // remaining
    which = np.full(examples.shape, -1, np.int64)
    number = np.zeros(examples.shape, np.int64)
    before, after = examples.astype(np.int64), examples.astype(np.int64) + 1
    for dataset, proportion in enumerate(proportions):
        others_before = before * (remaining - proportion) // remaining
        others_after = after * (remaining - proportion) // remaining
        mine = (which < 0) & (before - others_before != after - others_after)
        which[mine] = dataset
        number[mine] = (before - others_before)[mine]
        remaining -= proportion
        before, after = others_before, others_after
        if not remaining:
            break
    assert (which >= 0).all()
    return which, number


def count_before(example: int, proportions: Sequence[int]) -> list[int]:
    """Returns how many of the examples below a number `interleave` gives to each dataset."""
    counts, remaining, left = [], sum(proportions), example
    for proportion in proportions:
        others = left * (remaining - proportion) // remaining
        counts.append(left - others)
        left, remaining = others, remaining - proportion
    return counts


def permute(indices: Int[np.ndarray, "N"], size: int, key: Int[np.ndarray, "N"]
            ) -> Int[np.ndarray, "N"]:
    """Returns where a keyed pseudo-random permutation of range(size) sends each index.

    A Feistel network on the smallest power of two >= size, walked until it lands below size (Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): under two steps on average. Being
    our own it is the same for ever, on any version of any library.

    Args:
        indices: int64, each in [0, size).
        size: how many there are.
        key: uint64, the permutation's key for each index (e.g. one per epoch).
    """
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    values = indices.astype(np.uint64)
    keys = np.broadcast_to(np.asarray(key, np.uint64), values.shape)
    todo = np.arange(values.size)
    while todo.size:
        low, high = values[todo] & low_mask, values[todo] >> low_bits
        for turn in range(_NUM_ROUNDS):
            if turn % 2:
                low = low ^ (_mix64(high + keys[todo] + np.uint64(turn << 40)) & low_mask)
            else:
                high = high ^ (_mix64(low + keys[todo] + np.uint64(turn << 40)) & high_mask)
        values[todo] = high << low_bits | low
        todo = todo[values[todo] >= size]
    return values.astype(np.int64)


def _mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2**64 as NumPy wraps."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Mixture:
    """Tasks mixed by rate: an endless shuffled stream, or every record once in order."""

    def __init__(self, tasks: Sequence[TaskRecords], rates: Sequence[float], seed: int = 0,
                 shuffle: bool = True, repeat: bool = True) -> None:
        """Args:
            tasks: the tasks, each with at least one record.
            rates: relative rates, positive; only their ratios matter.
            seed: of the shuffle.
            shuffle: whether records come in a new random order each epoch.
            repeat: True: endless, mixed by rate. False: finite; every record of every task exactly
                once, task after task (in one random order if `shuffle`), rates unused: evaluation.

        Raises:
            UserError: no task, a task without records, or a rate that is not a positive number.
        """
        if not tasks or len(tasks) != len(rates):
            raise UserError("a mixture needs tasks, and a rate for each",
                            got=f"{len(tasks)} tasks, {len(rates)} rates")
        for task, rate in zip(tasks, rates, strict=True):
            if not (math.isfinite(rate) and rate > 0):
                raise UserError(f"the rate of task '{task.name}' must be a positive number",
                                got=repr(rate), fix="leave the task out of the mixture instead")
            if task.num_records == 0:
                raise UserError(
                    f"task '{task.name}' has no records", got="a split of length 0",
                    fix="leave it out of the mixture, or see its preprocessors' filters; "
                        f"then vishwam cache --task_or_mixture={task.name} --overwrite")
        self.tasks, self.rates, self.seed = tuple(tasks), tuple(map(float, rates)), int(seed)
        self.shuffle, self.repeat = shuffle, repeat
        self._sizes = [task.num_records for task in tasks]
        self._proportions = whole_proportions(rates)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)
        # Several callers (planner, readers, inspect) look at neighbouring places at one time.
        self._block = functools.lru_cache(maxsize=16)(self._compute_block)

    @property
    def num_examples(self) -> int | None:
        """How many examples there are; None if endless."""
        return None if self.repeat else int(self._starts[-1])

    def locate(self, example: int) -> tuple[int, int]:
        """Returns (index into `tasks`, record number) of a global example number.

        Raises:
            IndexError: beyond the end of a finite mixture.
        """
        if example < 0 or (not self.repeat and example >= self._starts[-1]):
            raise IndexError(f"example {example} of a mixture of {self.num_examples}")
        which, record = self._block(example // _BLOCK)
        return which[example % _BLOCK], record[example % _BLOCK]

    def locate_many(self, examples: Int[np.ndarray, "N"]
                    ) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """`locate` for an int64 array of example numbers."""
        examples = np.asarray(examples, np.int64)
        if not self.repeat:
            if self.shuffle:
                examples = permute(examples, int(self._starts[-1]), self._key("", examples * 0))
            which = np.searchsorted(self._starts, examples, side="right") - 1
            return which, examples - self._starts[which]
        which, number = interleave(examples, self._proportions)
        record = np.zeros_like(number)
        for index, (task, size) in enumerate(zip(self.tasks, self._sizes, strict=True)):
            mine = which == index
            epoch, within = np.divmod(number[mine], size)
            record[mine] = (permute(within, size, self._key(task.name, epoch)) if self.shuffle
                            else within)
        return which, record

    def count_before(self, example: int) -> list[int]:
        """Returns how many examples below a number each task has, in an endless mixture."""
        assert self.repeat
        return count_before(example, self._proportions)

    def clean_lengths(self, example: int) -> dict[str, int]:
        """Returns the length of each feature of an example, without reading it."""
        task, record = self.locate(example)
        return self.tasks[task].clean_lengths(record)

    def clean_lengths_many(self, examples: Int[np.ndarray, "N"]
                           ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yields, task by task, (example numbers, {feature: lengths of those examples})."""
        which, record = self.locate_many(examples)
        for index in np.unique(which).tolist():
            names, table = self.tasks[index].length_table
            mine = which == index
            rows = table[record[mine]]
            yield np.asarray(examples)[mine], dict(zip(names, rows.T, strict=True))

    def read(self, example: int) -> dict[str, Any]:
        """Reads an example.

        Raises:
            DamagedRecord: it cannot be used.
        """
        task, record = self.locate(example)
        return self.tasks[task].read(record)

    def release(self, before: int) -> None:
        """Says that no example below `before` will be asked for again: of no use to a cache."""

    def _compute_block(self, block: int) -> tuple[list[int], list[int]]:
        stop = (block + 1) * _BLOCK
        if not self.repeat:
            stop = min(stop, int(self._starts[-1]))
        which, record = self.locate_many(np.arange(block * _BLOCK, stop))
        return which.tolist(), record.tolist()

    def _key(self, name: str, epoch: np.ndarray) -> np.ndarray:
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        base = np.uint64(int.from_bytes(digest, "little"))
        return _mix64(base + epoch.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
