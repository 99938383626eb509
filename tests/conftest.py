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


@pytest.fixture(scope="session")
def quickstart_cache(tmp_path_factory):
    """Environment variables under which the quickstart's examples are cached, once a session."""
    folder = tmp_path_factory.mktemp("quickstart_cache")
    env = {"VISHWAM_CACHE_DIR": str(folder),
           "JAX_COMPILATION_CACHE_DIR": str(folder / "compilation")}
    done = helpers.vishwam("cache", "--task_or_mixture=quickstart", env=env)
    assert done.returncode == 0, done.stderr
    return env
