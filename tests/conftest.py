"""Fixtures for every test: one CPU device here, as many as wanted in a subprocess."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile

# Before anything imports jax: tests run on the CPU unless somebody asks for another device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest

import helpers

# Long files first: with them last, one core would wait for the other.
_FIRST = ("integration", "test_readme.py", "test_verb.py", "test_layers_together.py")


def pytest_configure(config: pytest.Config) -> None:
    """Makes less of compiling, which is most of the fast tests' time.

    All processes of a test run, and those that they start, share what they have compiled; and XLA
    takes less trouble over it. The slow tests' programs get the trouble that users' get. What the
    environment says of either stays.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # A worker finds that of its controller.
        folder = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    flags = os.environ.get("XLA_FLAGS", "")
    level = "xla_backend_optimization_level"
    theirs = level in flags or bool(flags) and not flags.startswith("--")  # a file of flags
    if "not slow" in config.getoption("markexpr") and not theirs:
        os.environ["XLA_FLAGS"] = f"{flags} --{level}=1".strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(name in item.path.parts for name in _FIRST))


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
    env = {"VISHWAM_CACHE_DIR": str(folder)}
    # All processes of the test run share it; the first that comes writes it.
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            done = helpers.vishwam("cache", "--task_or_mixture=quickstart", env=env)
            assert done.returncode == 0, done.stderr
            (folder / "done").touch()
    return env
