"""Cross-entropy straight from hidden states, without ever holding all logits.

The target positions are taken in chunks along the length axis, so the batch stays sharded as it
is. While a chunk's logits exist, the forward pass also takes the gradient with respect to the
hidden states and the table; the backward pass only multiplies by the incoming scalar. Nothing is
recomputed, and no float32 array of shape [batch, length, vocab] is ever live. (The idea is that of
Wijmans et al. 2024, "Cut your losses", arXiv:2411.09009, and of Liger's fused linear
cross-entropy, arXiv:2410.10989.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from vishwam_t5x.objectives.losses import (
    LossConfig,
    LossSums,
    constant_parts,
    cross_entropy_sums,
    token_gradients,
    token_losses,
    weighted,
)

Constrain = Callable[[Array, tuple[str | None, ...]], Array]
"""Pins the sharding of an array, given the logical name of each axis."""

CHUNK_BYTES = {"cpu": 2 * 2**20}
"""Float32 logits of one chunk on one device, by platform; elsewhere `OTHER_CHUNK_BYTES`.

On CPUs a chunk should stay in the cache: value and gradient for 16 x 512 positions of 1,152 tokens
took 222 ms of CPU time plain and 98 ms in eight chunks. Accelerators want big matrix products.
"""
OTHER_CHUNK_BYTES = 64 * 2**20
# Every chunk adds a gradient of the whole table to the last one's: on CPUs, where the budget is
# small, a chunk has as many positions as the table is wide, or big tables are mostly added. (32,128
# pieces x 256, 256 positions: 340 of 691 ms of a step in 16 chunks.)

_CHUNK_ABOVE = 4  # chunks' worth of logits: below, the plain form is as good.

# Largest factor that keeps a float16 logit gradient (at most about 1 in size) far from overflow
# while tiny probabilities stay above its smallest normal number.
_FLOAT16_LIFT = 1024.0


class _Static(NamedTuple):
    """What must be known while tracing."""

    z_loss: float
    label_smoothing: float
    num_chunks: int
    scale: float
    batch_shards: int
    constrain: Constrain | None


def chunk_bytes(platform: str | None = None) -> int:
    """Returns the budget of a chunk's logits on one device; None: the default backend's."""
    return CHUNK_BYTES.get(platform or jax.default_backend(), OTHER_CHUNK_BYTES)


def should_chunk(batch: int, length: int, vocab_size: int, batch_shards: int = 1,
                 platform: str | None = None, width: int = 0) -> bool:
    """Returns whether the logits of one device are big enough to be taken in chunks.

    Args:
        batch: rows of the global batch.
        length: target positions per row.
        vocab_size: rows of the table.
        batch_shards: devices the batch is divided over.
        platform: 'cpu', 'gpu' or 'tpu' that will run it; None: the default backend.
        width: of the hidden states.
    """
    tokens = _tokens(vocab_size, platform, width)
    return batch * length > _CHUNK_ABOVE * tokens * batch_shards


def _tokens(vocab_size: int, platform: str | None, width: int) -> int:
    """Most positions of a chunk on one device."""
    platform = platform or jax.default_backend()
    return max(chunk_bytes(platform) // (4 * vocab_size), width if platform == "cpu" else 0)


def num_chunks_for(batch: int, length: int, vocab_size: int, chunk_tokens: int | None = None,
                   batch_shards: int = 1, platform: str | None = None, width: int = 0) -> int:
    """Returns into how many chunks to cut the length axis; 1 means not at all.

    The least number that keeps a chunk within its budget; if a number less than twice as large
    divides the length, that one, so that no position is padding.

    Args:
        batch: rows of the global batch.
        length: target positions per row.
        vocab_size: rows of the table.
        chunk_tokens: see `LossConfig`.
        batch_shards: devices the batch is divided over.
        platform: 'cpu', 'gpu' or 'tpu' that will run it; None: the default backend.
        width: of the hidden states.
    """
    if chunk_tokens == 0:
        return 1
    if chunk_tokens is None:
        if not should_chunk(batch, length, vocab_size, batch_shards, platform, width):
            return 1
        chunk_tokens = _tokens(vocab_size, platform, width) * batch_shards
    columns = max(chunk_tokens // batch, 1)
    fewest = -(-length // columns)
    return next((n for n in range(fewest, 2 * fewest) if length % n == 0), fewest)


def _project(hidden: Array, table: Array, static: _Static) -> Array:
    """Float32 logits [B, L, V]; the product is taken in the dtype of the hidden states."""
    logits = jnp.einsum("bld,vd->blv", hidden, table.astype(hidden.dtype),
                        preferred_element_type=jnp.float32)
    if static.scale != 1.0:
        logits = logits * static.scale
    return static.constrain(logits, ("batch", "length", "vocab")) if static.constrain else logits


def _counted(hidden: Array, weights: Array) -> Array:
    """Zeros at positions of weight 0: a NaN there would reach the table's gradient as 0 * NaN."""
    return jnp.where(weights[..., None] == 0.0, jnp.zeros((), hidden.dtype), hidden)


