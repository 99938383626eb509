"""Layers shared by every stack: matmul, norm, embedding table, gated MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vishwam_t5x.parallelism.remat import MLP_HIDDEN, MLP_OUT
from vishwam_t5x.parallelism.sharding import constrain
from vishwam_t5x.precision.policy import Policy

Initializer = Callable[..., jax.Array]

ATTENTION_KERNEL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
MLP_KERNEL = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # T5X's and Flax's name
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
}


def named(init: Initializer, *axes: str) -> Initializer:
    """Returns the initializer whose parameters are boxed with their logical axes.

    `nn.Module.param` takes them out of the box, so a module sees arrays.
    """
    return nn.with_logical_partitioning(init, axes)  # type: ignore[return-value]


class Dense(nn.Module):
    """x·W, perhaps with a bias; the one matmul with a kernel: LoRA and quantization take hold.

    The leading dimensions of x are folded into one: XLA:CPU runs the backward pass of the plain
    2-D matmul 1.3 times as fast as that of the 3-D one, and other backends do not mind.

    Attributes:
        features: size of the output.
        kernel_axes: logical axes of the kernel, (in, out).
        kernel_init: initializer of the kernel.
        dtype: dtype of the matmul and its result.
        param_dtype: dtype of the stored kernel.
        use_bias: add a vector, zero at first.
    """

    features: int
    kernel_axes: tuple[str, str]
    kernel_init: Initializer = MLP_KERNEL
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        kernel = self.param(
            "kernel", named(self.kernel_init, *self.kernel_axes),
            (x.shape[-1], self.features), self.param_dtype)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = jax.lax.dot_general(rows, kernel.astype(self.dtype), (((1,), (0,)), ((), ())))
        if self.use_bias:
            bias = self.param(
                "bias", named(nn.initializers.zeros_init(), *self.kernel_axes[1:]),
                (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"], epsilon: float
             ) -> Float[Array, "*batch D"]:
    """Returns x · rsqrt(mean(x²) + epsilon) · scale in the dtype of x; see `RMSNorm`.

    The gradient is written out: automatic differentiation keeps and rereads three arrays of the
    size of x where this keeps x and one number a row.
    """
    return _rms_norm_forward(x, scale, epsilon)[0]


def _rms_norm_forward(x: jax.Array, scale: jax.Array, epsilon: float
                      ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jax.lax.square(wide), axis=-1, keepdims=True) + epsilon)
    y = (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)
    return y, (x, inverse, scale)


def _rms_norm_backward(epsilon: float, residuals: tuple[jax.Array, jax.Array, jax.Array],
                       gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    del epsilon
    x, inverse, scale = residuals
    normed, wide = x.astype(jnp.float32) * inverse, gradient.astype(jnp.float32)
    scaled = wide * scale.astype(jnp.float32)
    along = jnp.mean(scaled * normed, axis=-1, keepdims=True)
    d_scale = jnp.sum((wide * normed).reshape(-1, x.shape[-1]), axis=0)
    return (inverse * (scaled - normed * along)).astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(nn.Module):
    """y = x · rsqrt(mean(x²) + epsilon) · scale over the last axis (arXiv 1910.07467).

    Statistics are float32; the quotient is cast to `dtype` before it is scaled, as T5X and
    Unified-IO 2 do, which matters in bfloat16.

    Attributes:
        axis: logical axis of the scale.
        epsilon: added to the mean square.
        dtype: dtype of the result.
        param_dtype: dtype of the stored scale.
    """

    axis: str = "embed"
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param(
            "scale", named(nn.initializers.ones_init(), self.axis),
            (x.shape[-1],), self.param_dtype)
        return rms_norm(x.astype(self.dtype), scale, self.epsilon)


class Embed(nn.Module):
    """A table of vectors, read by token id and, transposed, by the output layer of its modality.

    Attributes:
        num_embeddings: rows of the table.
        features: size of a vector.
        one_hot: look up by a one-hot matmul. A gather is twice as fast on CPU and GPU; a TPU whose
            table is split over 'vocab' may prefer the matmul.
        dtype: dtype of the looked-up vectors and of `table()`.
        param_dtype: dtype of the stored table.
        axis: logical axis of a vector's numbers; 'unmodeled', which is not split, of those that are
            not as wide as the model: a mesh may have more devices than they have numbers.
    """

    num_embeddings: int
    features: int
    one_hot: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis: str = "embed"

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            named(nn.initializers.normal(1.0), "vocab", self.axis),
            (self.num_embeddings, self.features), self.param_dtype)

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Returns the vectors of `ids`, which must lie in [0, num_embeddings)."""
        if self.one_hot:
            one_hot = jax.nn.one_hot(ids, self.num_embeddings, dtype=self.dtype)
            return one_hot @ self.table()
        vectors = jnp.take(self.table(), ids, axis=0, mode="clip")
        return constrain(vectors, ("batch", *("length",) * (ids.ndim - 1), "embed"))

    def table(self) -> Float[Array, "V D"]:
        """Returns the table in `dtype`, whole along 'embed' on every device.

        Pinned: else XLA gathers it again for every chunk of the loss, or, for a look-up, gathers
        the vectors of the whole batch on every device.
        """
        return constrain(self.embedding.astype(self.dtype), ("vocab", "embed"))


