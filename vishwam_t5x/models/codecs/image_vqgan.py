"""The image codec: pixels to discrete codes and back.

The convolutional VQGAN of taming-transformers (Esser et al. 2021, arXiv 2012.09841) in the size of
Unified-IO 2 (arXiv 2312.17172), with the parameter names of its checkpoints: a picture of 256 x
256 becomes 32 x 32 codes of 16,384.
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
from vishwam_t5x.models.codecs.layers import CodecOutput
from vishwam_t5x.models.modalities import check_positive
from vishwam_t5x.precision.policy import Policy, resolve_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageVQGANConfig:
    """Sizes of the image codec; the defaults are those of Unified-IO 2.

    Attributes:
        num_codes: vectors in the codebook.
        code_dim: numbers in a vector of the codebook.
        latent_channels: channels between encoder and codebook, and codebook and decoder.
        resolution: height and width, in pixels, that `attention_resolutions` are counted from.
        channels: channels of a picture: 3 for colour, 1 for grey.
        width: channels of the first level.
        width_factors: channels of each level, in units of `width`; between levels the picture is
            halved.
        blocks: residual blocks of a level of the encoder; the decoder has one more.
        attention_resolutions: heights, in pixels, of the levels with attention.
        norm_groups: groups of the group norms; divides the channels of every level.
        dropout_rate: share of features zeroed inside residual blocks in training, in [0, 1).
        remat_policy: what the backward pass recomputes of a block, see `parallelism.remat`.
        precision: dtypes, a `Policy` or its name.

    Raises:
        UserError: sizes that do not go together.
    """

    num_codes: int = 16384
    code_dim: int = 4
    latent_channels: int = 4
    resolution: int = 256
    channels: int = 3
    width: int = 128
    width_factors: tuple[int, ...] = (1, 2, 2, 4)
    blocks: int = 2
    attention_resolutions: tuple[int, ...] = (32,)
    norm_groups: int = 32
    dropout_rate: float = 0.0
    remat_policy: str = "none"
    precision: Policy | str = "float32"

    def __post_init__(self) -> None:
        for name in ("width_factors", "attention_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_positive(self, ("num_codes", "code_dim", "latent_channels", "resolution", "channels",
                              "width", "blocks", "norm_groups"))
        factors = self.width_factors
        if not factors or not all(isinstance(each, int) and each >= 1 for each in factors):
            raise UserError("ImageVQGANConfig.width_factors are whole numbers of at least 1",
                            got=repr(factors), fix="one for each level, e.g. (1, 2, 2, 4)")
        if self.resolution % self.downsampling:
            raise UserError(
                "ImageVQGANConfig.resolution must be a multiple of the size of a code",
                got=f"{self.resolution} pixels, {self.downsampling} pixels a code",
                fix=f"a multiple of {self.downsampling}, or fewer width_factors")
        heights = [self.resolution >> level for level in range(len(factors))]
        for height in self.attention_resolutions:
            if height not in heights:
                raise UserError("no level of the image codec has that height",
                                got=f"attention_resolutions {self.attention_resolutions}",
                                fix=f"the levels have {', '.join(map(str, heights))} pixels")
        for factor in factors:
            if self.width * factor % self.norm_groups:
                raise UserError("norm_groups must divide the channels of every level",
                                got=f"{self.width * factor} channels, {self.norm_groups} groups",
                                fix=f"norm_groups that divide width = {self.width}")
        layers.check_training(self)

    @property
    def downsampling(self) -> int:
        """Pixels along an edge of the square that one code stands for."""
        return 1 << (len(self.width_factors) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of a picture of `resolution`."""
        side = self.resolution // self.downsampling
        return side, side

    @functools.cached_property
    def policy(self) -> Policy:
        """The dtypes `precision` stands for on this machine."""
        return resolve_policy(self.precision)

    @property
    def signal(self) -> SignalSpec:
        """What a batch holds of a picture: pixels, uint8."""
        return SignalSpec("pixels", (self.resolution, self.resolution, self.channels), "uint8",
                          self.grid)

    @property
    def smallest(self) -> tuple[int, ...]:
        """Shape of the smallest picture that reaches every parameter."""
        return self.downsampling, self.downsampling, self.channels

    def prepare(self, pixels: jax.Array) -> Float[Array, "b H W c"]:
        """Returns pictures in [-1, 1], float32, of pixels uint8, or floating in [0, 1]."""
        if pixels.dtype == jnp.uint8:
            pixels = pixels.astype(jnp.float32) / 255
        return pixels.astype(jnp.float32) * 2 - 1

    def finish(self, decoded: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Returns what was decoded as pixels in [0, 1], float32."""
        return jnp.clip((decoded.astype(jnp.float32) + 1) / 2, 0, 1)

    def build(self) -> ImageVQGAN:
        """Returns the codec as it is used, not trained: nothing is dropped."""
        return ImageVQGAN(dataclasses.replace(self, dropout_rate=0.0))

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of a level, 0 being that of whole pictures, attend."""
        return self.resolution >> level in self.attention_resolutions


class ImageVQGAN(nn.Module):
    """Pictures in [-1, 1] to codes and back.

    Pictures may be of any height and width that are multiples of `config.downsampling`.

    Attributes:
        config: sizes.
    """

    config: ImageVQGANConfig

    def setup(self) -> None:
        cfg = self.config
        self.encoder = _Encoder(cfg)
        self.decoder = _Decoder(cfg)
        self.quantize = layers.Codebook(cfg.num_codes, cfg.code_dim,
                                        param_dtype=cfg.policy.param_dtype)
        self.quant_conv = layers.convolution(cfg.code_dim, 1, cfg.policy, name="quant_conv")
        self.post_quant_conv = layers.convolution(cfg.latent_channels, 1, cfg.policy,
                                                  name="post_quant_conv")

    def __call__(self, pixels: Float[Array, "b H W c"]) -> CodecOutput:
        """Codes and decodes pictures; the gradient passes straight through the codebook."""
        latents = self.latents(pixels)
        vectors = latents.reshape(latents.shape[0], -1, latents.shape[-1])
        codes = self.quantize.codes(vectors)
        quantized = self.quantize.vectors(codes)
        passed = layers.straight_through(vectors, quantized).reshape(latents.shape)
        return CodecOutput(self._decode_vectors(passed), codes, vectors, quantized)

    def encode(self, pixels: Float[Array, "b H W c"]) -> Int[Array, "b n"]:
        """Returns the codes of pictures, int32, row-major, one for a square of `downsampling`.

        Args:
            pixels: in [-1, 1].

        Raises:
            UserError: height or width is no multiple of `downsampling`, or there are not
                `channels` channels.
        """
        codes = self.quantize.codes(self.latents(pixels))
        return codes.reshape(codes.shape[0], -1)

    def decode(self, codes: Int[Array, "b n"], grid: tuple[int, int] | None = None
               ) -> Float[Array, "b H W c"]:
        """Returns the pictures of codes, about in [-1, 1], in the dtype of the computation.

        Args:
            codes: in [0, num_codes), row-major.
            grid: rows and columns of codes; None: `config.grid`.

        Raises:
            UserError: there are not as many codes as places.
        """
        rows, columns = self.config.grid if grid is None else grid
        check_count(codes, rows, columns)
        return self._decode_vectors(self.quantize.vectors(codes.reshape(-1, rows, columns)))

    def latents(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        """Returns the vectors that are compared to the codebook, float32."""
        side = self.config.downsampling
        if pixels.ndim != 4 or pixels.shape[1] % side or pixels.shape[2] % side or (
                pixels.shape[3] != self.config.channels):
            raise UserError("these are no pictures that the image codec can code",
                            got=f"shape {pixels.shape}",
                            fix=f"[batch, height, width, {self.config.channels}], height and width "
                            f"multiples of {side}")
        return self.quant_conv(self.encoder(pixels)).astype(jnp.float32)

    def _decode_vectors(self, vectors: jax.Array) -> jax.Array:
        return self.decoder(self.post_quant_conv(vectors))


def check_count(codes: jax.Array, rows: int, columns: int) -> None:
    """Raises `UserError` unless there is one code for each place of a grid."""
    if codes.ndim != 2 or codes.shape[1] != rows * columns:
        raise UserError("there must be one code for each place of the grid",
                        got=f"codes of shape {codes.shape}, {rows} x {columns} places",
                        fix=f"codes [batch, {rows * columns}], or another grid")


class _ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1 x 1 convolution of x if channels change."""

    features: int
    config: ImageVQGANConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups, policy = self.config.norm_groups, self.config.policy
        y = nn.swish(layers.group_norm(groups, policy, name="norm1")(x))
        y = layers.convolution(self.features, 3, policy, name="conv1")(y)
        y = nn.swish(layers.group_norm(groups, policy, name="norm2")(y))
        y = layers.dropout(self, self.config.dropout_rate, y)
        y = layers.convolution(self.features, 3, policy, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = layers.convolution(self.features, 1, policy, name="nin_shortcut")(x)
        return x + y


class _Attention(nn.Module):
    """One head as wide as the channels, over all places; softmax in float32."""

    config: ImageVQGANConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        policy, features = self.config.policy, x.shape[-1]
        y = layers.group_norm(self.config.norm_groups, policy, name="norm")(x)
        q, k, v = (layers.convolution(features, 1, policy, name=name)(y).reshape(
            x.shape[0], -1, features) for name in ("q", "k", "v"))
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * features ** -0.5, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
        return x + layers.convolution(features, 1, policy, name="proj_out")(mixed)


class _Resample(nn.Module):
    """Half the size by a convolution of stride 2, or twice by repeated pixels and a convolution."""

    up: bool
    policy: Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.up:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return layers.convolution(x.shape[-1], 3, self.policy, 1 if self.up else 2, name="conv")(x)


def _level(x: jax.Array, name: str, level: int, blocks: int, config: ImageVQGANConfig
           ) -> jax.Array:
    residual = layers.rematted(_ResidualBlock, config.remat_policy)
    attention = layers.rematted(_Attention, config.remat_policy)
    for block in range(blocks):
        x = residual(config.width * config.width_factors[level], config,
                     name=f"{name}_block_{block}")(x)
        if config.has_attention(level):
            x = attention(config, name=f"{name}_attn_{block}")(x)
    return x


def _middle(x: jax.Array, config: ImageVQGANConfig) -> jax.Array:
    residual = layers.rematted(_ResidualBlock, config.remat_policy)
    x = residual(x.shape[-1], config, name="mid_block_1")(x)
    x = layers.rematted(_Attention, config.remat_policy)(config, name="mid_attn_1")(x)
    return residual(x.shape[-1], config, name="mid_block_2")(x)


def _last(x: jax.Array, features: int, config: ImageVQGANConfig) -> jax.Array:
    x = nn.swish(layers.group_norm(config.norm_groups, config.policy, name="norm_out")(x))
    return layers.convolution(features, 3, config.policy, name="conv_out")(x)


class _Encoder(nn.Module):
    """Pictures to features of `latent_channels`."""

    config: ImageVQGANConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        x = layers.convolution(cfg.width, 3, cfg.policy, name="conv_in")(x)
        for level in range(len(cfg.width_factors)):
            if level:
                x = _Resample(False, cfg.policy, name=f"down_{level - 1}_downsample")(x)
            x = _level(x, f"down_{level}", level, cfg.blocks, cfg)
        return _last(_middle(x, cfg), cfg.latent_channels, cfg)


class _Decoder(nn.Module):
    """Features of `latent_channels` to pictures; up_0 is the level of the codes."""

    config: ImageVQGANConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        deepest = len(cfg.width_factors) - 1
        x = layers.convolution(cfg.width * cfg.width_factors[-1], 3, cfg.policy, name="conv_in")(x)
        x = _middle(x, cfg)
        for index in range(deepest + 1):
            if index:
                x = _Resample(True, cfg.policy, name=f"up_{index - 1}_upsample")(x)
            x = _level(x, f"up_{index}", deepest - index, cfg.blocks + 1, cfg)
        return _last(x, cfg.channels, cfg)
