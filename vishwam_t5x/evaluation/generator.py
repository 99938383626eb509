"""Encoding once and decoding with a cache, in batches of few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vishwam_t5x.core.batch import BatchSpec, ModalityLengths, modality_order
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.data.assembly import PlacedExample, assemble
from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.models import beam_search, decoding
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules

SMALLEST_BUCKET = 16
METHODS = ("greedy", "sample", "beam")
_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How one modality is written.

    Attributes:
        method: 'greedy', 'sample', or 'beam'.
        temperature: of 'sample': divides the log-probabilities.
        top_k: of 'sample': draw among so many most probable tokens; 0: all.
        top_p: of 'sample': draw among the most probable tokens that reach this probability; 1: all.
        num_decodes: sequences sampled, or beams kept, per example; the one with the best score is
            the prediction.
        alpha: of 'beam': exponent of the length penalty.
        max_length: most tokens of a text, its end included; None: those of a decoder row. A grid of
            codes always has all its codes.
        seed: of 'sample'.

    Raises:
        UserError: a value out of its range, or one that the method does not use.
    """

    method: Literal["greedy", "sample", "beam"] = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_decodes: int = 1
    alpha: float = 0.6
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self.method, METHODS, "method of decoding")
        used = {"greedy": (), "sample": ("temperature", "top_k", "top_p", "num_decodes", "seed"),
                "beam": ("num_decodes", "alpha")}[self.method]
        for field in dataclasses.fields(self):
            if field.name in ("method", "max_length") or field.name in used:
                continue
            if getattr(self, field.name) != field.default:
                raise UserError(f"decoding by '{self.method}' has no {field.name}",
                                got=f"{field.name} = {getattr(self, field.name)}",
                                fix=f"leave it out, or set method to another of {METHODS}")
        if self.method == "sample" and not self.temperature > 0:
            raise UserError("the temperature of sampling must be above 0", got=self.temperature,
                            fix="method = 'greedy' takes the most probable token")
        if self.max_length is not None and self.max_length < 1:
            raise UserError("DecodingConfig.max_length must be at least 1 token",
                            got=self.max_length)
        if self.top_k < 0 or not 0 < self.top_p <= 1 or self.num_decodes < 1 or self.alpha < 0:
            raise UserError("a setting of decoding is out of its range",
                            got=f"top_k {self.top_k}, top_p {self.top_p}, num_decodes "
                                f"{self.num_decodes}, alpha {self.alpha}",
                            fix="top_k >= 0, 0 < top_p <= 1, num_decodes >= 1, alpha >= 0")


@dataclasses.dataclass(frozen=True)
class Request:
    """One example to write something for.

    Attributes:
        inputs: its part of a batch: 'inputs/text/tokens' [n], 'inputs/image/input' [n, p], ….
        targets: the same of the targets, 'targets/text/targets' [m]; {} where there are none. Used
            for scoring only.
        tag: handed back with the result, untouched.
    """

    inputs: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tag: Any = None

    @classmethod
    def from_example(cls, example: Mapping[str, np.ndarray], tag: Any = None) -> Request:
        """Splits what an objective made of a clean example."""
        return cls({key: value for key, value in example.items() if key.startswith("inputs/")},
                   {key: value for key, value in example.items() if key.startswith("targets/")},
                   tag)

    def slots(self) -> dict[str, int]:
        """Returns the slots of each input modality, in row order; those without any are left out.
        """
        found = {key.split("/")[1]: len(value) for key, value in self.inputs.items()
                 if key.endswith(("/tokens", "/input")) and len(value)}
        return {modality: found[modality] for modality in modality_order(found)}

    def target_slots(self) -> dict[str, int]:
        """The same of the target modalities."""
        found = {key.split("/")[1]: len(value) for key, value in self.targets.items()
                 if key.endswith("/targets") and len(value)}
        return {modality: found[modality] for modality in modality_order(found)}


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was written for a request.

    Attributes:
        tag: the request's.
        tokens: {modality: int32 [n]}: ids of the table, text without its end and padding.
        scores: {modality: log-probability in nats}; of a beam that has ended, over the length
            penalty.
    """

    tag: Any
    tokens: dict[str, np.ndarray]
    scores: dict[str, float]


def bucket(length: int, most: int | None = None) -> int:
    """Returns the size of the array for `length` slots: 16, 32, 64, …, but not above `most`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size if most is None else max(length, min(size, most))


