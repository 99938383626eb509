"""Numbers of the original Unified-IO 2 code (float32, CPU), computed once and stored here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import model_fixtures

from vishwam_t5x.core.trees import unflatten_names
from vishwam_t5x.models import positions
from vishwam_t5x.models.attention import Attention
from vishwam_t5x.models.config import (
    CodeOutput,
    EncoderDecoderConfig,
    PatchInput,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.models.masks import to_bias

# The original's tiny model. Its image and audio inputs are ViT and AST features of 2 x 24 numbers;
# the stored features stand in for patches here.
TINY = EncoderDecoderConfig(
    emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64, num_encoder_layers=2, num_decoder_layers=3,
    inputs=(TextInput(vocab_size=256),
            PatchInput(modality="image", patch_dim=48, grid=(4, 4), rope_scale=1.5),
            PatchInput(modality="audio", patch_dim=48, grid=(4, 2), rope_scale=1.5)),
    targets=(TextOutput(vocab_size=256), CodeOutput(modality="image", vocab_size=66, grid=(6, 6)),
             CodeOutput(modality="audio", vocab_size=34, grid=(4, 8))))


@pytest.fixture(scope="module")
def attention_golden():
    with np.load(model_fixtures.GOLDEN / "attention.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def cases():
    with np.load(model_fixtures.GOLDEN / "cases.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def variables():
    with np.load(model_fixtures.GOLDEN / "params.npz") as file:
        return {"params": unflatten_names(dict(file))}


def table(angles):
    """The original's layout: cos and sin of each pair next to each other."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(angles.shape[0], -1)


@pytest.mark.parametrize("name, length, head_dim", [
    ("rope1d_len16_hd8", 16, 8), ("rope1d_len512_hd64", 512, 64)])
def test_text_angles(attention_golden, name, length, head_dim):
    angles = positions.text_angles(jnp.arange(length), head_dim, 10000.0)
    # float32 cosines of angles up to 511 rad: the table itself is good to about 3e-5.
    np.testing.assert_allclose(table(np.asarray(angles)), attention_golden[name], atol=5e-5)


@pytest.mark.parametrize("name, rows, columns, head_dim, scale", [
    ("rope2d_img_in_tiny_4x4_hd8_res1.5", 4, 4, 8, 1.5),
    ("rope2d_img_tgt_tiny_6x6_hd8", 6, 6, 8, 1.0),
    ("rope2d_img_in_24x24_hd64_res4over3", 24, 24, 64, 4 / 3),
    ("rope2d_img_hist_8x32_hd64", 8, 32, 64, 1.0),
    ("rope2d_aud_in_16x8_hd64_res4over3", 16, 8, 64, 4 / 3),
    ("rope2d_aud_tgt_grid16x32_hd64", 16, 32, 64, 1.0)])
def test_grid_angles(attention_golden, name, rows, columns, head_dim, scale):
    angles = positions.grid_angles(jnp.arange(rows * columns), columns, head_dim, 10000.0, scale)
    np.testing.assert_allclose(table(np.asarray(angles)), attention_golden[name], atol=1e-5)


def test_apply_rotary(attention_golden):
    x = jnp.asarray(attention_golden["rope_apply_x"])
    for name, angles in (
            ("rope_apply_1d_y", positions.text_angles(jnp.arange(16), 8, 10000.0)),
            ("rope_apply_2d_y", positions.grid_angles(jnp.arange(16), 4, 8, 10000.0, 1.5))):
        turn = positions.rope(jnp.broadcast_to(angles, (2, *angles.shape)))
        np.testing.assert_allclose(positions.apply_rotary(x, turn), attention_golden[name],
                                   atol=1e-5)


