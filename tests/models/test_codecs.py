"""The codecs against the original Unified-IO 2 code (float32, CPU, made-up weights)."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names, unflatten_names
from vishwam_t5x.models.codecs import layers
from vishwam_t5x.models.codecs.audio_vqgan import AudioVQGAN, AudioVQGANConfig, StackConfig
from vishwam_t5x.models.codecs.image_vqgan import ImageVQGAN, ImageVQGANConfig
from vishwam_t5x.parallelism.sharding import logical_axes_by_name

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "unified_io2"
IMAGE = ImageVQGAN(ImageVQGANConfig(
    num_codes=64, resolution=48, width=32, width_factors=(1, 1, 2, 2), blocks=1,
    attention_resolutions=(12,)))
STACK = StackConfig(emb_dim=24, num_layers=2, num_heads=3, head_dim=8, mlp_dim=48)
AUDIO = AudioVQGAN(AudioVQGANConfig(num_codes=32, code_dim=8, frames=64, mels=32, encoder=STACK,
                                    decoder=STACK))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "codecs.npz") as file:
        return dict(file)


def variables(golden, name):
    prefix = f"params/{name}/"
    return {"params": unflatten_names({key[len(prefix):]: array for key, array in golden.items()
                                       if key.startswith(prefix)})}


def coded_and_decoded(codec, params, signal):
    """Everything at once: one compilation for each codec."""

    def everything(codec, signal):
        output = codec(signal)
        return (codec.latents(signal), codec.encode(signal), codec.decode(output.codes), output)

    return jax.jit(functools.partial(codec.apply, method=everything))(params, signal)


def time_first(mel_first, *shape):
    """The original has mel bins first, also in the order of its codes."""
    cut = mel_first.reshape(mel_first.shape[0], *shape, *mel_first.shape[2:])
    return np.swapaxes(cut, 1, 2).reshape(mel_first.shape)


def test_image_codec_is_the_originals(golden):
    latents, codes, decoded, output = coded_and_decoded(
        IMAGE, variables(golden, "image"), golden["vqgan/image"])
    np.testing.assert_allclose(latents, golden["vqgan/prequant"], atol=1e-5)
    np.testing.assert_array_equal(codes, golden["vqgan/indices"])
    np.testing.assert_array_equal(output.codes, golden["vqgan/indices"])
    np.testing.assert_allclose(decoded, golden["vqgan/decode_code"], atol=1e-5)
    np.testing.assert_allclose(output.reconstruction, golden["vqgan/decode_code"], atol=1e-5)
    # The original's loss: the codebook's and a quarter of it for the encoder.
    squares = np.mean(np.square(output.vectors - output.quantized))
    np.testing.assert_allclose(1.25 * squares, golden["vqgan/loss"], rtol=1e-5)


def test_audio_codec_is_the_originals(golden):
    spectrogram = np.swapaxes(golden["avq/audio_transposed"], 1, 2)
    latents, codes, decoded, output = coded_and_decoded(
        AUDIO, variables(golden, "audio"), spectrogram)
    expected = time_first(golden["avq/indices"], 4, 8)
    np.testing.assert_allclose(latents, time_first(golden["avq/encode"], 4, 8), atol=1e-5)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(output.codes, expected)
    sound = np.swapaxes(golden["avq/decode_code"], 1, 2)
    np.testing.assert_allclose(decoded, sound, atol=1e-5)
    np.testing.assert_allclose(output.reconstruction, sound, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(output.quantized, axis=-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("codec, name, signal", [
    (ImageVQGAN(ImageVQGANConfig()), "image", (1, 8, 8, 3)),
    (AudioVQGAN(AudioVQGANConfig()), "audio", (1, 8, 8, 1)),
], ids=["image", "audio"])
def test_published_sizes_have_the_published_parameters(codec, name, signal):
    with np.load(GOLDEN / "codec_trees.npz") as file:
        published = json.loads(file[name].tobytes())
    boxed = jax.eval_shape(codec.init, jax.random.key(0), jnp.zeros(signal))["params"]
    axes = logical_axes_by_name(boxed)
    ours = {key: [list(leaf.shape), list(axes[key])]
            for key, leaf in flatten_names(meta.unbox(boxed)).items()}
    # The original splits the few numbers of a code over devices; ours stay whole.
    table = "quantize/embedding"
    assert published[table][1] == ["vocab", "embed"]
    published[table][1] = ["vocab", "unmodeled"]
    assert ours == published


def test_published_sizes_have_the_published_tokens():
    assert ImageVQGANConfig().grid == (32, 32)
    assert AudioVQGANConfig().grid == (32, 16)
    for codec, signal, count in ((ImageVQGAN(ImageVQGANConfig()), (1, 256, 256, 3), 1024),
                                 (AudioVQGAN(AudioVQGANConfig()), (1, 256, 128, 1), 512)):
        output, _ = jax.eval_shape(codec.init_with_output, jax.random.key(0), jnp.zeros(signal))
        assert output.codes.shape == (1, count) and output.codes.dtype == jnp.int32
        assert output.reconstruction.shape == signal


def test_nearest_is_the_same_in_pieces_and_at_once(monkeypatch):
    # Whole numbers: distances are exact, and many of them equal, of which the first counts.
    generator = np.random.default_rng(0)
    vectors = generator.integers(-3, 4, (3, 50, 4)).astype(np.float32)
    table = generator.integers(-3, 4, (41, 4)).astype(np.float32)
    distances = np.sum(np.square(vectors[..., None, :] - table), -1)
    for size in (7, 41, 100):
        monkeypatch.setattr(layers, "_CODES_AT_ONCE", size)
        np.testing.assert_array_equal(layers.nearest(vectors, table), distances.argmin(-1))


def test_the_gradient_passes_straight_through():
    vectors, codes = jnp.asarray([1.0, 2.0]), jnp.asarray([0.5, 2.5])
    value, pull = jax.vjp(layers.straight_through, vectors, codes)
    np.testing.assert_array_equal(value, codes)
    through, to_codes = pull(jnp.asarray([3.0, -1.0]))
    np.testing.assert_array_equal(through, [3.0, -1.0])
    np.testing.assert_array_equal(to_codes, [0.0, 0.0])


@pytest.mark.parametrize("settings, message", [
    ({"width": 48}, "norm_groups must divide"),
    ({"resolution": 100}, "multiple of the size of a code"),
    ({"attention_resolutions": (33,)}, "no level"),
    ({"width_factors": ()}, "width_factors"),
    ({"num_codes": 0}, "num_codes"),
    ({"precision": "float31"}, "precision"),
])
def test_mistakes_in_the_image_codec(settings, message):
    with pytest.raises(UserError, match=message):
        ImageVQGANConfig(**settings)


@pytest.mark.parametrize("make, message", [
    (lambda: AudioVQGANConfig(frames=100), "multiple of patch"),
    (lambda: AudioVQGANConfig(encoder=None), "StackConfig"),
    (lambda: StackConfig(emb_dim=30), "multiple of 4"),
    (lambda: StackConfig(mlp_dim=0), "mlp_dim"),
])
def test_mistakes_in_the_audio_codec(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_signals_and_codes_of_another_shape_are_refused(golden):
    image, audio = variables(golden, "image"), variables(golden, "audio")
    with pytest.raises(UserError, match="no pictures"):
        IMAGE.apply(image, jnp.zeros((1, 48, 47, 3)), method="encode")
    with pytest.raises(UserError, match="no pictures"):
        IMAGE.apply(image, jnp.zeros((1, 48, 48, 1)), method="encode")
    with pytest.raises(UserError, match="no spectrograms"):
        AUDIO.apply(audio, jnp.zeros((1, 64, 30, 1)), method="encode")
    with pytest.raises(UserError, match="one code for each place"):
        IMAGE.apply(image, jnp.zeros((1, 35), jnp.int32), method="decode")
    with pytest.raises(UserError, match="one code for each place"):
        AUDIO.apply(audio, jnp.zeros((1, 32), jnp.int32), (8, 8), method="decode")
