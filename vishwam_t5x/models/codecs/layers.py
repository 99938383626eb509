"""What the codecs share: layers with logical axes, positions on a grid, the nearest code."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models.layers import MLP_KERNEL, Initializer, named
from vishwam_t5x.parallelism.remat import remat_policy
from vishwam_t5x.precision.policy import Policy, resolve_policy

_CODES_AT_ONCE = 1024  # distances of all of 16,384 codes to a batch's vectors need gigabytes
_CONV_AXES = ("axis_0", "axis_1", "axis_2", "axis_3")


@struct.dataclass
class CodecOutput:
    """What a codec makes of its input.

    Attributes:
        reconstruction: the input coded and decoded, float, in the shape of the input.
        codes: [b, n] int32, in [0, number of codes).
        vectors: [b, n, d] float32, what the encoder says.
        quantized: [b, n, d] float32, the vectors of the codes, by which codebooks are trained.
    """

    reconstruction: Float[Array, "..."]
    codes: Int[Array, "b n"]
    vectors: Float[Array, "b n d"]
    quantized: Float[Array, "b n d"]


def convolution(features: int, kernel: int, policy: Policy, stride: int = 1, *, name: str
                ) -> nn.Conv:
    """Returns a square convolution with bias; SAME padding, so a stride divides even sizes."""
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), "SAME", dtype=policy.compute_dtype,
        param_dtype=policy.param_dtype, name=name,
        kernel_init=named(nn.initializers.lecun_normal(), *_CONV_AXES),
        bias_init=named(nn.initializers.zeros, "axis_3"))


def group_norm(groups: int, policy: Policy, *, name: str) -> nn.GroupNorm:
    """Returns a group norm with scale and bias; statistics in float32."""
    return nn.GroupNorm(
        groups, epsilon=1e-6, dtype=policy.compute_dtype, param_dtype=policy.param_dtype,
        use_fast_variance=False, name=name, scale_init=named(nn.initializers.ones, "axis_0"),
        bias_init=named(nn.initializers.zeros, "axis_0"))


def layer_norm(policy: Policy, use_scale: bool = True, *, name: str) -> nn.LayerNorm:
    """Returns a layer norm with bias; statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-6, dtype=policy.compute_dtype, param_dtype=policy.param_dtype,
        use_fast_variance=False, use_scale=use_scale, name=name,
        scale_init=named(nn.initializers.ones, "axis_0"),
        bias_init=named(nn.initializers.zeros, "axis_0"))


def biased_dense(features: int, axes: tuple[str, str], policy: Policy, use_bias: bool = True, *,
                 name: str) -> nn.Dense:
    """Returns x·W + b over the last axis."""
    return nn.Dense(
        features, use_bias, dtype=policy.compute_dtype, param_dtype=policy.param_dtype, name=name,
        kernel_init=named(MLP_KERNEL, *axes), bias_init=named(nn.initializers.zeros, axes[1]))


def check_training(config: Any) -> None:
    """Raises `UserError` unless `dropout_rate`, `remat_policy` and `precision` of a codec can be.
    """
    rate = config.dropout_rate
    if isinstance(rate, bool) or not 0 <= rate < 1:
        raise UserError(f"{type(config).__name__}.dropout_rate is a share in [0, 1)", got=rate,
                        fix="0.0 for none")
    remat_policy(config.remat_policy, platform="cpu")
    if not isinstance(config.precision, Policy):
        resolve_policy(config.precision if config.precision != "auto" else "float32")


def encoding_flops(codec: Any) -> float:
    """Returns the FLOPs of coding one picture or spectrogram, by the config of a codec."""
    module = codec.build()
    signal = jax.ShapeDtypeStruct((1, *codec.signal.shape), codec.signal.dtype)
    variables = jax.eval_shape(lambda key, x: module.init(key, codec.prepare(x)),
                               jax.random.key(0), signal)
    lowered = jax.jit(lambda variables, x: module.apply(
        variables, codec.prepare(x), method="encode")).lower(meta.unbox(variables), signal)
    return (lowered.cost_analysis() or {}).get("flops", 0.0)


def rematted(block: type[nn.Module], policy: str) -> Any:
    """Returns the class of a block whose backward pass recomputes what `policy` says."""
    chosen = remat_policy(policy)
    return block if chosen is None else nn.remat(block, policy=chosen)


