"""Random numbers that are a pure function of what they are for.

Host side: Philox, a counter-based generator, keyed by (seed, stream) with the example number as its
counter, so example i draws the same numbers on any host, in any order, after any restart.
Device side: JAX keys folded with names and step numbers.
"""

from __future__ import annotations

import functools
import hashlib

import jax
import numpy as np


@functools.lru_cache(maxsize=4096)
def _stream_key(seed: int, stream: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def example_generator(seed: int, example: int, stream: str) -> np.random.Generator:
    """Returns the generator of example number `example` for the purpose named `stream`.

    The example number is the high word of the 256-bit counter, so two examples of one stream never
    share a block of numbers (each has 2**192 blocks of its own).
    """
    bits = np.random.Philox(key=_stream_key(int(seed), stream), counter=(0, 0, 0, int(example)))
    return np.random.Generator(bits)


def key_for(seed: int, *names: str | int) -> jax.Array:
    """Returns a typed JAX key for `names` under `seed`: the same names give the same key."""
    key = jax.random.key(seed)
    for name in names:
        if isinstance(name, int):
            key = jax.random.fold_in(key, name)
        else:
            digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
            key = jax.random.fold_in(key, int.from_bytes(digest, "little"))
    return key
