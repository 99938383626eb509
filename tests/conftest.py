"""Fixtures for every test: one CPU device here, as many as wanted in a subprocess."""

from __future__ import annotations

import fcntl
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
def quickstart_cache(tmp_path_factory, worker_id):
    """Environment variables under which the quickstart's examples are cached, once a session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "quickstart_cache"
    folder.mkdir(exist_ok=True)
    env = {"VISHWAM_CACHE_DIR": str(folder),
           "JAX_COMPILATION_CACHE_DIR": str(folder / "compilation")}
    # All processes of the test run share it; the first that comes writes it.
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            done = helpers.vishwam("cache", "--task_or_mixture=quickstart", env=env)
            assert done.returncode == 0, done.stderr
            (folder / "done").touch()
    return env
