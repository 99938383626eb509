"""The FLOP formula against published sizes, by hand, and against XLA's own count."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vishwam_t5x.core.flops import (
    EncoderDecoderShape,
    block_flops,
    forward_flops,
    mfu,
    resampler_flops,
    train_flops,
    transformer_flops,
)

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


def test_a_transformer_over_patches_and_a_resampler_by_hand():
    shape = EncoderDecoderShape(8, 2, 2, 3, 20, 2, 0, gated_mlp=False)
    block = 2 * 5 * (4 * 8 * 6 + 2 * 8 * 20) + 4 * 5 * 5 * 6
    assert transformer_flops(shape, 5, 12) == 2 * block + 2 * 5 * 12 * 8
    # Queries and outputs of 3 latents, keys and values of 7 features.
    cross = 2 * 3 * 2 * 8 * 6 + 2 * 7 * 2 * 8 * 6 + 4 * 3 * 7 * 6 + 2 * 3 * 2 * 8 * 20
    alone = 2 * 3 * (4 * 8 * 6 + 2 * 8 * 20) + 4 * 3 * 3 * 6
    assert resampler_flops(shape, 3, 7, cross_layers=2) == 2 * cross
    assert resampler_flops(shape, 3, 7, cross_layers=1) == cross + alone


def test_mfu_counts_transformers_and_resamplers():
    """Of Unified-IO 2's inputs: what is frozen once, what is learned three times."""
    from vishwam_t5x.core.batch import BatchSpec
    from vishwam_t5x.models.config import EncoderDecoderConfig, ImageInput, TextInput, TextOutput
    from vishwam_t5x.models.vision_transformer import ImageTransformer
    from vishwam_t5x.training.setup import flops_per_slot

    vit = ImageTransformer(patch_dim=12, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
                           num_layers=2)
    spec = BatchSpec(1, 20, 4, {"text": 4, "image": 16}, {"text": 4}, {"image": 12})

    def encoder(freeze):
        config = EncoderDecoderConfig(
            emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=1,
            num_decoder_layers=1, targets=(TextOutput(vocab_size=32),), inputs=(
                TextInput(vocab_size=32),
                ImageInput(transformer=vit, grid=(4, 4), freeze=freeze)))
        return 20 * flops_per_slot(config, spec)[0]

    shape = EncoderDecoderShape(8, 2, 2, 4, 16, 2, 0, gated_mlp=False)
    forward, projection = transformer_flops(shape, 16, 12), 2 * 16 * 2 * 8 * 16
    rows = 3 * block_flops(EncoderDecoderShape(16, 2, 2, 8, 32, 1, 1), 20)
    assert encoder(True) == pytest.approx(rows + forward + 2 * projection)
    assert encoder(False) == pytest.approx(
        rows + 3 * (forward + projection) - 2 * 16 * 12 * 8)
