"""Beam search with T5X's semantics: length penalty ((5 + length) / 6)^alpha (arXiv 1609.08144)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models.decoding import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    AllowedFn,
    Decoded,
    LogitsHook,
    StepFn,
    check_sizes,
    next_log_probs,
)

NEVER = -1.0e7
"""Score of what must not be chosen; finite, so that differences of such scores are numbers."""


class _State(NamedTuple):
    """Beams still growing and beams that have ended, both sorted by rising score."""

    position: Int[Array, ""]
    live: Int[Array, "B N T"]
    live_scores: Float[Array, "B N"]  # sums of log-probabilities
    finished: Int[Array, "B N T"]
    finished_scores: Float[Array, "B N"]  # over the length penalty
    ended: Bool[Array, "B N"]  # which of `finished` are sequences at all
    cache: Any


def length_penalty(length: Any, alpha: float) -> Any:
    """Returns what the score of a sequence of `length` tokens is divided by."""
    return ((5.0 + length) / 6.0) ** alpha


def beam_search(step: StepFn, cache: Any, reorder: Callable[[Any, Int[Array, "R"]], Any], *,
                batch_size: int, max_length: int, num_beams: int = 4, alpha: float = 0.6,
                eos_id: int = EOS_ID, logits_hook: LogitsHook | None = None,
                allowed: AllowedFn | None = None) -> Decoded:
    """Returns the `num_beams` best sequences found for each example, the best one last.

    Twice as many continuations as beams are looked at in each step, so that beams that end do not
    thin out those that grow. It stops when no growing beam can beat the worst ended one, its score
    taken over the penalty of `max_length` + 1 (T5X counts the BOS there). Where nothing has ended
    by then, the growing beams are returned with plain sums of log-probabilities.

    Args:
        step: next-token logits of B · num_beams rows.
        cache: the step function's state before the first token.
        reorder: (cache, rows [R]) -> cache whose row r continues what row `rows[r]` held.
        batch_size: examples B.
        max_length: tokens T of the returned sequences.
        num_beams: beams N per example.
        alpha: exponent of the length penalty; 0 for none.
        eos_id: token that ends a sequence.
        logits_hook: changes logits before anything else.
        allowed: which tokens may come next. Where it leaves fewer sequences than beams, the others
            score `NEVER` or less.

    Raises:
        UserError: a setting out of its range.
    """
    check_sizes(num_beams, max_length)
    if alpha < 0:
        raise UserError("alpha of the length penalty must not be negative", got=alpha,
                        fix="0.6, or 0 for none")

    def going(state: _State) -> jax.Array:
        attainable = state.live_scores[:, -1] / length_penalty(max_length + 1, alpha)
        worst = jnp.min(jnp.where(state.ended, state.finished_scores, NEVER), axis=1)
        return (state.position < max_length) & ~jnp.all(worst > attainable)

    def advance(state: _State) -> _State:
        return _advance(state, step, reorder, alpha, eos_id, logits_hook, allowed)

    last = jax.lax.while_loop(going, advance, _start(batch_size, num_beams, max_length, cache))
    any_ended = jnp.any(last.ended, axis=1)
    return Decoded(jnp.where(any_ended[:, None, None], last.finished, last.live),
                   jnp.where(any_ended[:, None], last.finished_scores, last.live_scores))


def _start(batch: int, beams: int, length: int, cache: Any) -> _State:
    # All beams are equal at first: one is enough, or the same sequence would be found N times.
    live_scores = jnp.tile(jnp.array([NEVER] * (beams - 1) + [0.0], jnp.float32), (batch, 1))
    empty = jnp.full((batch, beams, length), PAD_ID, jnp.int32)
    return _State(jnp.zeros((), jnp.int32), empty, live_scores, empty,
                  jnp.full((batch, beams), NEVER), jnp.zeros((batch, beams), bool), cache)


def _advance(state: _State, step: StepFn, reorder: Callable[[Any, jax.Array], Any], alpha: float,
             eos_id: int, hook: LogitsHook | None, allowed: AllowedFn | None) -> _State:
    position = state.position
    batch, beams, _ = state.live.shape
    before = jax.lax.dynamic_index_in_dim(
        state.live, jnp.maximum(position - 1, 0), axis=2, keepdims=False)
    last = jnp.where(position == 0, BOS_ID, before).reshape(-1)
    logits, cache = step(last, state.cache)
    log_probs = jnp.maximum(next_log_probs(
        logits, state.live.reshape(batch * beams, -1), position, hook, allowed), NEVER)
    vocab = log_probs.shape[-1]

    totals = log_probs.reshape(batch, beams, vocab) + state.live_scores[:, :, None]
    scores, flat = jax.lax.top_k(totals.reshape(batch, beams * vocab), min(2 * beams,
                                                                         beams * vocab))
    parents, token = flat // vocab, (flat % vocab).astype(jnp.int32)
    sequences = jnp.take_along_axis(state.live, parents[:, :, None], axis=1)
    sequences = jax.lax.dynamic_update_slice_in_dim(sequences, token[:, :, None], position, axis=2)
    ends = (token == eos_id) & (scores > NEVER / 2)  # a forbidden end is none

    live_scores, kept = _best(scores + ends * NEVER, beams)
    rows = jnp.take_along_axis(parents, kept, axis=1) + beams * jnp.arange(batch)[:, None]
    cache = reorder(cache, rows.reshape(-1))

    penalised = scores / length_penalty(position + 1, alpha) + ~ends * NEVER
    finished_scores, chosen = _best(
        jnp.concatenate([state.finished_scores, penalised], axis=1), beams)
    finished = jnp.concatenate([state.finished, sequences], axis=1)
    ended = jnp.concatenate([state.ended, ends], axis=1)
    return _State(
        position + 1, jnp.take_along_axis(sequences, kept[:, :, None], axis=1), live_scores,
        jnp.take_along_axis(finished, chosen[:, :, None], axis=1), finished_scores,
        jnp.take_along_axis(ended, chosen, axis=1), cache)


def _best(scores: Float[Array, "B M"], number: int) -> tuple[jax.Array, jax.Array]:
    """Returns the `number` greatest scores, rising, and where they stood."""
    values, indices = jax.lax.top_k(scores, number)
    return values[:, ::-1], indices[:, ::-1]