def _columns(array: Array, start: Array, width: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, width, axis=1)


def _pad_length(array: Array, num_chunks: int) -> Array:
    padding = -array.shape[1] % num_chunks
    return jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))


def _lift(weights: Array, dtype: Any) -> Array:
    """Factor that keeps logit gradients, times their weights, in the range of a narrow dtype."""
    if dtype != jnp.float16:
        return jnp.ones((), jnp.float32)
    return _FLOAT16_LIFT / jnp.maximum(jnp.max(jnp.abs(weights)), 1.0)


class _Gradients(NamedTuple):
    """Gradients of the loss sum: arrays, or None where nobody asked."""

    hidden: Any
    table: Any


def _chunk_gradients(logits: Array, log_z: Array, hidden: Array, table: Array, targets: Array,
                     weights: Array, lift: Array, want: tuple[bool, bool],
                     static: _Static) -> _Gradients:
    """Gradients of one chunk, float32, times `lift`: hidden [B, C, D], table [S, V, D]."""
    slope = token_gradients(logits, targets, log_z, static.z_loss, static.label_smoothing)
    slope = jnp.where(weights[..., None] == 0.0, 0.0, slope * (weights * lift)[..., None])
    slope = slope.astype(hidden.dtype)
    d_hidden = d_table = None
    if want[0]:
        d_hidden = jnp.einsum("blv,vd->bld", slope, table.astype(hidden.dtype),
                              preferred_element_type=jnp.float32)
    if want[1]:
        # One partial sum per shard of the batch: they are added once, after the loop, not by an
        # all-reduce of the whole table in every chunk.
        shards = static.batch_shards
        split = lambda x: x.reshape(shards, x.shape[0] // shards, *x.shape[1:])
        d_table = jnp.einsum("sblv,sbld->svd", split(slope), split(hidden),
                             preferred_element_type=jnp.float32)
    return _Gradients(d_hidden, d_table)


def _scan_chunks(hidden: Array, table: Array, targets: Array, weights: Array,
                 want: tuple[bool, bool], static: _Static) -> tuple[LossSums, _Gradients]:
    """The loss sums and the wanted gradients (hidden, table) of them, in one pass."""
    length, chunks = hidden.shape[1], static.num_chunks
    residual_dtype = jnp.float32 if hidden.dtype == jnp.float16 else hidden.dtype
    hidden, targets, weights = (_pad_length(x, chunks) for x in (hidden, targets, weights))
    width = hidden.shape[1] // chunks
    lift = _lift(weights, hidden.dtype)

    def body(carry: Any, index: Array) -> tuple[Any, None]:
        sums, gradients = carry
        h, t, w = (_columns(x, index * width, width) for x in (hidden, targets, weights))
        h = _counted(h, w)
        logits = _project(h, table, static)
        loss, z, correct, log_z = token_losses(logits, t, static.z_loss, static.label_smoothing)
        sums = sums + LossSums(weighted(loss, w, 1), weighted(z, w, 1), jnp.sum(w, axis=1),
                               weighted(correct, w, 1))
        if not any(want):
            return (sums, gradients), None
        new = _chunk_gradients(logits, log_z, h, table, t, w, lift, want, static)
        d_hidden, d_table = gradients
        if want[0]:
            piece = (new.hidden * (static.scale / lift)).astype(residual_dtype)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, piece, index * width, axis=1)
        if want[1]:
            d_table = d_table + new.table
        return (sums, _Gradients(d_hidden, d_table)), None

    start = _Gradients(
        jnp.zeros(hidden.shape, residual_dtype) if want[0] else None,
        jnp.zeros((static.batch_shards, *table.shape), jnp.float32) if want[1] else None)
    # Sums by row, added up after the loop: no chunk waits for a scalar from the other devices.
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (hidden.shape[0],)), LossSums.zeros())
    (rows, gradients), _ = jax.lax.scan(body, (rows, start), jnp.arange(chunks))
    sums = jax.tree.map(jnp.sum, rows)
    d_hidden, d_table = gradients
    return sums, _Gradients(
        d_hidden[:, :length] if want[0] else None,
        jnp.sum(d_table, axis=0) * (static.scale / lift) if want[1] else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden: Array, table: Array, targets: Array, weights: Array,
             static: _Static) -> LossSums:
    # Evaluation: no gradient is asked for, none is taken.
    return _scan_chunks(hidden, table, targets, weights, (False, False), static)[0]


