"""Classifier-free guidance of decoding: away from what would be written without the text.

Each example is decoded twice in lockstep, with its text and without, and the next token is that of
both together. Ho and Salimans 2022, arXiv:2207.12598, for diffusion; Unified-IO 2,
arXiv:2312.17172, for codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vishwam_t5x.models.decoding import StepFn


def guide(given: Float[Array, "*R V"], bare: Float[Array, "*R V"], scale: float
          ) -> Float[Array, "*R V"]:
    """Returns (1 + scale) log p(token | text) - scale log p(token | no text), not normalized.

    Args:
        given: logits with the text.
        bare: logits without.
        scale: how far to go; 0: the model's own probabilities.
    """
    given, bare = (jax.nn.log_softmax(each.astype(jnp.float32)) for each in (given, bare))
    return (1 + scale) * given - scale * bare


def pairs(logits: Float[Array, "P *rest"]
          ) -> tuple[Float[Array, "B *rest"], Float[Array, "B *rest"]]:
    """Splits what was computed of examples with and without text, one after the other."""
    return logits[0::2], logits[1::2]


def guided(step: StepFn, scale: float, num_decodes: int) -> StepFn:
    """Returns the step function of B · num_decodes rows that `step` takes for twice as many.

    Args:
        step: of 2 B examples: each with its text, then without. Both read the same tokens.
        scale: see `guide`.
        num_decodes: rows of each.
    """
    def together(tokens: Int[Array, "R"], cache: object) -> tuple[Float[Array, "R V"], object]:
        both = jnp.repeat(tokens.reshape(-1, 1, num_decodes), 2, axis=1)
        logits, cache = step(both.reshape(-1), cache)
        each = logits.reshape(-1, num_decodes, logits.shape[-1])
        return guide(*pairs(each), scale).reshape(tokens.shape[0], -1), cache

    return together


def paired_rows(rows: Int[Array, "R"], num_decodes: int) -> Int[Array, "S"]:
    """Returns where the rows of both come from, if those of `guided` come from `rows`."""
    each = rows.reshape(-1, 1, num_decodes)
    first = num_decodes * jnp.arange(each.shape[0])[:, None, None]
    return (each + first + num_decodes * jnp.arange(2)[None, :, None]).reshape(-1)
