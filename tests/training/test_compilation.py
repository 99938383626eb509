"""Compiling ahead: what it leaves behind."""

from __future__ import annotations

import sys

import pytest

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
