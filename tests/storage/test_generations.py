"""An object of a bucket that only one of several can replace."""

from __future__ import annotations

import pytest

from vishwam_t5x.core.generations import Changed, GuardedObject


def test_replaced_by_one_of_two(bucket_here):
    mine, theirs = (GuardedObject(f"{bucket_here}/lock", 30) for _ in range(2))
    assert mine.read() == (None, 0)
    first = mine.write(b"a", 0)
    with pytest.raises(Changed):
        theirs.write(b"b", 0)
    assert theirs.read() == (b"a", first)
    second = theirs.write(b"b", first)
    with pytest.raises(Changed):
        mine.write(b"c", first)
    mine.remove(first)
    assert mine.read() == (b"b", second) and second != first
    theirs.remove(second)
    theirs.remove(second)
    assert mine.read() == (None, 0)