class Generator:
    """Writes any target modality of a model; one compiled program for each shape of inputs.

    Rows of the batches are split over the mesh as in training. The results do not depend on the
    mesh; a sampled one depends on which examples share its batch.
    """

    def __init__(self, model: Any, mesh: Mesh, rules: LogicalAxisRules | None, batch_size: int,
                 decoding_cfg: Mapping[str, DecodingConfig], max_text_length: int,
                 largest_inputs: Mapping[str, int]) -> None:
        """Args:
            model: Flax module with `encode`, `init_cache`, `decode_step` and `logits`.
            mesh: devices.
            rules: logical axis rules; the standard ones by default.
            batch_size: examples decoded together.
            decoding_cfg: how to write each modality; greedily those it does not name.
            max_text_length: most tokens of a text whose config does not say.
            largest_inputs: most slots of each input modality (shapes do not exceed them).

        Raises:
            UserError: a modality the model does not write, beams of something without end, or rows
                that do not divide over the devices.
        """
        self._model, self._placement = model, Placement(mesh, rules, batch_size)
        self._batch_size, self._largest = batch_size, dict(largest_inputs)
        self._max_text_length = max_text_length
        for modality, config in decoding_cfg.items():
            model.config.target(modality)
            if self._num_codes(modality) and config.max_length is not None:
                raise UserError(f"modality '{modality}' is always written whole",
                                got=f"max_length {config.max_length}", fix="leave max_length out")
        self._configs = {modality: decoding_cfg.get(modality, DecodingConfig())
                         for modality in model.config.target_modalities}
        replicated = self._placement.replicated
        self._decode: Any = jax.jit(self._decode_batch, static_argnums=(3,),
                                    out_shardings=replicated)
        self._score: Any = jax.jit(self._score_batch, out_shardings=replicated)

    @property
    def num_compiles(self) -> int:
        """How many programs were compiled so far, for writing and for scoring."""
        return self._decode._cache_size() + self._score._cache_size()

    def generate(self, params: Any, requests: Iterable[Request], modality: str
                 ) -> Iterator[Generated]:
        """Writes `modality` for each request; results come batch by batch, not in order."""
        config = self._configs[modality]
        for number, rows in enumerate(self._grouped(requests, with_targets=False)):
            key = key_for(config.seed, modality, number)
            arrays = self._arrays(rows, with_targets=False)
            with self._placement.context():
                found = self._decode(params, self._placement.put(arrays), key, modality)
            found = jax.device_get(found)
            for request, tokens, score in zip(rows, found.tokens[:, -1], found.scores[:, -1],
                                              strict=False):
                yield Generated(request.tag, {modality: self._written(modality, tokens)},
                                {modality: float(score)})

    def score(self, params: Any, requests: Iterable[Request]
              ) -> Iterator[tuple[Any, dict[str, float]]]:
        """Yields (tag, {modality: log-probability of its targets, in nats}) of each request."""
        for rows in self._grouped(requests, with_targets=True):
            arrays = self._arrays(rows, with_targets=True)
            with self._placement.context():
                found = self._score(params, self._placement.put(arrays))
            found = jax.device_get(found)
            for index, request in enumerate(rows):
                yield request.tag, {modality: float(scores[index])
                                    for modality, scores in found.items()}

    # -- batches -------------------------------------------------------------------------------

    def _grouped(self, requests: Iterable[Request], with_targets: bool
                 ) -> Iterator[list[Request]]:
        """Yields up to a batch of requests of one shape; reads no further ahead than it must."""
        waiting: dict[Any, list[Request]] = {}
        for request in requests:
            shape = self._shape(request, with_targets)
            rows = waiting.setdefault(shape, [])
            rows.append(request)
            if len(rows) == self._batch_size:
                yield waiting.pop(shape)
        yield from waiting.values()

    def _shape(self, request: Request, with_targets: bool) -> Any:
        sides = [request.slots(), request.target_slots() if with_targets else {}]
        inputs = tuple((m, bucket(size, self._largest.get(m))) for m, size in sides[0].items())
        return inputs, tuple((m, bucket(size)) for m, size in sides[1].items())

    def _arrays(self, rows: Sequence[Request], with_targets: bool) -> dict[str, np.ndarray]:
        inputs, targets = map(dict, self._shape(rows[0], with_targets))
        # A spec has targets; where none are wanted, one slot that is thrown away below.
        spec = BatchSpec(self._batch_size, sum(inputs.values()), sum(targets.values()) or 1,
                         inputs, targets or {"text": 1}, self._model.config.patch_dims,
                         packed=False)
        placed = []
        for index in range(self._batch_size):
            # Empty rows are filled with the last request: one that never ends would hold up all.
            request = rows[min(index, len(rows) - 1)]
            lengths = ModalityLengths(request.slots(),
                                      request.target_slots() if with_targets else {})
            placed.append(PlacedExample(index, lengths, {**request.inputs, **request.targets}))
        arrays = assemble(spec, self._batch_size, placed)
        return {key: value for key, value in arrays.items()
                if with_targets or key.startswith("inputs/")}

    def _written(self, modality: str, tokens: np.ndarray) -> np.ndarray:
        if self._num_codes(modality):
            return tokens
        ends = np.flatnonzero(tokens == decoding.EOS_ID)
        return tokens[:ends[0]] if ends.size else tokens[:np.max(np.flatnonzero(tokens), initial=-1)
                                                         + 1]

    # -- what is compiled ----------------------------------------------------------------------

    def _decode_batch(self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array,
                      modality: str) -> decoding.Decoded:
        model, config, variables = self._model, self._configs[modality], {"params": params}
        codes = self._num_codes(modality)
        length = codes or config.max_length or self._max_text_length
        encoded = model.apply(variables, batch, method="encode")
        cache = model.apply(variables, encoded, length, config.num_decodes, method="init_cache")

        def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            return model.apply(variables, tokens, cache, modality, method="decode_step")

        shared = {"batch_size": encoded.hidden.shape[0], "max_length": length,
                  "logits_hook": self._allowed(modality)}
        if config.method == "beam":
            return beam_search.beam_search(
                step, cache, lambda cache, rows: cache.reorder(rows), num_beams=config.num_decodes,
                alpha=config.alpha, eos_id=_NO_TOKEN if codes else decoding.EOS_ID, **shared)
        eos_id = None if codes else decoding.EOS_ID
        if config.method == "greedy":
            return decoding.greedy(step, cache, eos_id=eos_id, **shared)
        return decoding.sample(step, cache, key, num_decodes=config.num_decodes,
                               temperature=config.temperature, top_k=config.top_k,
                               top_p=config.top_p, eos_id=eos_id, **shared)

    def _score_batch(self, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        logits = self._model.apply({"params": params}, batch, method="logits")
        scores = {}
        for modality, values in logits.items():
            log_probs = jax.nn.log_softmax(values.astype(jnp.float32))
            targets = batch[f"targets/{modality}/targets"]
            gained = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
            weights = batch[f"targets/{modality}/loss_mask"]
            scores[modality] = jnp.sum(jnp.where(weights > 0, gained * weights, 0.0), axis=-1)
        return scores

    def _num_codes(self, modality: str) -> int:
        """Tokens of a whole grid; 0 for text, which has an end."""
        return getattr(self._model.config.target(modality), "num_tokens", 0)

    def _allowed(self, modality: str) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        """Forbids tokens of the table that are no codes."""
        allowed = getattr(self._model.config.target(modality), "token_range", None)
        if allowed is None:
            return None
        first, end = allowed

        def hook(logits: jax.Array, position: jax.Array) -> jax.Array:
            tokens = jnp.arange(logits.shape[-1])
            return jnp.where((tokens >= first) & (tokens < end), logits, -jnp.inf)

        return hook
