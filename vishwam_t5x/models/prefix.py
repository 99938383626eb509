"""Rows of a decoder-only model: the inputs of each example, its prefix, stand before its targets.

With one target modality, as T5X lays them out: the sequence input · target, shifted right by one
after a BOS, so that the last token of the input predicts the first target. The prefix, the BOS
included, is attended to in both directions. BOS comes as the decoder input of the first target
slot: that slot's embedding goes in front of the prefix, and its output is read where the prefix
ends.

With several, BOS says which modality is to be written, so it cannot stand in a prefix that they
share: each target begins with its own, and the prefix is the inputs alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vishwam_t5x.core.sequence import TargetSequence
from vishwam_t5x.models import positions, rows
from vishwam_t5x.parallelism.sharding import constrain

_LAST = jnp.iinfo(jnp.int32).max


class Joined(NamedTuple):
    """A joint row and where in it each target slot's output is.

    Attributes:
        sequence: the joint row, its padding at the end.
        columns: [B, M], column of the output of each target slot.
        slots: [B, L + M], the target slot whose output each column is, -1 for none.
    """

    sequence: TargetSequence
    columns: Int[Array, "B M"]
    slots: Int[Array, "B N"]

    def read(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B M D"]:
        """Returns the outputs of the target slots, in their order."""
        return rows.permute(hidden, self.columns, self.slots)


def join(prefix: Float[Array, "B L D"], prefix_segments: Int[Array, "B L"],
         targets: TargetSequence, bos_leads: bool) -> Joined:
    """Puts the inputs of each example before its targets.

    Args:
        prefix: embedded inputs, examples in any order.
        prefix_segments: number of each input slot's example in its row; 0 is padding.
        targets: embedded decoder inputs of the same examples, each one's slots side by side.
        bos_leads: the first slot of each example's targets goes in front of its prefix.
    """
    length, own = prefix.shape[1], targets.segment_ids
    first = (own > 0) & (own != jnp.pad(own, ((0, 0), (1, 0)))[:, :-1]) & bos_leads
    segments = jnp.concatenate([prefix_segments, own], axis=1)
    is_target = jnp.broadcast_to(jnp.arange(segments.shape[1]) >= length, segments.shape)
    leads = jnp.pad(first, ((0, 0), (length, 0)))
    index = _order(segments, jnp.where(leads, 0, 1 + is_target))
    reading = _order(segments, is_target.astype(jnp.int32))
    number = segments.shape[1]
    embeddings = jnp.concatenate([prefix, targets.embeddings], axis=1)
    joint = rows.permute(embeddings, index, rows.invert(index, number))
    sequence = TargetSequence(
        constrain(joint, ("batch", "length", "embed")), None,
        jnp.take_along_axis(segments, index, axis=1),
        jnp.take_along_axis(jnp.pad(targets.modality, ((0, 0), (length, 0))), index, axis=1),
        jnp.take_along_axis(leads | ~is_target, index, axis=1))
    return Joined(sequence, rows.invert(reading, number)[:, length:],
                  jnp.where(reading >= length, reading - length, -1))


def positions_of(sequence: TargetSequence) -> Int[Array, "B N"]:
    """Returns the positions of a joint row: its columns, in which an example lies side by side.

    But what `modality` keeps apart starts where the prefix ends, as if the others were not there.
    """
    columns = jnp.broadcast_to(jnp.arange(sequence.segment_ids.shape[1]),
                               sequence.segment_ids.shape)
    assert sequence.prefix is not None
    after = ~sequence.prefix

    def start_of_run(*kinds: Array) -> Array:
        change = columns == 0
        for kind in kinds:
            change = change | (kind != jnp.pad(kind, ((0, 0), (1, 0)))[:, :-1])
        return jax.lax.cummax(jnp.where(change, columns, 0), axis=1)

    first = start_of_run(sequence.segment_ids, after)
    own = start_of_run(sequence.segment_ids, after, sequence.modality)
    return columns - jnp.where(after, own - first, 0)


def align_right(bos: Float[Array, "B 1 D"] | None, prefix: Float[Array, "B L D"],
                segments: Int[Array, "B L"]) -> TargetSequence:
    """Returns BOS, if given, and the inputs of example 1 of each row, ending in the last column.

    So all rows go on in the same column, and distances in columns are those in the example.
    """
    valid = segments == 1
    if bos is not None:
        valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
        prefix = jnp.concatenate([bos, prefix], axis=1)
    index = jnp.argsort(valid.astype(jnp.int32), axis=1, stable=True).astype(jnp.int32)
    valid = jnp.take_along_axis(valid, index, axis=1)
    return TargetSequence(
        rows.take(prefix, index), None, valid.astype(jnp.int32),
        jnp.zeros_like(index), valid)


def column_angles(first: Int[Array, ""] | int, number: int, head_dim: int, theta: float | None
                  ) -> Float[Array, "1 N P"] | None:
    """Returns rotary angles of `number` columns from `first` on; None without rotary positions.

    Attention sees differences alone, and columns of an example lie side by side, so columns do for
    positions, whatever the modality.
    """
    if theta is None:
        return None
    return positions.text_angles((first + jnp.arange(number))[None], head_dim, theta)


def _order(segments: Int[Array, "B N"], rank: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """Slots by example, within one by rank, then as they stand; padding last."""
    key = jnp.where(segments > 0, segments * 4 + rank, _LAST)
    return jnp.argsort(key, axis=1, stable=True).astype(jnp.int32)
