"""The vocoder against a generator of the same make in PyTorch (float32, CPU, made-up weights)."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.models.codecs.hifi_gan import (
    HiFiGAN,
    HiFiGANConfig,
    from_pytorch,
    read_weights,
)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "hifi_gan.npz"
TINY = HiFiGANConfig(mels=6, width=16, upsampling=(4, 3), upsampling_kernels=(8, 5),
                     kernels=(3, 5), dilations=(1, 3))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(golden):
    return {name.removeprefix("weights/"): array for name, array in golden.items()
            if name.startswith("weights/")}


def test_waveform_is_pytorchs(golden, weights):
    variables = from_pytorch(weights, TINY)
    waveform = jax.jit(HiFiGAN(TINY).apply)(variables, golden["log_mel"])
    assert waveform.shape == (2, golden["log_mel"].shape[1] * TINY.hop)
    np.testing.assert_allclose(waveform, golden["waveform"], atol=1e-6)


def test_weights_are_read_from_files_under_either_name(tmp_path, weights):
    from safetensors.numpy import save_file

    newer = {"generator." + name.replace("weight_g", "parametrizations.weight.original0")
             .replace("weight_v", "parametrizations.weight.original1"): array
             for name, array in weights.items()}
    save_file(newer, tmp_path / "vocoder.safetensors")
    np.savez(tmp_path / "vocoder.npz", **weights)
    expected = flatten_names(from_pytorch(weights, TINY)["params"])
    for name in ("vocoder.safetensors", "vocoder.npz"):
        read = flatten_names(from_pytorch(read_weights(tmp_path / name), TINY)["params"])
        assert read.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(read[key], array)


def test_v1_has_the_published_parameters():
    boxed = jax.eval_shape(HiFiGAN(HiFiGANConfig()).init, jax.random.key(0),
                           jnp.zeros((1, 4, 128)))["params"]
    shapes = {name: leaf.shape for name, leaf in flatten_names(meta.unbox(boxed)).items()}
    assert HiFiGANConfig().hop == 256
    assert len(shapes) == 2 * (2 + 4 + 12 * 6)
    assert shapes["conv_pre/kernel"] == (7, 128, 512)
    assert [shapes[f"ups_{stage}/kernel"] for stage in range(4)] == [
        (16, 512, 256), (16, 256, 128), (4, 128, 64), (4, 64, 32)]
    assert shapes["resblocks_11_convs2_2/kernel"] == (11, 32, 32)
    assert shapes["conv_post/kernel"] == (7, 32, 1)


def test_mistakes_are_named(tmp_path, weights):
    lacking = {name: array for name, array in weights.items() if name != "ups.1.bias"}
    with pytest.raises(UserError, match="lack an array(.|\n)*ups.1.bias"):
        from_pytorch(lacking, TINY)
    with pytest.raises(UserError, match="no use for(.|\n)*stray"):
        from_pytorch({**weights, "stray": np.zeros(1)}, TINY)
    with pytest.raises(UserError, match="another shape"):
        from_pytorch({**weights, "conv_post.bias": np.zeros(2)}, TINY)
    with pytest.raises(UserError, match="lacks its lengths"):
        from_pytorch({name: array for name, array in weights.items()
                      if name != "conv_pre.weight_g"}, TINY)
    with pytest.raises(UserError, match="no file"):
        read_weights(tmp_path / "none.npz")
    (tmp_path / "g_02500000").write_bytes(b"")
    with pytest.raises(UserError, match="npz and .safetensors"):
        read_weights(tmp_path / "g_02500000")
    with pytest.raises(UserError, match="even number"):
        HiFiGANConfig(upsampling_kernels=(16, 16, 4, 3))
    with pytest.raises(UserError, match="odd"):
        HiFiGANConfig(kernels=(3, 4))
    with pytest.raises(UserError, match="no spectrograms"):
        HiFiGAN(TINY).init(jax.random.key(0), jnp.zeros((1, 4, 7)))