class MlpBlock(nn.Module):
    """wo · Dropout(∏ᵢ activationᵢ(x · wi_i)); ('silu', 'linear') is SwiGLU (arXiv 2002.05202).

    Attributes:
        mlp_dim: hidden units.
        activations: names in `ACTIVATIONS`, one per factor; a single one names its kernel 'wi'.
        dropout_rate: share of hidden units zeroed, the same ones at every position.
        dtype: dtype of the matmuls.
        param_dtype: dtype of the stored kernels.
    """

    mlp_dim: int
    activations: tuple[str, ...]
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], enable_dropout: bool = False
                 ) -> Float[Array, "B L D"]:
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden: jax.Array | None = None
        for index, activation in enumerate(self.activations):
            name = "wi" if len(self.activations) == 1 else f"wi_{index}"
            factor = ACTIVATIONS[activation](
                dense(self.mlp_dim, ("embed", "mlp"), name=name)(x))
            hidden = factor if hidden is None else hidden * factor
        assert hidden is not None
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        hidden = checkpoint_name(hidden, MLP_HIDDEN)
        hidden = dropout(self.dropout_rate)(hidden, deterministic=not enable_dropout)
        y = dense(x.shape[-1], ("mlp", "embed"), name="wo")(hidden)
        return checkpoint_name(y, MLP_OUT)


class MlpAdaptor(nn.Module):
    """wo · GELU(wi · x), both with a bias: between features of a kind and the model (LLaVA-1.5).

    Attributes:
        features: size of the hidden layer and of the output.
        axis: logical axis of what is read.
        dtype: dtype of the matmuls.
        param_dtype: dtype of the stored kernels.
    """

    features: int
    axis: str
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        dense = functools.partial(Dense, self.features, dtype=self.dtype,
                                  param_dtype=self.param_dtype, use_bias=True)
        hidden = ACTIVATIONS["gelu_exact"](dense((self.axis, "mlp"), name="wi")(x))
        return dense(("mlp", "embed"), name="wo")(hidden)


def modality_embedding(module: nn.Module, features: int, policy: Policy) -> Float[Array, " D"]:
    """Returns the vector that `module` adds to every slot of its modality, creating it at init."""
    vector = module.param(
        "modality_embedding",
        named(nn.initializers.normal(0.02), "embed"),
        (features,), policy.param_dtype)
    return vector.astype(policy.compute_dtype)


def dropout(rate: float) -> nn.Dropout:
    """Returns dropout that zeroes the same features at every position of a row, as T5X does."""
    return nn.Dropout(rate, broadcast_dims=(-2,))
