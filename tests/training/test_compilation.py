"""Compiling ahead: what it leaves behind."""

from __future__ import annotations

import sys

import pytest

from helpers import run_python

FREES_MUCH = """
import ctypes, psutil
from vishwam_t5x.training.compilation import return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 64 * 1024  # too small for a mapping of its own
blocks = [libc.malloc(size) for _ in range(3200)]
for block in blocks:
    ctypes.memset(block, 1, size)
last = libc.malloc(size)  # keeps the heap from shrinking by itself
for block in blocks:
    libc.free(block)
before = psutil.Process().memory_info().rss
return_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_freed_memory_goes_back_to_the_operating_system(run_python):
    assert int(run_python(FREES_MUCH)) > 150e6


def test_the_step_is_compiled_with_the_options_of_its_devices():
    """An option that the CPU's compiler must obey: it dumps what it compiles."""
    run_python("""
        import jax, jax.numpy as jnp, pathlib, tempfile, types
        from vishwam_t5x.parallelism import xla_flags
        from vishwam_t5x.training import compilation
        folder = tempfile.mkdtemp()
        xla_flags.SETTINGS = {"cpu": (xla_flags.Setting("xla_dump_to", folder, "a test"),)}
        mesh = jax.make_mesh((2,), ("data",))
        compilation.lower_step = lambda *_: jax.jit(lambda x: x * 3).lower(jnp.ones(4))
        compilation.compile_step(None, types.SimpleNamespace(mesh=mesh), {})
        assert any(pathlib.Path(folder).iterdir())
        """, devices=2)
