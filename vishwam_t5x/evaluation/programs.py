"""What runs on the devices when something is written or scored; traced under `jax.jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vishwam_t5x.evaluation.decoding_config import DecodingConfig
from vishwam_t5x.models import beam_search, decoding, guidance
from vishwam_t5x.objectives.chunked_loss import num_chunks_for
from vishwam_t5x.parallelism.sharding import batch_parts, current_partitioning, current_platform

_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Writing:
    """How one modality of a model is written.

    Attributes:
        modality: its name.
        config: as configured.
        length: most tokens, the end of a text included.
        codes: (first token that is a code, one past the last) of a grid; None: a text, with an end.
        allowed: the mask of `config.allowed`; None: anything.
    """

    modality: str
    config: DecodingConfig
    length: int
    codes: tuple[int, int] | None = None
    allowed: decoding.AllowedFn | None = None

    def only_codes(self, logits: Float[Array, "R V"], position: Int[Array, ""]
                   ) -> Float[Array, "R V"]:
        """Forbids tokens of the table that are no codes."""
        del position
        if self.codes is None:
            return logits
        tokens = jnp.arange(logits.shape[-1])
        return jnp.where((tokens >= self.codes[0]) & (tokens < self.codes[1]), logits, -jnp.inf)


def write(model: Any, params: Any, batch: Mapping[str, jax.Array], key: jax.Array, how: Writing
          ) -> decoding.Decoded:
    """Encodes a batch once and writes a modality for each example.

    Args:
        model: Flax module.
        params: of it.
        batch: inputs, targets if they are prompts, and what the task hid, 'task_mask', where the
            model reads that; guided, of each example with its text and then without.
        key: of sampling.
        how: what is written.
    """
    config, variables, modality = how.config, {"params": params}, how.modality
    encoded = model.apply(variables, batch, method="encode")
    cache = model.apply(variables, encoded, how.length, config.num_decodes,
                        batch.get(f"targets/{modality}/task_mask"), method="init_cache")

    def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return model.apply(variables, tokens, cache, modality, method="decode_step")

    def reorder(cache: Any, rows: jax.Array) -> Any:
        return cache.reorder(
            guidance.paired_rows(rows, config.num_decodes) if config.guidance else rows)

    rows, prompt = encoded.hidden.shape[0], batch.get(f"targets/{modality}/targets")
    taken = step
    if config.guidance:
        rows, prompt = rows // 2, None if prompt is None else prompt[::2]
        taken = guidance.guided(step, config.guidance, config.num_decodes)
    shared = {"batch_size": rows, "max_length": how.length, "logits_hook": how.only_codes,
              "allowed": how.allowed}
    if config.method == "beam":
        return beam_search.beam_search(
            taken, cache, reorder, num_beams=config.num_decodes, alpha=config.alpha,
            eos_id=_NO_TOKEN if how.codes else decoding.EOS_ID, **shared)
    shared |= {"eos_id": None if how.codes else decoding.EOS_ID, "prompt": prompt}
    if config.method == "greedy":
        return decoding.greedy(taken, cache, **shared)
    return decoding.sample(taken, cache, key, num_decodes=config.num_decodes,
                           temperature=config.temperature, top_k=config.top_k,
                           top_p=config.top_p, **shared)


def score(model: Any, params: Any, batch: Mapping[str, jax.Array], how: Writing | None
          ) -> dict[str, tuple[Float[Array, " B"], Float[Array, "B M"]]]:
    """Returns the sums of the log-probabilities of a batch's targets, and each, by modality.

    Args:
        model: Flax module.
        params: of it.
        batch: inputs and targets.
        how: guided and constrained as this was written; None: the model's own.
    """
    encoded = model.apply({"params": params}, batch, method="encode")
    scores = {}
    for modality, hidden in model.apply({"params": params}, batch, encoded,
                                        method="decode").items():
        targets = batch[f"targets/{modality}/targets"]
        weights = batch[f"targets/{modality}/loss_mask"]
        if how is not None and how.config.guidance:
            targets, weights = targets[::2], weights[::2]
        gained = _token_scores(model, params, modality, hidden, targets, how)
        counted = jnp.where(weights > 0, gained * weights, 0.0)
        scores[modality] = jnp.sum(counted, axis=-1), counted
    return scores


def score_tokens(model: Any, params: Any, encoded: Any, targets: Mapping[str, jax.Array]
                 ) -> Float[Array, "B M"]:
    """Returns the log-probability of each token of texts, given encoded inputs.

    Args:
        model: Flax module.
        params: of it.
        encoded: what the encoder made of the inputs of each row.
        targets: the arrays of 'targets/text/…'.
    """
    hidden = model.apply({"params": params}, targets, encoded, method="decode")["text"]
    return _token_scores(model, params, "text", hidden, targets["targets/text/targets"], None)


def _token_scores(model: Any, params: Any, modality: str, hidden: Float[Array, "H M D"],
                  targets: Int[Array, "B M"], how: Writing | None) -> Float[Array, "B M"]:
    """Returns the log-probability of each target; logits are taken, and dropped, in chunks of the
    length as for the loss: all of 64 grids of 1,024 codes would be 4.3 GB."""
    length, here = targets.shape[1], current_partitioning()
    chunks = num_chunks_for(
        hidden.shape[0], length, model.config.target(modality).vocab_size, None,
        1 if here is None else batch_parts(here.mesh, here.rules), current_platform(),
        hidden.shape[2])
    width = -(-length // chunks)
    padded = [jnp.pad(array, [(0, 0), (0, chunks * width - length)] + [(0, 0)] * (array.ndim - 2))
              for array in (hidden, targets)]

    def of_chunk(number: jax.Array | int) -> jax.Array:
        first = number * width
        some, wanted = (jax.lax.dynamic_slice_in_dim(array, first, width, axis=1)
                        for array in padded)
        logits = model.apply({"params": params}, some, modality, method="logits_of")
        if how is not None and how.config.guidance:
            logits = guidance.guide(*guidance.pairs(logits), how.config.guidance)
        if how is not None and how.allowed is not None:
            logits = _allowed_logits(logits, targets, first, how.allowed)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(log_probs, wanted[..., None], axis=-1)[..., 0]

    if chunks == 1:
        return of_chunk(0)
    found = jax.lax.map(of_chunk, jnp.arange(chunks))
    return found.swapaxes(0, 1).reshape(targets.shape[0], -1)[:, :length]


def _allowed_logits(logits: Float[Array, "B C V"], targets: Int[Array, "B M"],
                    first: jax.Array | int, allowed: decoding.AllowedFn) -> Float[Array, "B C V"]:
    """Forbids at each place, from `first` on, what was forbidden when the tokens before it had been
    written."""
    places = jnp.arange(targets.shape[1])

    def at(number: jax.Array) -> jax.Array:
        before = jnp.where(places < first + number, targets, decoding.PAD_ID)
        return jnp.where(allowed(before, first + number), logits[:, number], -jnp.inf)

    return jax.lax.map(at, jnp.arange(logits.shape[1])).swapaxes(0, 1)
