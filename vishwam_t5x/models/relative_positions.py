"""T5's relative positions: a learned number for each head and distance, added to attention logits.

Distances are counted in slots of the row (arXiv 1910.10683). Near ones have a bucket each, far ones
share buckets of logarithmic width. In packed rows only slots of one example see each other, and
those lie side by side, so the distance is that within the example.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vishwam_t5x.models.layers import named
from vishwam_t5x.parallelism.sharding import constrain


def relative_buckets(distance: Int[np.ndarray, "*shape"], *, bidirectional: bool,
                     num_buckets: int = 32, max_distance: int = 128) -> Int[np.ndarray, "*shape"]:
    """Returns the bucket of each distance, in [0, num_buckets).

    Half of the buckets hold one distance each, the others grow logarithmically up to
    `max_distance` and the last holds all beyond (the arithmetic is T5X's, float32 included, so
    that borders fall where they do there).

    Args:
        distance: key position less query position.
        bidirectional: later keys get buckets of their own; else they all are at distance 0.
        num_buckets: of one head.
        max_distance: from which on distances are not told apart.
    """
    behind = -np.asarray(distance)
    first = np.zeros_like(behind)
    if bidirectional:
        num_buckets //= 2
        first = (behind < 0) * num_buckets
        behind = np.abs(behind)
    else:
        behind = np.maximum(behind, 0)
    exact = num_buckets // 2
    logarithm = np.log(behind.astype(np.float32) / exact + np.finfo(np.float32).eps)
    share = logarithm / np.log(max_distance / exact)
    far = exact + (share * (num_buckets - exact)).astype(np.int32)
    return first + np.where(behind < exact, behind, np.minimum(far, num_buckets - 1))


class RelativePositionBias(nn.Module):
    """The table [heads, buckets] and the biases it makes.

    Attributes:
        num_heads: heads of the attention.
        bidirectional: as in `relative_buckets`; True in encoders.
        num_buckets: columns of the table.
        max_distance: as in `relative_buckets`.
        dtype: dtype of the biases.
        param_dtype: dtype of the stored table.
    """

    num_heads: int
    bidirectional: bool
    num_buckets: int = 32
    max_distance: int = 128
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.rel_embedding = self.param(
            "rel_embedding",
            named(
                nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
                "heads", "relpos_buckets"),
            (self.num_heads, self.num_buckets), self.param_dtype)

    def __call__(self, num_queries: int, num_keys: int) -> Float[Array, "1 H Q K"]:
        """Returns what is added to the logits of query q and key k, both counted from 0."""
        # One row by distance, skewed into the matrix by reshaping: no gather, so no scatter in the
        # backward pass. Row q of the wide matrix starts one column later than row q - 1.
        by_distance = self._by_distance(num_queries - 1, num_keys - 1)
        width = num_queries + num_keys - 1
        rows = jnp.broadcast_to(by_distance[:, None, :], (self.num_heads, num_queries, width))
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 1))).reshape(self.num_heads, -1)
        rows = rows[:, :num_queries * width].reshape(self.num_heads, num_queries, width)
        bias = rows[:, :, num_queries - 1:]
        return constrain(bias[None], (None, "heads", None, None))

    def at(self, query: Int[Array, ""], num_keys: int) -> Float[Array, "1 H 1 K"]:
        """Returns the bias of one query, whose position below `num_keys` need not be known yet."""
        by_distance = self._by_distance(num_keys - 1, num_keys - 1)
        bias = jax.lax.dynamic_slice_in_dim(by_distance, num_keys - 1 - query, num_keys, axis=1)
        return bias[None, :, None, :]

    def _by_distance(self, most_behind: int, most_ahead: int) -> Float[Array, "H N"]:
        """Biases of the distances -most_behind, ..., most_ahead."""
        distance = np.arange(-most_behind, most_ahead + 1)
        buckets = relative_buckets(distance, bidirectional=self.bidirectional,
                                   num_buckets=self.num_buckets, max_distance=self.max_distance)
        one_hot = buckets[None, :] == np.arange(self.num_buckets)[:, None]
        return jnp.dot(self.rel_embedding.astype(self.dtype), jnp.asarray(one_hot, self.dtype),
                       precision=jax.lax.Precision.HIGHEST)