@pytest.mark.parametrize("case, qk_norm", [("mha_plain", False), ("mha_qknorm", True)])
def test_attention(attention_golden, case, qk_norm):
    get = {key.removeprefix(case + "/"): value for key, value in attention_golden.items()
           if key.startswith(case + "/")}
    params = unflatten_names({key.removeprefix("params/"): value for key, value in get.items()
                              if key.startswith("params/")})
    module = Attention(num_heads=3, num_kv_heads=3, head_dim=8, features=24, qk_norm=qk_norm)
    bias = to_bias(jnp.asarray(get["mask"][:, 0] > 0), jnp.float32)
    out = module.apply({"params": params}, jnp.asarray(get["q"]), jnp.asarray(get["kv"]), None,
                       None, bias)
    np.testing.assert_allclose(out, get["out"], atol=1e-5)


def case_of(cases, name):
    return {key.removeprefix(name + "/"): value for key, value in cases.items()
            if key.startswith(name + "/")}


def batch_of(case, target):
    """The model's batch; an image or audio target is given by the original's token ids."""
    batch = {key.removeprefix("batch/"): jnp.asarray(value) for key, value in case.items()
             if key.startswith("batch/")}
    if target != "text":
        # As the original does with an absent text: a dummy of zero width is as good as none.
        batch = {key: value for key, value in batch.items() if not key.startswith("targets/text/")}
        tokens = case[f"out/{target}/targets"]
        batch |= {f"targets/{target}/targets": jnp.asarray(tokens),
                  f"targets/{target}/inputs": jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
                  f"targets/{target}/mask": jnp.ones_like(tokens)}
    return batch


@pytest.mark.parametrize("name, target", [
    ("text_to_text", "text"), ("image_text_to_text", "text"), ("audio_text_to_text", "text"),
    ("text_to_image", "image"), ("text_to_audio", "audio")])
def test_logits(cases, variables, name, target):
    case = case_of(cases, name)
    apply = jax.jit(functools.partial(EncoderDecoder(TINY).apply, method="logits"))
    logits = apply(variables, batch_of(case, target))
    counts = case[f"out/{target}/loss_mask"] > 0
    assert counts.sum() >= 10
    np.testing.assert_allclose(np.asarray(logits[target])[counts],
                               case[f"out/{target}/logits"][counts], atol=1e-5)


def test_layers(cases, variables):
    """Each layer's output, so that a wrong number is found where it arises."""
    case = case_of(cases, "text_to_text")
    apply = jax.jit(functools.partial(EncoderDecoder(TINY).apply, capture_intermediates=True))
    _, state = apply(variables, batch_of(case, "text"))
    found, compared = state["intermediates"], 0
    valid = {"encoder": case["batch/inputs/text/mask"] > 0,
             "decoder": case["batch/targets/text/mask"] > 0}
    for stack, num_layers in (("encoder", 2), ("decoder", 3)):
        for path in ("", *(f"layers_{n}/" for n in range(num_layers))):
            node = found[stack] if not path else found[stack][path[:-1]]
            np.testing.assert_allclose(
                np.asarray(node["__call__"][0])[valid[stack]],
                case[f"inter/{stack}/{path}__call__.0"][valid[stack]], atol=2e-5)
            compared += 1
    assert compared == 7


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_patch_input(cases, variables, modality):
    case = case_of(cases, f"{modality}_text_to_text")
    apply = jax.jit(functools.partial(EncoderDecoder(TINY).apply, capture_intermediates=True))
    _, state = apply(variables, batch_of(case, "text"))
    name = f"input_{modality}_encoder"
    sequence = state["intermediates"][name]["__call__"][0]
    valid = case[f"batch/inputs/{modality}/mask"] > 0
    np.testing.assert_array_equal(np.asarray(sequence.segment_ids) > 0, valid)
    np.testing.assert_allclose(np.asarray(sequence.embeddings)[valid],
                               case[f"inter/{name}/__call__.0.embed"][valid], atol=1e-5)
    angles = np.asarray(sequence.angles)
    turned = np.stack([np.cos(angles), np.sin(angles)], -1).reshape(*angles.shape[:2], -1)
    expected = case[f"inter/{name}/__call__.0.position_embed"]
    np.testing.assert_allclose(turned[valid], expected[valid], atol=1e-5)