def dropout(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
    """Returns x with features dropped where `module` was given an rng 'dropout'."""
    return nn.Dropout(rate)(x, deterministic=not module.has_rng("dropout"))


class Codebook(nn.Module):
    """The vectors that codes stand for.

    Attributes:
        num_codes: vectors.
        features: numbers in a vector.
        unit_length: compare directions: vectors and codebook are scaled to length 1.
        param_dtype: dtype of the stored table.
    """

    num_codes: int
    features: int
    unit_length: bool = False
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.embedding = self.param(
            # Its few numbers a vector are not split: a mesh may have more devices than that.
            "embedding", named(_uniform(1.0 / self.num_codes), "vocab", "unmodeled"),
            (self.num_codes, self.features), self.param_dtype)

    def table(self) -> Float[Array, "v d"]:
        """Returns the vectors of all codes, float32, of length 1 where `unit_length`."""
        table = self.embedding.astype(jnp.float32)
        return unit(table) if self.unit_length else table

    def comparable(self, vectors: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Returns vectors as they are compared to the table: float32, as long as its own."""
        vectors = vectors.astype(jnp.float32)
        return unit(vectors) if self.unit_length else vectors

    def codes(self, vectors: Float[Array, "*batch d"]) -> Int[Array, "*batch"]:
        """Returns the codes nearest to `vectors`, int32; they have no gradient."""
        return nearest(self.comparable(vectors), self.table())

    def vectors(self, codes: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """Returns the vectors of `codes`, float32; a code beyond the table is its last one."""
        return jnp.take(self.table(), codes, axis=0, mode="clip")


def _uniform(bound: float) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def unit(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Returns x · rsqrt(max(Σ x², 1e-12)) over the last axis: vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def nearest(vectors: Float[Array, "*batch d"], table: Float[Array, "v d"]
            ) -> Int[Array, "*batch"]:
    """Returns the row of `table` with the least squared distance to each vector, int32.

    Of equally near rows the first. The table is gone through in pieces, so that memory does not
    grow with it; the batch dimension stays whole, and may be split over devices.
    """
    vectors, table = jax.lax.stop_gradient((vectors, table))
    num_codes = table.shape[0]
    size = min(_CODES_AT_ONCE, num_codes)
    pieces = -(-num_codes // size)
    padded = jnp.pad(table, ((0, pieces * size - num_codes), (0, 0)))
    lengths = jnp.where(jnp.arange(pieces * size) < num_codes,
                        jnp.sum(jnp.square(padded), -1), jnp.inf)
    own = jnp.sum(jnp.square(vectors), -1, keepdims=True)

    def look(best: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, jax.Array, jax.Array]
             ) -> tuple[tuple[jax.Array, jax.Array], None]:
        start, rows, squares = piece
        products = jnp.einsum("...d,vd->...v", vectors, rows,
                              precision=jax.lax.Precision.HIGHEST)
        distances = own + squares - 2.0 * products
        at = jnp.argmin(distances, -1).astype(jnp.int32)
        least = jnp.min(distances, -1)
        nearer = least < best[0]
        return (jnp.where(nearer, least, best[0]), jnp.where(nearer, start + at, best[1])), None

    # Made of the vectors, so that they are split over devices as those are.
    first = (jnp.full_like(own[..., 0], jnp.inf), jnp.zeros_like(own[..., 0], jnp.int32))
    starts = jnp.arange(pieces, dtype=jnp.int32) * size
    (_, codes), _ = jax.lax.scan(look, first, (
        starts, padded.reshape(pieces, size, -1), lengths.reshape(pieces, size)))
    return codes


def straight_through(vectors: Float[Array, "*batch d"], quantized: Float[Array, "*batch d"]
                     ) -> Float[Array, "*batch d"]:
    """Returns `quantized`, with the gradient that `vectors` would have (arXiv 1711.00937)."""
    return vectors + jax.lax.stop_gradient(quantized - vectors)


def grid_positions(rows: int, columns: int, features: int) -> Float[Array, "n d"]:
    """Returns fixed positions [rows · columns, features], row-major.

    The first half of the features tells the column, the second the row, each as sines followed by
    cosines of position / 10000^(i / (features / 4)).
    """
    quarter = features // 4
    frequencies = 10000.0 ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)

    def waves(positions: jax.Array) -> jax.Array:
        angles = positions[:, None].astype(jnp.float32) * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    return jnp.concatenate([waves(column), waves(row)], -1)
