"""Which earlier codes of its grid a decoder slot may see: by layer, and by what was hidden.

DALL-E (arXiv 2102.12092) lets most layers see a row, every fourth a column and the last a
neighbourhood of the grid. Dynamic masking (Unified-IO 2, arXiv 2312.17172) lets no slot see the
input of a token that was hidden from the encoder: else the decoder could copy what it is to
reconstruct. The code released with Unified-IO 2's weights computes both and applies neither, and
when it writes it is told of nothing hidden. Here what is written follows the masks of training.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from vishwam_t5x.core.sequence import Pattern

ROW, COLUMN, NEIGHBOURHOOD = range(3)

REACH = 5
"""Rows and columns that a neighbourhood reaches: a kernel of 11 x 11."""


def layer_planes(num_layers: int) -> tuple[int, ...]:
    """Returns which of the three patterns each layer follows."""
    planes = [COLUMN if (layer - 1) % 4 == 0 else ROW for layer in range(num_layers)]
    return (*planes[:-1], NEIGHBOURHOOD)


def in_pattern(plane: ArrayLike, queries: Int[Array, "*q"], keys: Int[Array, "*k"],
               widths: Int[Array, "*k"]) -> Bool[Array, "..."]:
    """Returns whether a layer lets places see others; which come later is for the causal mask.

    Args:
        plane: `ROW`: the places up to one row back, `COLUMN`: those of its column,
            `NEIGHBOURHOOD`: those at most `REACH` rows and columns away.
        queries: places in a grid, row-major; broadcast against `keys`.
        keys: places in the same grid.
        widths: columns of the grid of the keys; 0: not a grid, all is seen.
    """
    columns = jnp.maximum(widths, 1)
    back = queries - keys
    near = (jnp.abs(queries // columns - keys // columns) <= REACH) & (
        jnp.abs(queries % columns - keys % columns) <= REACH)
    seen = jnp.where(jnp.equal(plane, ROW), back <= columns,
                     jnp.where(jnp.equal(plane, COLUMN), back % columns == 0, near))
    return seen | (widths == 0)


def plane_mask(plane: ArrayLike, pattern: Pattern) -> Bool[Array, "B M M"]:
    """Returns what a layer of that plane lets the slots of a row see, whatever their order."""
    return in_pattern(plane, pattern.places[:, :, None], pattern.places[:, None, :],
                      pattern.widths[:, None, :])


def visible_mask(visible: Bool[Array, "B M"]) -> Bool[Array, "B M M"]:
    """Returns the dynamic mask: slots with visible inputs see each other, others themselves."""
    itself = jnp.eye(visible.shape[1], dtype=jnp.bool_)
    return (visible[:, :, None] & visible[:, None, :]) | itself


def visible_at(visible: Bool[Array, "R T"], index: Int[Array, ""]) -> Bool[Array, "R T"]:
    """Returns the row of `visible_mask` of one slot, the same in all rows."""
    return (visible & jnp.take(visible, index, axis=1)[:, None]) | (
        jnp.arange(visible.shape[1]) == index)


def visible_inputs(task_mask: Int[Array, "B M"], pos_ids: Int[Array, "B M"]
                   ) -> Bool[Array, "B M"]:
    """Returns which decoder inputs carry a token that was not hidden; BOS is seen.

    Args:
        task_mask: 1 where the target was hidden from the encoder.
        pos_ids: place of the target in its own example, 0 at its start.
    """
    before = jnp.pad(task_mask, ((0, 0), (1, 0)))[:, :-1]
    return (before == 0) | (pos_ids == 0)
