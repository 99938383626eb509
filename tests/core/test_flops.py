"""The FLOP formula against published sizes, by hand, and against XLA's own count."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vishwam_t5x.core.flops import EncoderDecoderShape, block_flops, forward_flops, mfu, train_flops

# T5 1.1: width, heads, hidden units, layers; 64 features a head.
SIZES = {"small": (512, 6, 1024, 8, 0.110), "base": (768, 12, 2048, 12, 0.438),
         "large": (1024, 16, 2816, 24, 1.504), "xl": (2048, 32, 5120, 24, 5.472),
         "xxl": (4096, 64, 10240, 24, 21.38)}


@pytest.mark.parametrize("name", SIZES)
def test_t5_sizes_at_512_and_128(name):
    width, heads, hidden, layers, teraflops = SIZES[name]
    shape = EncoderDecoderShape(width, heads, heads, 64, hidden, layers, layers)
    got = train_flops(shape, 512, 128, {"text": (128, 32128)}) / 1e12
    assert got == pytest.approx(teraflops, abs=0.0006 if teraflops < 10 else 0.006)


def test_fewer_key_value_heads_and_no_gate_save_what_they_should():
    shape = EncoderDecoderShape(64, 8, 8, 16, 96, 1, 1)
    grouped = dataclasses.replace(shape, num_kv_heads=2)
    plain = dataclasses.replace(shape, gated_mlp=False)
    # Keys and values of 6 heads less: two kernels of 64 x 96, for 10 and 20 positions.
    assert block_flops(shape, 10) - block_flops(grouped, 10) == 2 * 10 * 2 * 64 * 96
    assert block_flops(shape, 10, 20) - block_flops(grouped, 10, 20) == 2 * 30 * 2 * 64 * 96
    assert block_flops(shape, 10) - block_flops(plain, 10) == 2 * 10 * 64 * 96


def test_a_block_agrees_with_what_xla_counts():
    shape, length, cross = EncoderDecoderShape(32, 4, 4, 8, 64, 1, 1), 12, 20

    def attend(x, memory, p):
        split = lambda y: y.reshape(-1, 4, 8)
        q, k, v = split(x @ p["q"]), split(memory @ p["k"]), split(memory @ p["v"])
        out = jnp.einsum("hts,shd->thd", jnp.einsum("thd,shd->hts", q, k), v)
        return out.reshape(-1, 32) @ p["o"]

    def block(x, memory, a, b, wi, gate, wo):
        return (x + attend(x, x, a) + attend(x, memory, b)) @ wi, x @ gate, (x @ wi) @ wo

    square = dict.fromkeys("qkvo", jnp.ones((32, 32)))
    cost = jax.jit(block).lower(jnp.ones((length, 32)), jnp.ones((cross, 32)), square, square,
                                jnp.ones((32, 64)), jnp.ones((32, 64)), jnp.ones((64, 32))
                                ).compile().cost_analysis()
    extra = 2 * length * 32 * 64  # x @ wi is there twice above
    assert cost["flops"] - extra == pytest.approx(block_flops(shape, length, cross), rel=0.02)


def test_tables_and_patches():
    shape = EncoderDecoderShape(8, 1, 1, 8, 8, 1, 1)
    bare = forward_flops(shape, 4, 4)
    both = {"text": (3, 100), "image": (5, 10)}
    assert forward_flops(shape, 4, 4, both) - bare == 2 * 8 * (300 + 50)
    patches = {"image": (6, 48)}
    assert forward_flops(shape, 4, 4, projections=patches) - bare == 2 * 8 * 6 * 48
    # Pixels need no gradient: forward and one backward matmul.
    assert train_flops(shape, 4, 4, projections=patches) - 3 * bare == 2 * (2 * 8 * 6 * 48)


def test_mfu():
    assert mfu(flops=2e12, seconds=2, num_devices=4, peak=1e12) == 0.25
    assert mfu(flops=2e12, seconds=2, num_devices=4, peak=None) is None
