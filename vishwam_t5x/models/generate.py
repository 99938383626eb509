"""Decoding with an encoder-decoder: encode a batch once, then one cached step per token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vishwam_t5x.core.batch import Batch
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.models import decoding
from vishwam_t5x.models.beam_search import beam_search
from vishwam_t5x.models.cache import DecodeCache
from vishwam_t5x.models.decoding import Decoded, LogitsHook, StepFn
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.models.outputs.codes import CodeOutput

METHODS = ("greedy", "sample", "beam")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How sequences are decoded.

    Attributes:
        method: 'greedy' (the most probable token each time), 'sample' or 'beam'.
        max_length: most tokens of a text; a grid of codes always has all of its own.
        num_decodes: samples or beams per example; greedy decoding has one.
        temperature: of sampling, > 0; below 1 sharpens.
        top_k: sample among the most probable `top_k` tokens; 0: all.
        top_p: sample among the most probable tokens that reach this probability; 1: all.
        alpha: exponent of beam search's length penalty; 0: none.

    Raises:
        UserError: a value out of its range, or one that the method would not read.
    """

    method: str = "greedy"
    max_length: int = 128
    num_decodes: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    alpha: float = 0.6

    def __post_init__(self) -> None:
        one_of(self.method, METHODS, "decoding method")
        decoding.check_sizes(self.num_decodes, self.max_length)
        if self.method == "greedy" and self.num_decodes != 1:
            raise UserError("greedy decoding has one decode per example",
                            got=f"num_decodes = {self.num_decodes}",
                            fix="method = 'sample' or 'beam'")
        if self.method != "sample" and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise UserError(
                f"temperature, top_k and top_p are of method 'sample', not '{self.method}'",
                got=f"{self.temperature}, {self.top_k}, {self.top_p}", fix="method = 'sample'")
        if self.method == "sample" and self.temperature <= 0:
            raise UserError("the temperature of sampling must be positive", got=self.temperature,
                            fix="method = 'greedy' is the limit of temperature 0")
        if self.method != "beam" and self.alpha != 0.6:
            raise UserError(f"alpha is of method 'beam', not '{self.method}'", got=self.alpha,
                            fix="method = 'beam'")


def step_function(model: EncoderDecoder, variables: Any, modality: str) -> StepFn:
    """Returns (tokens [R], cache) -> (logits [R, V], cache) for one target modality."""

    def step(tokens: jax.Array, cache: DecodeCache) -> tuple[jax.Array, DecodeCache]:
        return model.apply(variables, tokens, cache, modality, method="decode_step")

    return step


def codes_only(target: CodeOutput) -> LogitsHook:
    """Returns the hook that forbids tokens which are no codes of the grid's codebook."""
    first, end = target.token_range

    def forbid(logits: jax.Array, position: jax.Array) -> jax.Array:
        del position
        token = jnp.arange(logits.shape[-1])
        return jnp.where((token >= first) & (token < end), logits, -jnp.inf)

    return forbid


def generate(model: EncoderDecoder, variables: Any, batch: Batch, modality: str,
             config: DecodingConfig, key: jax.Array, *, prompt: jax.Array | None = None,
             logits_hook: LogitsHook | None = None) -> Decoded:
    """Decodes one target modality for every row of a batch; may be traced under `jax.jit`.

    Args:
        model: the encoder-decoder.
        variables: {'params': …}.
        batch: the input side of a batch, one example a row (segment number 1 where rows are
            segmented); targets are ignored.
        modality: target modality. Text ends with its end-of-sequence token; a grid of codes has as
            many tokens as places, and no others than codes.
        config: method and its settings.
        key: random key of sampling.
        prompt: [B, P] int32 tokens every decode of an example begins with, 0 after their end; not
            for beam search.
        logits_hook: further constraint on the logits.

    Returns:
        Tokens [B, num_decodes, T] and scores, the best decode last.

    Raises:
        UserError: no such target modality, or settings that do not go together.
    """
    target = model.config.target(modality)
    hooks = [] if logits_hook is None else [logits_hook]
    length, eos_id = config.max_length, decoding.EOS_ID
    if isinstance(target, CodeOutput):
        hooks, length, eos_id = [codes_only(target), *hooks], target.num_tokens, None
    encoded = model.apply(variables, batch, method="encode")
    cache = model.apply(variables, encoded, length, config.num_decodes, method="init_cache")
    step = step_function(model, variables, modality)
    sizes = {"batch_size": encoded.hidden.shape[0], "max_length": length, "eos_id": eos_id,
             "logits_hook": _chain(hooks)}
    if config.method == "beam":
        if prompt is not None or eos_id is None:
            raise UserError("beam search is for texts without a prompt", got=f"'{modality}'"
                            + (" with a prompt" if prompt is not None else ""),
                            fix="method = 'greedy' or 'sample'")
        return beam_search(step, cache, DecodeCache.reorder, num_beams=config.num_decodes,
                           alpha=config.alpha, **sizes)
    temperature = 0.0 if config.method == "greedy" else config.temperature
    return decoding.sample(step, cache, key, num_decodes=config.num_decodes,
                           temperature=temperature, top_k=config.top_k, top_p=config.top_p,
                           prompt=prompt, **sizes)


def _chain(hooks: list[LogitsHook]) -> LogitsHook | None:
    if not hooks:
        return None

    def apply(logits: jax.Array, position: jax.Array) -> jax.Array:
        for hook in hooks:
            logits = hook(logits, position)
        return logits

    return apply
