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


def test_learned_positions_follow_the_place_not_the_slot():
    network = model(learned_positions=True)
    patches = np.random.default_rng(0).random((1, 4, 4)).astype(np.float32)
    variables = network.init(jax.random.key(0))
    table = variables["params"]["input_image_encoder"]["position_embedding"]
    assert table.names == ("image_patch", "embed") and table.value.shape == (4, 16)

    def hidden(order):
        return np.asarray(network.apply(variables, {
            "inputs/image/input": patches[:, order],
            "inputs/image/pos_ids": np.asarray([order], np.int32)}, method="encode").hidden)

    order = [2, 0, 3, 1]
    np.testing.assert_allclose(hidden(order), hidden([0, 1, 2, 3])[:, order], atol=1e-5)
    moved = network.apply(variables, {
        "inputs/image/input": patches[:, order],
        "inputs/image/pos_ids": np.arange(4, dtype=np.int32)[None]}, method="encode").hidden
    assert np.abs(np.asarray(moved) - hidden(order)).max() > 1e-3


def test_no_positions_are_learned_unless_asked():
    params = model().init(jax.random.key(0))["params"]["input_image_encoder"]
    assert "position_embedding" not in params
