"""Turning next-token logits into sequences: greedy, sampling, beam search.

Pure functions of a step function (tokens [R], cache) -> (logits [R, V], cache). The rows R are the
examples times the decodes of each, decodes of one example next to each other. All decode at the
same position, so the cache may hold it as one scalar. They may be traced under `jax.jit`.

Scores are sums of the log-probabilities that the step function gives (after `logits_hook` and
`allowed`, before temperature, top-k and top-p), greedy decoding included. As in T5X, decodes come
sorted by score, the best one last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vishwam_t5x.core.errors import UserError

Cache = TypeVar("Cache")
StepFn = Callable[[Int[Array, "R"], Any], tuple[Float[Array, "R V"], Any]]
LogitsHook = Callable[[Float[Array, "R V"], Int[Array, ""]], Float[Array, "R V"]]
"""(logits, position) -> logits: -inf forbids a token."""
AllowedFn = Callable[[Int[Array, "R T"], Int[Array, ""]], Bool[Array, "R V"]]
"""(tokens so far, their number) -> which tokens may come next: constrained decoding. Columns behind
the tokens so far hold `PAD_ID`."""

BOS_ID = 0
PAD_ID = 0
EOS_ID = 1


@struct.dataclass
class Decoded:
    """Decoded sequences.

    Attributes:
        tokens: [B, N, T] int32, the end-of-sequence token included, `PAD_ID` after it.
        scores: [B, N] float32, sum of log-probabilities (beam search: over the length penalty).
    """

    tokens: Int[Array, "B N T"]
    scores: Float[Array, "B N"]

    @property
    def best(self) -> Int[Array, "B T"]:
        """The decode with the highest score of each example."""
        return self.tokens[:, -1]


def next_log_probs(logits: Float[Array, "R V"], tokens: Int[Array, "R T"], position: Int[Array, ""],
                   hook: LogitsHook | None, allowed: AllowedFn | None) -> Float[Array, "R V"]:
    """Returns what the next token is drawn from, before temperature: float32, normalized over what
    hook and constraint leave; all -inf where they leave nothing."""
    logits = logits.astype(jnp.float32)
    if hook is not None:
        logits = hook(logits, position)
    if allowed is None:
        return jax.nn.log_softmax(logits)
    logits = jnp.where(allowed(tokens, position), logits, -jnp.inf)
    nothing = jnp.all(jnp.isneginf(logits), axis=-1, keepdims=True)
    return jnp.where(nothing, -jnp.inf, jax.nn.log_softmax(jnp.where(nothing, 0.0, logits)))


def keep_top_k(log_probs: Float[Array, "R V"], top_k: int) -> Float[Array, "R V"]:
    """Returns `log_probs` with -inf for all below the `top_k`-th greatest."""
    cutoff = jax.lax.top_k(log_probs, min(top_k, log_probs.shape[-1]))[0][..., -1:]
    return jnp.where(log_probs < cutoff, -jnp.inf, log_probs)


def keep_top_p(log_probs: Float[Array, "R V"], top_p: float) -> Float[Array, "R V"]:
    """Returns `log_probs` with -inf outside the nucleus (arXiv 1904.09751).

    The nucleus is the smallest set of most probable tokens that together reach `top_p`; it always
    holds the most probable one. `log_probs` need not be normalized.
    """
    ordered = -jnp.sort(-log_probs, axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # what the more probable tokens already reach
    inside = (before < top_p).at[..., 0].set(True)
    cutoff = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(log_probs < cutoff, -jnp.inf, log_probs)


def sample(step: StepFn, cache: Any, key: jax.Array, *, batch_size: int, max_length: int,
           num_decodes: int = 1, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
           eos_id: int | None = EOS_ID, prompt: Int[Array, "B P"] | None = None,
           logits_hook: LogitsHook | None = None, allowed: AllowedFn | None = None,
           rescale_log_probs: bool = False) -> Decoded:
    """Draws sequences token by token; ends early when all have ended.

    Args:
        step: next-token logits.
        cache: the step function's state before the first token, for B · num_decodes rows.
        key: random key; not used at temperature 0. Split once a token, as in T5X: the same key
            draws the same tokens.
        batch_size: examples B.
        max_length: tokens T of the returned sequences; those that have not ended are cut there.
        num_decodes: independent draws per example.
        temperature: divides the log-probabilities; 0 takes the most probable token (greedy).
        top_k: draw among the most probable `top_k` tokens; 0: among all.
        top_p: draw among the most probable tokens that reach this probability; 1: among all.
        eos_id: token that ends a sequence; None: all are `max_length` long (codes of an image).
        prompt: tokens every decode of an example begins with, `PAD_ID` after the prompt's end.
            They are part of the result, and their log-probabilities of the score.
        logits_hook: changes logits before anything else.
        allowed: which tokens may come next. A sequence that it leaves nothing ends, scored -inf.
        rescale_log_probs: score drawn tokens by the distribution they were drawn from, after
            temperature, top-k and top-p, as T5X does unless told otherwise; greedy decodes then
            all score 0.

    Raises:
        UserError: a setting out of its range.
    """
    _check_sampling(temperature, top_k, top_p, num_decodes, max_length)
    rows = batch_size * num_decodes
    forced = jnp.full((rows, max_length), PAD_ID, jnp.int32)
    if prompt is not None:
        width = min(prompt.shape[1], max_length)
        forced = forced.at[:, :width].set(
            jnp.repeat(prompt[:, :width].astype(jnp.int32), num_decodes, axis=0))

    def shaped(log_probs: jax.Array) -> jax.Array:
        if temperature == 0:
            return keep_top_k(log_probs, 1)
        log_probs = log_probs / temperature
        if top_k:
            log_probs = keep_top_k(log_probs, top_k)
        return keep_top_p(log_probs, top_p) if top_p < 1 else log_probs

    def draw(log_probs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        candidates = shaped(log_probs)
        drawn = jnp.argmax(log_probs, axis=-1) if temperature == 0 else jax.random.categorical(
            key, candidates)
        scored = jax.nn.log_softmax(candidates) if rescale_log_probs else log_probs
        return drawn.astype(jnp.int32), scored

    def unfinished(state: tuple) -> jax.Array:
        position, ended = state[0], state[2]
        return (position < max_length) & ~jnp.all(ended)

    def advance(state: tuple) -> tuple:
        position, last, ended, tokens, scores, cache, key = state
        now, key = jax.random.split(key)
        logits, cache = step(last, cache)
        log_probs = next_log_probs(logits, tokens, position, logits_hook, allowed)
        wanted = jax.lax.dynamic_index_in_dim(forced, position, axis=1, keepdims=False)
        drawn, scored = draw(log_probs, now)
        token = jnp.where(wanted == PAD_ID, drawn, wanted)
        scored = jnp.where((wanted == PAD_ID)[:, None], scored, log_probs)
        gained = jnp.take_along_axis(scored, token[:, None], axis=1)[:, 0]
        scores = scores + jnp.where(ended, 0.0, gained)
        token = jnp.where(ended, PAD_ID, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)
        ended = ended | _ends(token, gained, eos_id)
        return position + 1, token, ended, tokens, scores, cache, key

    start = (jnp.zeros((), jnp.int32), jnp.full((rows,), BOS_ID, jnp.int32),
             jnp.zeros((rows,), bool), jnp.full((rows, max_length), PAD_ID, jnp.int32),
             jnp.zeros((rows,), jnp.float32), cache, key)
    _, _, _, tokens, scores, _, _ = jax.lax.while_loop(unfinished, advance, start)
    return _sorted(tokens.reshape(batch_size, num_decodes, max_length),
                   scores.reshape(batch_size, num_decodes))


def _ends(token: Int[Array, "R"], gained: Float[Array, "R"], eos_id: int | None
          ) -> Bool[Array, "R"]:
    """Returns whether a sequence ends with a token, or because nothing may follow."""
    impossible = jnp.isneginf(gained)
    return impossible if eos_id is None else impossible | (token == eos_id)


def greedy(step: StepFn, cache: Any, *, batch_size: int, max_length: int,
           eos_id: int | None = EOS_ID, prompt: Int[Array, "B P"] | None = None,
           logits_hook: LogitsHook | None = None, allowed: AllowedFn | None = None) -> Decoded:
    """Returns the sequence of most probable tokens, with its true log-probability; see `sample`."""
    return sample(step, cache, jax.random.key(0), batch_size=batch_size, max_length=max_length,
                  temperature=0.0, eos_id=eos_id, prompt=prompt, logits_hook=logits_hook,
                  allowed=allowed)


def _check_sampling(temperature: float, top_k: int, top_p: float, num_decodes: int,
                    max_length: int) -> None:
    if temperature < 0:
        raise UserError("temperature must not be negative", got=temperature,
                        fix="0 for greedy decoding, 1 for the model's own probabilities")
    if top_k < 0:
        raise UserError("top_k must not be negative", got=top_k, fix="0 keeps all tokens")
    if not 0 < top_p <= 1:
        raise UserError("top_p is a probability in (0, 1]", got=top_p, fix="1.0 keeps all tokens")
    check_sizes(num_decodes, max_length)


def check_sizes(num_decodes: int, max_length: int) -> None:
    """Raises `UserError` unless there is something to decode."""
    for name, value in (("num_decodes", num_decodes), ("max_length", max_length)):
        if value < 1:
            raise UserError(f"{name} must be at least 1", got=value)


def _sorted(tokens: Int[Array, "B N T"], scores: Float[Array, "B N"]) -> Decoded:
    """Sorts decodes by rising score; equal ones keep their order."""
    order = jnp.argsort(scores, axis=1, stable=True)
    return Decoded(jnp.take_along_axis(tokens, order[:, :, None], axis=1),
                   jnp.take_along_axis(scores, order, axis=1))
