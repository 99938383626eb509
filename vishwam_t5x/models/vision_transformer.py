"""Vision transformers that turn patches into features: a CLIP-like one for images, AST for audio.

Pre-norm blocks with biases (arXiv 2010.11929) as Unified-IO 2 (arXiv 2312.17172) takes them from
OpenCLIP's ViT-B/16 and from the Audio Spectrogram Transformer (arXiv 2104.01778): one block less,
no final norm, and the features of two layers. Parameters are named as in its checkpoints.

A row may hold the patches of several pictures. Each has special tokens of its own (the class token)
and attends to itself alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models import masks
from vishwam_t5x.models.attention import Attention
from vishwam_t5x.models.layers import ACTIVATIONS, Dense, named
from vishwam_t5x.models.modalities import check_positive
from vishwam_t5x.models.scan import apply_layers
from vishwam_t5x.precision.policy import Policy

EARLY_LAYER = 1
"""Block whose output is the second half of the features: the second one."""


class Features(NamedTuple):
    """What a transformer says of each patch, without its special tokens.

    Attributes:
        last: [B, N, E], output of the last block.
        early: [B, N, E], output of block `EARLY_LAYER`.
    """

    last: Float[Array, "B N E"]
    early: Float[Array, "B N E"]

    def joined(self) -> Float[Array, "B N 2*E"]:
        """Returns both halves next to each other, the last block's first."""
        return jnp.concatenate([self.last, self.early], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTransformer:
    """Config of the image transformer; inputs that read the same pictures share one by its name.

    Attributes:
        patch_dim: numbers in one patch, e.g. 16 · 16 · 3.
        name: of the module in the parameter tree.
        emb_dim: width, in features.
        num_heads: heads.
        head_dim: features of a head.
        mlp_dim: hidden units of an MLP.
        num_layers: blocks, two at least.
        position_grid: (rows, columns) of the learned positions, resized to the grid of the input.
        float32: compute in float32 whatever the precision of the model, as Unified-IO 2 does.
    """

    patch_dim: int = 768
    name: str = "image_transformer"
    emb_dim: int = 768
    num_heads: int = 12
    head_dim: int = 64
    mlp_dim: int = 3072
    num_layers: int = 11
    position_grid: tuple[int, int] = (14, 14)
    float32: bool = True

    def __post_init__(self) -> None:
        check_positive(self, _SIZES)
        _check_depth(self)
        grid = self.position_grid
        if not isinstance(grid, list | tuple) or len(grid) != 2 or not all(
                isinstance(side, int) and side >= 1 for side in grid):
            raise UserError("ImageTransformer.position_grid is (rows, columns), whole numbers of "
                            "at least 1", got=repr(grid), fix="(14, 14), as of OpenCLIP's ViT-B/16")
        object.__setattr__(self, "position_grid", tuple(grid))

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Any grid goes: the positions are resized to it."""

    def build(self, policy: Policy, remat_policy: str) -> ImageTransformerEncoder:
        """Returns the module: (patches, pos_ids, segment_ids, grid, pictures) -> `Features`."""
        return ImageTransformerEncoder(self, _policy(self, policy), remat_policy, name=self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioTransformer:
    """Config of the spectrogram transformer.

    Attributes:
        patch_dim: numbers in one patch, e.g. 16 · 16.
        name: of the module in the parameter tree.
        emb_dim: width, in features.
        num_heads: heads.
        head_dim: features of a head.
        mlp_dim: hidden units of an MLP.
        num_layers: blocks, two at least.
        num_positions: places in the table of learned positions, which lie band by band (mel bands
            outside, time inside); an input's grid may use fewer.
        float32: compute in float32 whatever the precision of the model, as Unified-IO 2 does.
    """

    patch_dim: int = 256
    name: str = "audio_transformer"
    emb_dim: int = 768
    num_heads: int = 12
    head_dim: int = 64
    mlp_dim: int = 3072
    num_layers: int = 11
    num_positions: int = 512
    float32: bool = True

    def __post_init__(self) -> None:
        check_positive(self, (*_SIZES, "num_positions"))
        _check_depth(self)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises `UserError` if an input's grid has more places than the table of positions."""
        if grid[0] * grid[1] > self.num_positions:
            raise UserError("the spectrogram transformer has too few positions for a grid",
                            got=f"{grid[0]} x {grid[1]}, num_positions {self.num_positions}",
                            fix=f"AudioTransformer.num_positions = {grid[0] * grid[1]}, or a "
                            "smaller grid")

    def build(self, policy: Policy, remat_policy: str) -> AudioTransformerEncoder:
        """Returns the module: (patches, pos_ids, segment_ids, grid, pictures) -> `Features`."""
        return AudioTransformerEncoder(self, _policy(self, policy), remat_policy, name=self.name)


Transformer = ImageTransformer | AudioTransformer

_SIZES = ("patch_dim", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_layers")


def _check_depth(config: Transformer) -> None:
    if config.num_layers <= EARLY_LAYER:
        raise UserError(f"{type(config).__name__}.num_layers must be at least {EARLY_LAYER + 1}: "
                        "the second block's features are used", got=config.num_layers)


def _policy(config: Transformer, policy: Policy) -> Policy:
    return dataclasses.replace(policy, compute_dtype="float32") if config.float32 else policy


class _Style(NamedTuple):
    """In what the blocks of the two differ."""

    norms: tuple[str, str]
    mlp: tuple[str, str]
    epsilon: float
    activation: str


_IMAGE = _Style(("ln_1", "ln_2"), ("c_fc", "c_proj"), 1e-5, "gelu_exact")
_AUDIO = _Style(("norm1", "norm2"), ("fc1", "fc2"), 1e-6, "gelu_tanh")


def _layer_norm(epsilon: float, policy: Policy, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon, dtype=policy.compute_dtype, param_dtype=policy.param_dtype,
        use_fast_variance=False, name=name,
        scale_init=named(nn.initializers.ones_init(), "embed"),
        bias_init=named(nn.initializers.zeros_init(), "embed"))


class _Mlp(nn.Module):
    config: Transformer
    style: _Style
    policy: Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(Dense, use_bias=True, dtype=self.policy.compute_dtype,
                                  param_dtype=self.policy.param_dtype)
        up, down = self.style.mlp
        x = dense(self.config.mlp_dim, ("embed", "mlp"), name=up)(x)
        x = ACTIVATIONS[self.style.activation](x)
        return dense(self.config.emb_dim, ("mlp", "embed"), name=down)(x)


class _Block(nn.Module):
    """x += Attention(LayerNorm x); x += MLP(LayerNorm x)."""

    config: Transformer
    style: _Style
    policy: Policy

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        cfg, policy = self.config, self.policy
        attention = Attention(
            cfg.num_heads, cfg.num_heads, cfg.head_dim, cfg.emb_dim, qk_norm=False, use_bias=True,
            dtype=policy.compute_dtype, param_dtype=policy.param_dtype,
            name="MultiHeadDotProductAttention_0")
        y = _layer_norm(self.style.epsilon, policy, self.style.norms[0])(x)
        x = x + attention(y, y, None, None, bias)
        y = _layer_norm(self.style.epsilon, policy, self.style.norms[1])(x)
        return x + _Mlp(cfg, self.style, policy, name="MLP_0")(y)


class _Blocks(nn.Module):
    config: Transformer
    style: _Style
    policy: Policy
    remat_policy: str

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the outputs of the last block and of block `EARLY_LAYER`."""
        blocks = [_Block(self.config, self.style, self.policy, name=f"ResidualAttentionBlock_{n}")
                  for n in range(self.config.num_layers)]

        def body(block: _Block, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = block(x, bias)
            return x, x

        x, outputs = apply_layers(blocks, body, x, num_layers=len(blocks),
                                  policy=self.remat_policy)
        return x, outputs[EARLY_LAYER]


class ImageTransformerEncoder(nn.Module):
    """Patches of images to features; see `ImageTransformer`."""

    config: ImageTransformer
    policy: Policy
    remat_policy: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "B N P"], pos_ids: Int[Array, "B N"],
                 segment_ids: Int[Array, "B N"], grid: tuple[int, int], pictures: int = 1
                 ) -> Features:
        """Encodes the pictures of each row.

        Args:
            patches: [B, N, patch_dim].
            pos_ids: row-major place of a patch in its picture.
            segment_ids: number of the picture of each patch, ascending along a row; 0 is padding,
                which nobody sees.
            grid: (rows, columns) of patches in a whole picture.
            pictures: pictures a row may hold; features of those beyond are NaN.
        """
        cfg, policy = self.config, self.policy
        x = Dense(cfg.emb_dim, ("image_patch", "embed"), dtype=policy.compute_dtype,
                  param_dtype=policy.param_dtype, name="embedding")(patches)
        token = _vector(self, "class_embedding", cfg.emb_dim, policy)
        height, width = cfg.position_grid
        table = _table(self, "positional_embedding", 1 + height * width, cfg.emb_dim, policy)
        places = table[1:]
        if tuple(grid) != (height, width):
            places = jax.image.resize(places.reshape(height, width, -1), (*grid, cfg.emb_dim),
                                      "bicubic").reshape(-1, cfg.emb_dim)
        x = x + jnp.take(places, pos_ids, axis=0, mode="clip")
        special = (token + table[0])[None]
        row = _Row.of(x, special, segment_ids, pictures)
        hidden = _layer_norm(1e-5, policy, "pre_ln")(row.embeddings)
        blocks = _Blocks(cfg, _IMAGE, policy, self.remat_policy, name="Transformer_0")
        return row.features(*blocks(hidden, row.bias))


class AudioTransformerEncoder(nn.Module):
    """Patches of spectrograms to features; see `AudioTransformer`."""

    config: AudioTransformer
    policy: Policy
    remat_policy: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "B N P"], pos_ids: Int[Array, "B N"],
                 segment_ids: Int[Array, "B N"], grid: tuple[int, int], pictures: int = 1
                 ) -> Features:
        """As `ImageTransformerEncoder`, for spectrograms of (time steps, mel bands) patches."""
        cfg, policy = self.config, self.policy
        x = Dense(cfg.emb_dim, ("audio_patch", "embed"), dtype=policy.compute_dtype,
                  param_dtype=policy.param_dtype, use_bias=True, name="embedding")(patches)
        tokens = jnp.stack([_vector(self, name, cfg.emb_dim, policy)
                            for name in ("cls_token", "dist_token")])
        table = _table(self, "pos_embed", 2 + cfg.num_positions, cfg.emb_dim, policy)
        # Our patches lie time step by time step, the table band by band.
        steps, bands = grid
        places = 2 + pos_ids % bands * steps + pos_ids // bands
        x = x + jnp.take(table, places, axis=0, mode="clip")
        row = _Row.of(x, tokens + table[:2], segment_ids, pictures)
        blocks = _Blocks(cfg, _AUDIO, policy, self.remat_policy, name="Transformer_0")
        return row.features(*blocks(row.embeddings, row.bias))


class _Row(NamedTuple):
    """Special tokens of every picture of a row, then its patches."""

    embeddings: Float[Array, "B T E"]
    bias: Float[Array, "B 1 T T"]
    number: int
    lacks_tokens: Bool[Array, "B N"]

    @classmethod
    def of(cls, x: jax.Array, special: jax.Array, segment_ids: jax.Array, pictures: int) -> _Row:
        """Puts `special` [S, E] before the patches, once for each of `pictures` pictures."""
        batch, number = segment_ids.shape[0], special.shape[0] * pictures
        owners, lacking = _pictures(segment_ids, pictures)
        tokens = jnp.broadcast_to(jnp.tile(special, (pictures, 1)), (batch, number, x.shape[-1]))
        owners = jnp.repeat(owners, special.shape[0], axis=1)
        segments = jnp.concatenate([owners, segment_ids], axis=1)
        bias = masks.to_bias(masks.same_segment(segments, segments), jnp.float32)
        return cls(jnp.concatenate([tokens.astype(x.dtype), x], axis=1), bias, number, lacking)

    def features(self, last: jax.Array, early: jax.Array) -> Features:
        # Loud rather than wrong: the step's verdict refuses NaN.
        bad = self.lacks_tokens[..., None]
        return Features(*(jnp.where(bad, jnp.nan, part[:, self.number:]) for part in (last, early)))


def _pictures(segment_ids: Int[Array, "B N"], pictures: int
              ) -> tuple[Int[Array, "B K"], Bool[Array, "B N"]]:
    """The numbers of the first `pictures` pictures of each row, and which patches have another."""
    if pictures == 1:
        owners = jnp.max(segment_ids, axis=1, keepdims=True)
        return owners, (segment_ids > 0) & (segment_ids != owners)
    # Numbers ascend along a row; patches in the middle of a picture may be padding.
    highest = jax.lax.cummax(segment_ids, axis=1)
    starts = highest > jnp.pad(highest, ((0, 0), (1, 0)))[:, :-1]
    rank = jnp.cumsum(starts, axis=1)
    which = rank[:, None, :] == jnp.arange(1, pictures + 1)[None, :, None]
    owners = jnp.max(jnp.where(which & starts[:, None, :], segment_ids[:, None, :], 0), axis=-1)
    return owners, (segment_ids > 0) & (rank > pictures)


def _vector(module: nn.Module, name: str, features: int, policy: Policy) -> jax.Array:
    vector = module.param(
        name, named(nn.initializers.normal(0.02), "embed"), (features,),
        policy.param_dtype)
    return vector.astype(policy.compute_dtype)


def _table(module: nn.Module, name: str, rows: int, features: int, policy: Policy) -> jax.Array:
    table = module.param(
        name, named(nn.initializers.normal(0.02), "axis_0", "embed"),
        (rows, features), policy.param_dtype)
    return table.astype(policy.compute_dtype)
