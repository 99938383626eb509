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
        batch: inputs, and targets if they are prompts; guided, of each example with its text and
            then without.
        key: of sampling.
        how: what is written.
    """
    config, variables, modality = how.config, {"params": params}, how.modality
    encoded = model.apply(variables, batch, method="encode")
    cache = model.apply(variables, encoded, how.length, config.num_decodes, method="init_cache")

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
    logits = model.apply({"params": params}, batch, method="logits")
    scores = {}
    for modality, values in logits.items():
        targets = batch[f"targets/{modality}/targets"]
        weights = batch[f"targets/{modality}/loss_mask"]
        if how is not None and how.config.guidance:
            values = guidance.guide(*guidance.pairs(values), how.config.guidance)
            targets, weights = targets[::2], weights[::2]
        if how is not None and how.allowed is not None:
            values = _allowed_logits(values, targets, how.allowed)
        log_probs = jax.nn.log_softmax(values.astype(jnp.float32))
        gained = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        counted = jnp.where(weights > 0, gained * weights, 0.0)
        scores[modality] = jnp.sum(counted, axis=-1), counted
    return scores


def _allowed_logits(logits: Float[Array, "B M V"], targets: Int[Array, "B M"],
                    allowed: decoding.AllowedFn) -> Float[Array, "B M V"]:
    """Forbids at each place what was forbidden when the tokens before it had been written."""
    places = jnp.arange(targets.shape[1])

    def at(place: jax.Array) -> jax.Array:
        before = jnp.where(places < place, targets, decoding.PAD_ID)
        return jnp.where(allowed(before, place), logits[:, place], -jnp.inf)

    return jax.lax.map(at, places).swapaxes(0, 1)


def score_tokens(model: Any, params: Any, encoded: Any, targets: Mapping[str, jax.Array]
                 ) -> Float[Array, "B M"]:
    """Returns the log-probability of each token of texts, given encoded inputs.

    Args:
        model: Flax module.
        params: of it.
        encoded: what the encoder made of the inputs of each row.
        targets: the arrays of 'targets/text/…'.
    """
    logits = model.apply({"params": params}, targets, encoded, method="target_logits")["text"]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_probs, targets["targets/text/targets"][..., None], -1)[..., 0]