def _chunked_forward(hidden: Any, table: Any, targets: Any, weights: Any,
                     static: _Static) -> tuple[LossSums, Any]:
    want = (hidden.perturbed, table.perturbed)
    sums, gradients = _scan_chunks(hidden.value, table.value, targets.value, weights.value, want,
                                   static)
    # Empty arrays carry the dtypes to the backward pass.
    like = (jnp.zeros((0,), hidden.value.dtype), jnp.zeros((0,), table.value.dtype))
    return sums, (gradients, like, weights.value)


def _chunked_backward(static: _Static, residuals: Any, cotangent: LossSums) -> tuple[Any, ...]:
    gradients, like, weights = residuals
    del static
    out: list[Array | None] = []
    for gradient, empty in zip(gradients, like, strict=True):
        if gradient is None or isinstance(cotangent.loss, SymbolicZero):
            out.append(None)
        else:
            out.append((gradient.astype(jnp.float32) * cotangent.loss).astype(empty.dtype))
    return out[0], out[1], None, None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)


def chunked_cross_entropy_sums(
        hidden: Float[Array, "b l d"], table: Float[Array, "v d"], targets: Int[Array, "b l"],
        weights: Float[Array, "b l"], z_loss: float = 1e-4, label_smoothing: float = 0.0, *,
        num_chunks: int, scale: float = 1.0, batch_shards: int = 1,
        constrain: Constrain | None = None) -> LossSums:
    """Returns `cross_entropy_sums(scale * hidden @ table.T, …)` without holding all its logits.

    The products are taken in the dtype of `hidden` and accumulated in float32. Only gradients
    somebody asks for are taken: none in evaluation, none of the table if it is frozen. A
    cotangent other than 1 (a loss scale, a normalizer) multiplies the stored gradient in float32.

    Args:
        hidden: decoder output, any floating dtype.
        table: embedding table used as output weights.
        targets: token ids in [0, v).
        weights: weight of each position; 0 counts nothing.
        z_loss: weight of log(Z)^2.
        label_smoothing: in [0, 1).
        num_chunks: pieces of the length axis; it is padded to a multiple of this.
        scale: factor on the logits, e.g. 1 / sqrt(d) for tied tables.
        batch_shards: devices the batch axis is divided over; that many partial sums of the table's
            gradient are kept, one on each, and added once. Must divide b.
        constrain: pins the sharding of each chunk's logits, axes ('batch', 'length', 'vocab').
    """
    assert num_chunks >= 1 and hidden.shape[0] % batch_shards == 0, (num_chunks, batch_shards)
    static = _Static(z_loss, label_smoothing, num_chunks, scale, batch_shards, constrain)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    return constant_parts(_chunked(hidden, table, targets, weights, static))


def projected_cross_entropy_sums(
        hidden: Float[Array, "b l d"], table: Float[Array, "v d"], targets: Int[Array, "b l"],
        weights: Float[Array, "b l"], config: LossConfig, *, scale: float = 1.0,
        batch_shards: int = 1, constrain: Constrain | None = None,
        platform: str | None = None) -> LossSums:
    """Returns the loss sums of hidden states, in the plain or the chunked form, by size.

    Args:
        hidden: decoder output, any floating dtype.
        table: embedding table used as output weights.
        targets: token ids in [0, v).
        weights: weight of each position.
        config: loss terms and `chunk_tokens`.
        scale: factor on the logits.
        batch_shards: devices the batch axis is divided over.
        constrain: pins the sharding of the logits, axes ('batch', 'length', 'vocab').
        platform: what will run it, if that is not the default backend (compiling ahead of time).
    """
    batch, length, vocab_size = *hidden.shape[:2], table.shape[0]
    chunks = num_chunks_for(batch, length, vocab_size, config.chunk_tokens, batch_shards, platform,
                            hidden.shape[2])
    if chunks > 1:
        return chunked_cross_entropy_sums(
            hidden, table, targets, weights, config.z_loss, config.label_smoothing,
            num_chunks=chunks, scale=scale,
            batch_shards=batch_shards if batch % batch_shards == 0 else 1, constrain=constrain)
    static = _Static(config.z_loss, config.label_smoothing, 1, scale, 1, constrain)
    return cross_entropy_sums(_project(_counted(hidden, weights), table, static), targets, weights,
                              config.z_loss, config.label_smoothing)
