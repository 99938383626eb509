"""What single decisions are worth: two ways of doing the same, taking turns in one process.

usage: python benchmarks/ratios.py [--windows=7]

A ratio is the median over windows of (CPU time the other way) / (CPU time our way), the two taken
one right after the other; above 1 our way is cheaper. Bytes are temporaries of the compiled
program.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import Figures, write_text_cache
from workload import Workload, milliseconds

from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.objectives.chunked_loss import chunked_cross_entropy_sums, num_chunks_for
from vishwam_t5x.objectives.losses import cross_entropy_sums

Call = Callable[[], Any]


def compare(figures: Figures, name: str, other: Call, ours: Call, windows: int, calls: int,
            work: tuple[float, float] = (1.0, 1.0), **more: Any) -> None:
    """Notes the ratio of CPU time per unit of work; `work` is what one call of each does."""
    ratios, others, mine = [], [], []
    for window in range(windows + 1):
        there, here = milliseconds(other, calls)[0], milliseconds(ours, calls)[0]
        if window:  # the first one warms up
            ratios.append((there / work[0]) / (here / work[1]))
            others.append(there)
            mine.append(here)
    figures.add(f"{name}_cpu_ratio", ratios, "times", **more)
    figures.add(f"{name}_other_cpu", others, "ms")
    figures.add(f"{name}_ours_cpu", mine, "ms")


def temporaries(compiled: Any) -> int:
    """Returns the bytes of temporaries of a compiled program."""
    return compiled.memory_analysis().temp_size_in_bytes


def embedding(figures: Figures, windows: int) -> None:
    """Value and gradient of an embedding by gather (ours) and by a one-hot matmul."""
    rows, length, size, width = 16, 128, 1152, 128
    table = jax.random.normal(jax.random.key(0), (size, width))
    ids = jax.random.randint(jax.random.key(1), (rows, length), 0, size)
    cotangent = jax.random.normal(jax.random.key(2), (rows, length, width))

    def call(look_up: Callable[[jax.Array, jax.Array], jax.Array]) -> Call:
        # All arrays are arguments: XLA would work out what it knows beforehand.
        program = jax.jit(jax.value_and_grad(
            lambda table, ids, cotangent: jnp.sum(look_up(table, ids) * cotangent)))
        return lambda: jax.block_until_ready(program(table, ids, cotangent))

    gather = call(lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"))
    one_hot = call(lambda table, ids: jax.nn.one_hot(ids, size, dtype=table.dtype) @ table)
    compare(figures, "one_hot_to_gather", one_hot, gather, windows, 20,
            shape=[rows, length, size, width])


def loss(figures: Figures, windows: int) -> None:
    """Value and gradient of the loss in chunks (ours) and from whole logits."""
    rows, length, size, width = 16, 512, 1152, 128
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, length, width))
    table = jax.random.normal(keys[1], (size, width))
    targets = jax.random.randint(keys[2], (rows, length), 0, size)
    weights = jnp.ones((rows, length))
    chunks, scale = num_chunks_for(rows, length, size, width=width), width ** -0.5

    def plain(hidden: jax.Array, table: jax.Array, *rest: jax.Array) -> jax.Array:
        return cross_entropy_sums(jnp.einsum("bld,vd->blv", hidden, table) * scale, *rest).loss

    def chunked(*arrays: jax.Array) -> jax.Array:
        return chunked_cross_entropy_sums(*arrays, num_chunks=chunks, scale=scale).loss

    arrays = hidden, table, targets, weights
    programs = [jax.jit(jax.value_and_grad(form, (0, 1))).lower(*arrays).compile()
                for form in (plain, chunked)]
    calls = [lambda program=program: jax.block_until_ready(program(*arrays))
             for program in programs]
    compare(figures, "plain_to_chunked_loss", *calls, windows, 5,
            shape=[rows, length, size, width], chunks=chunks)
    for name, program in zip(("plain", "chunked"), programs, strict=True):
        figures.add(f"{name}_loss_temporaries", [temporaries(program) / 2**20], "MiB")


def steps(figures: Figures, windows: int, cache: pathlib.Path) -> None:
    """Whole training steps: unrolled (ours) and scan, remat none (ours) and full, packed or not."""
    prefix = "config.EncoderDecoderConfig."
    arms = {"unrolled": {}, "scan": {f"{prefix}scan_layers": True}, "remat_full": {"REMAT": "full"},
            "unpacked": {"train_data/source.DatasetConfig.pack": False}}
    works = {name: Workload.create(cache, bindings) for name, bindings in arms.items()}
    calls, useful = {}, {}
    for name, work in works.items():
        host = work.batches.batch(DataPosition(), range(work.batches.spec.batch_size))
        assert host is not None
        arrays = work.on_device(host.arrays)
        calls[name] = lambda work=work, arrays=arrays: work.step(arrays)
        useful[name] = host.plan.input_slots + host.plan.target_slots
    ours = calls["unrolled"]
    compare(figures, "scan_to_unrolled", calls["scan"], ours, windows, 8)
    compare(figures, "remat_full_to_none", calls["remat_full"], ours, windows, 8)
    compare(figures, "unpacked_to_packed_per_token", calls["unpacked"], ours, windows, 8,
            (useful["unpacked"], useful["unrolled"]))
    for name in ("unrolled", "scan", "remat_full"):
        figures.add(f"{name}_step_temporaries", [temporaries(works[name].compiled) / 2**20], "MiB")
    for name in ("unrolled", "unpacked"):
        figures.add(f"{name}_tokens_per_batch", [useful[name]], "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=7)
    options = parser.parse_args()
    figures = Figures("ratios")
    embedding(figures, options.windows)
    loss(figures, options.windows)
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder) / "cache"
        write_text_cache(cache)
        steps(figures, options.windows, cache)
    figures.write()


if __name__ == "__main__":
    main()
