"""The quickstart's cache, written once for all tests of a session."""

import pytest

import helpers


@pytest.fixture(scope="session")
def quickstart_cache(tmp_path_factory):
    """Environment variables under which the quickstart's examples are cached."""
    folder = tmp_path_factory.mktemp("quickstart_cache")
    env = {"VISHWAM_CACHE_DIR": str(folder),
           "JAX_COMPILATION_CACHE_DIR": str(folder / "compilation")}
    done = helpers.vishwam("cache", "--task_or_mixture=quickstart", env=env)
    assert done.returncode == 0, done.stderr
    return env
