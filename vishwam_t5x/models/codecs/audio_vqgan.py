"""The audio codec: log-mel spectrograms to discrete codes and back.

The transformer VQGAN (ViT-VQGAN, Yu et al. 2021, arXiv 2110.04627) in the size of Unified-IO 2
(arXiv 2312.17172), with the parameter names of its checkpoints: a spectrogram of 256 frames and
128 mel bins becomes 32 x 16 codes of 8,192.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vishwam_t5x.core.batch import SignalSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models.codecs import layers
from vishwam_t5x.models.codecs.image_vqgan import check_count
from vishwam_t5x.models.codecs.layers import CodecOutput
from vishwam_t5x.models.modalities import check_positive
from vishwam_t5x.precision.policy import Policy, resolve_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes of a transformer of the audio codec.

    Attributes:
        emb_dim: width of the residual stream, in features; a multiple of 4.
        num_layers: blocks.
        num_heads: heads of an attention.
        head_dim: features of a head.
        mlp_dim: hidden units of the MLP.
    """

    emb_dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048

    def __post_init__(self) -> None:
        check_positive(self, ("emb_dim", "num_layers", "num_heads", "head_dim", "mlp_dim"))
        if self.emb_dim % 4:
            raise UserError("StackConfig.emb_dim must be a multiple of 4: sines and cosines of two "
                            "coordinates", got=self.emb_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioVQGANConfig:
    """Sizes of the audio codec; the defaults are those of Unified-IO 2.

    Attributes:
        num_codes: vectors in the codebook.
        code_dim: numbers in a vector of the codebook.
        frames: frames of a spectrogram, a multiple of `patch`.
        mels: mel bins of a spectrogram, a multiple of `patch`.
        patch: frames, and mel bins, that one code stands for.
        encoder: sizes of the encoder.
        decoder: sizes of the decoder.
        dropout_rate: share of features zeroed behind attention and MLP in training, in [0, 1).
        remat_policy: what the backward pass recomputes of a block, see `parallelism.remat`.
        precision: dtypes, a `Policy` or its name; Unified-IO 2 computes in 'bfloat16'.

    Raises:
        UserError: sizes that do not go together.
    """

    num_codes: int = 8192
    code_dim: int = 32
    frames: int = 256
    mels: int = 128
    patch: int = 8
    encoder: StackConfig = StackConfig()
    decoder: StackConfig = StackConfig()
    dropout_rate: float = 0.0
    remat_policy: str = "none"
    precision: Policy | str = "float32"

    def __post_init__(self) -> None:
        check_positive(self, ("num_codes", "code_dim", "frames", "mels", "patch"))
        for name in ("frames", "mels"):
            if getattr(self, name) % self.patch:
                raise UserError(f"AudioVQGANConfig.{name} must be a multiple of patch",
                                got=f"{getattr(self, name)} and {self.patch}")
        for name in ("encoder", "decoder"):
            if not isinstance(getattr(self, name), StackConfig):
                raise UserError(f"AudioVQGANConfig.{name} must be a StackConfig",
                                got=repr(getattr(self, name)))
        layers.check_training(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Codes along time and along mel bins of a spectrogram of `frames` x `mels`."""
        return self.frames // self.patch, self.mels // self.patch

    @property
    def signal(self) -> SignalSpec:
        """What a batch holds of a clip: a spectrogram, scaled for the codec, float32."""
        return SignalSpec("spectrogram", (self.frames, self.mels), "float32", self.grid)

    @property
    def smallest(self) -> tuple[int, ...]:
        """Shape of the smallest spectrogram that reaches every parameter."""
        return self.patch, self.patch

    def prepare(self, spectrogram: jax.Array) -> Float[Array, "b t m 1"]:
        """Returns spectrograms [b, frames, mel bins] as the codec takes them."""
        return spectrogram.astype(jnp.float32)[..., None]

    def finish(self, decoded: Float[Array, "b t m 1"]) -> Float[Array, "b t m"]:
        """Returns what was decoded as spectrograms [b, frames, mel bins], float32."""
        return decoded[..., 0].astype(jnp.float32)

    def build(self) -> AudioVQGAN:
        """Returns the codec as it is used, not trained: nothing is dropped."""
        return AudioVQGAN(dataclasses.replace(self, dropout_rate=0.0))

    @functools.cached_property
    def policy(self) -> Policy:
        """The dtypes `precision` stands for on this machine."""
        return resolve_policy(self.precision)


class AudioVQGAN(nn.Module):
    """Log-mel spectrograms to codes and back.

    Spectrograms are [frames, mels, 1] and codes row-major over (time, mel), as in Unified-IO 2's
    batches. Inside, as its checkpoints want it, mel bins come first.

    Attributes:
        config: sizes.
    """

    config: AudioVQGANConfig

    def setup(self) -> None:
        cfg = self.config
        self.encoder = _Encoder(cfg)
        self.decoder = _Decoder(cfg)
        self.quantize = layers.Codebook(cfg.num_codes, cfg.code_dim, unit_length=True,
                                        param_dtype=cfg.policy.param_dtype)

    def __call__(self, spectrogram: Float[Array, "b t m 1"]) -> CodecOutput:
        """Codes and decodes spectrograms; the gradient passes straight through the codebook."""
        times, mels = self._grid_of(spectrogram)
        vectors = self.quantize.comparable(self.latents(spectrogram))
        codes = self.quantize.codes(vectors)
        quantized = self.quantize.vectors(codes)
        passed = layers.straight_through(vectors, quantized)
        return CodecOutput(self._decode_vectors(passed, times, mels), codes, vectors, quantized)

    def encode(self, spectrogram: Float[Array, "b t m 1"]) -> Int[Array, "b n"]:
        """Returns the codes of spectrograms, int32, row-major over (time, mel).

        Args:
            spectrogram: normalised log-mel powers.

        Raises:
            UserError: frames or mel bins are no multiple of `patch`, or there is no last 1.
        """
        return self.quantize.codes(self.latents(spectrogram))

    def decode(self, codes: Int[Array, "b n"], grid: tuple[int, int] | None = None
               ) -> Float[Array, "b t m 1"]:
        """Returns the spectrograms of codes, in the dtype of the computation.

        Args:
            codes: in [0, num_codes), row-major over (time, mel).
            grid: codes along time and along mel bins; None: `config.grid`.

        Raises:
            UserError: there are not as many codes as places.
        """
        times, mels = self.config.grid if grid is None else grid
        check_count(codes, times, mels)
        return self._decode_vectors(self.quantize.vectors(codes), times, mels)

    def latents(self, spectrogram: Float[Array, "b t m 1"]) -> Float[Array, "b n d"]:
        """Returns the vectors of the encoder, row-major over (time, mel), float32."""
        times, mels = self._grid_of(spectrogram)
        vectors = self.encoder(jnp.swapaxes(spectrogram, 1, 2)).astype(jnp.float32)
        return _swap_order(vectors, mels, times)

    def _grid_of(self, spectrogram: jax.Array) -> tuple[int, int]:
        side = self.config.patch
        if spectrogram.ndim != 4 or spectrogram.shape[3] != 1 or any(
                size % side for size in spectrogram.shape[1:3]):
            raise UserError("these are no spectrograms that the audio codec can code",
                            got=f"shape {spectrogram.shape}",
                            fix=f"[batch, frames, mel bins, 1], both multiples of {side}")
        return spectrogram.shape[1] // side, spectrogram.shape[2] // side

    def _decode_vectors(self, vectors: jax.Array, times: int, mels: int) -> jax.Array:
        mel_first = self.decoder(_swap_order(vectors, times, mels), mels, times)
        return jnp.swapaxes(mel_first, 1, 2)


def _swap_order(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """[b, rows · columns, d] row-major to column-major."""
    cut = x.reshape(x.shape[0], rows, columns, x.shape[-1])
    return jnp.swapaxes(cut, 1, 2).reshape(x.shape)


class _Encoder(nn.Module):
    """Spectrograms [b, m, t, 1] to vectors of the codebook's size."""

    config: AudioVQGANConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, side, width = self.config, self.config.patch, self.config.encoder.emb_dim
        batch, rows, columns = x.shape[0], x.shape[1] // side, x.shape[2] // side
        patches = x.reshape(batch, rows, side, columns, side).transpose(0, 1, 3, 2, 4)
        y = layers.biased_dense(width, ("image_patch", "embed"), cfg.policy, name="embedding")(
            patches.reshape(batch, rows * columns, side * side))
        y = y + layers.grid_positions(rows, columns, width).astype(y.dtype)
        y = _Transformer(cfg.encoder, cfg, name="Transformer_0")(y)
        y = layers.biased_dense(cfg.code_dim, ("embed", "mlp"), cfg.policy, use_bias=False,
                                name="encoder_proj")(nn.relu(y))
        return layers.layer_norm(cfg.policy, use_scale=False, name="encoder_norm")(y)


class _Decoder(nn.Module):
    """Vectors of the codebook to spectrograms [b, m, t, 1]."""

    config: AudioVQGANConfig

    @nn.compact
    def __call__(self, x: jax.Array, rows: int, columns: int) -> jax.Array:
        cfg, side, width = self.config, self.config.patch, self.config.decoder.emb_dim
        y = layers.biased_dense(width, ("image_patch", "embed"), cfg.policy, use_bias=False,
                                name="decoder_proj")(x)
        y = y + layers.grid_positions(rows, columns, width).astype(y.dtype)
        y = _Transformer(cfg.decoder, cfg, name="Transformer_0")(y)
        return nn.ConvTranspose(
            1, (side, side), (side, side), "SAME", use_bias=False, dtype=cfg.policy.compute_dtype,
            param_dtype=cfg.policy.param_dtype, name="ConvTranspose_0",
            kernel_init=layers.named(nn.initializers.lecun_normal(), "axis_0", "axis_1", "embed",
                                     "axis_3"))(y.reshape(x.shape[0], rows, columns, width))


class _Transformer(nn.Module):
    """Pre-norm blocks and a norm at the end."""

    config: StackConfig
    codec: AudioVQGANConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = layers.rematted(_Block, self.codec.remat_policy)
        for index in range(self.config.num_layers):
            x = block(self.config, self.codec, name=f"encoderblock_{index}")(x)
        return layers.layer_norm(self.codec.policy, name="encoder_norm")(x)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    config: StackConfig
    codec: AudioVQGANConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        policy, rate = self.codec.policy, self.codec.dropout_rate
        y = layers.layer_norm(policy, name="LayerNormWithBias_0")(x)
        y = _Attention(self.config, policy, name="MultiHeadDotProductAttention_0")(y)
        x = x + layers.dropout(self, rate, y)
        y = layers.layer_norm(policy, name="LayerNormWithBias_1")(x)
        y = _Mlp(self.config.mlp_dim, policy, name="MlpBlock_0")(y)
        return x + layers.dropout(self, rate, y)


class _Attention(nn.Module):
    """Attention of every place to all; no biases, softmax in float32."""

    config: StackConfig
    policy: Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        joined = cfg.num_heads * cfg.head_dim
        q, k, v = (layers.biased_dense(joined, ("embed", "joined_kv"), self.policy, use_bias=False,
                                       name=name)(x).reshape(*x.shape[:2], -1, cfg.head_dim)
                   for name in ("query", "key", "value"))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * cfg.head_dim ** -0.5, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], joined)
        return layers.biased_dense(cfg.emb_dim, ("joined_kv", "embed"), self.policy,
                                   use_bias=False, name="out")(mixed)


class _Mlp(nn.Module):
    """W · relu(W · x + b) + b."""

    mlp_dim: int
    policy: Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.relu(layers.biased_dense(self.mlp_dim, ("embed", "mlp"), self.policy,
                                             name="DenseGeneral_0")(x))
        return layers.biased_dense(x.shape[-1], ("mlp", "embed"), self.policy,
                                   name="DenseGeneral_1")(hidden)
