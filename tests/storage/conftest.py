"""A bucket for code of this process that asks for it over Google's own library."""

from __future__ import annotations

import itertools

import pytest
from storage import emulator

_numbers = itertools.count()


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("gcp_storage_emulator")
    with emulator.serve() as port:
        yield port


@pytest.fixture
def bucket_here(served, monkeypatch):
    """A folder of the emulator's bucket, which this process takes for Google's while it tests."""
    for name, value in emulator.variables(served).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return emulator.url(f"here-{next(_numbers)}")
