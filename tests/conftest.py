"""Fixtures for every test: one CPU device here, as many as wanted in a subprocess."""

from __future__ import annotations

import functools
import os

# Before anything imports jax: tests run on the CPU unless somebody asks for another device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest

import helpers


@pytest.fixture
def run_python():
    """`helpers.run_python`: run code in a process of its own, returns its standard output."""
    return helpers.run_python


@pytest.fixture
def eight_devices():
    """`helpers.run_python` with eight CPU devices."""
    return functools.partial(helpers.run_python, devices=8)
