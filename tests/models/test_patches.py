"""Patch inputs: what is done to the numbers before they are projected."""

import dataclasses

import jax
import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models import config
from vishwam_t5x.models.encoder_decoder import EncoderDecoder


def model(**patches):
    return EncoderDecoder(config.EncoderDecoderConfig(
        emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1,
        num_decoder_layers=1,
        inputs=(config.PatchInput(modality="image", patch_dim=4, grid=(2, 2), **patches),),
        targets=(config.TextOutput(vocab_size=128),)))


def encode(network, patches):
    variables = network.init(jax.random.key(0))
    return network.apply(variables, {"inputs/image/input": patches}, method="encode").hidden


def test_mean_and_std_are_taken_off():
    patches = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    centred = encode(model(mean=0.3, std=0.5), patches)
    by_hand = encode(model(), (patches - np.float32(0.3)) / np.float32(0.5))
    np.testing.assert_allclose(centred, by_hand, rtol=1e-6, atol=1e-6)
    assert not np.allclose(centred, encode(model(), patches), atol=1e-2)


def test_uint8_stands_for_0_to_1():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4), dtype=np.uint8)
    np.testing.assert_allclose(encode(model(mean=0.3, std=0.5), pixels),
                               encode(model(mean=0.3, std=0.5), pixels.astype(np.float32) / 255),
                               rtol=1e-5, atol=1e-5)


def test_std_must_be_positive():
    with pytest.raises(UserError, match="std must be positive"):
        dataclasses.replace(config.PatchInput(modality="image", patch_dim=4, grid=(2, 2)), std=0.0)
