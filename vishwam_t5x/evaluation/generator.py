"""Encoding once and decoding with a cache, in batches of few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vishwam_t5x.core.batch import BatchSpec, HistorySpec, ModalityLengths
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.data.assembly import PlacedExample, assemble
from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.evaluation.requests import Generated, Request, Scored
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
        prompt_with_targets: begin every text with the target of its example, as T5X does; the score
            counts the prompt. Not for 'beam'.

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
    prompt_with_targets: bool = False

    def __post_init__(self) -> None:
        one_of(self.method, METHODS, "method of decoding")
        used = {"greedy": ("prompt_with_targets",),
                "sample": ("temperature", "top_k", "top_p", "num_decodes", "seed",
                           "prompt_with_targets"),
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


def bucket(length: int, most: int | None = None) -> int:
    """Returns the size of the array for `length` slots: 16, 32, 64, …, but not above `most`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size if most is None else max(length, min(size, most))


def _histories(config: Any) -> dict[str, HistorySpec]:
    return {module.modality: HistorySpec(module.grid[0] * module.grid[1],
                                         module.resampler.num_latents)
            for module in config.inputs if hasattr(module, "resampler")}


def _without_budgets(model: Any) -> Any:
    """The same model, which encodes every frame that it is given."""
    inputs = model.config.inputs
    if not any(getattr(module, "frame_budget", None) for module in inputs):
        return model
    return model.clone(config=dataclasses.replace(model.config, inputs=tuple(
        dataclasses.replace(module, frame_budget=None)
        if getattr(module, "frame_budget", None) else module for module in inputs)))


def _prompt(request: Request, modality: str) -> np.ndarray:
    tokens = request.targets.get(f"targets/{modality}/targets", np.zeros((0,), np.int32))
    return tokens[tokens != decoding.EOS_ID]


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
        # Requests have as many frames as they have: no budget is kept to.
        self._model = _without_budgets(model)
        self._placement = Placement(mesh, rules, batch_size)
        self._histories = _histories(model.config)
        self.batch_size, self._largest = batch_size, dict(largest_inputs)
        self._max_text_length = max_text_length
        for modality, config in decoding_cfg.items():
            model.config.target(modality)
            if self._num_codes(modality) and config.max_length is not None:
                raise UserError(f"modality '{modality}' is always written whole",
                                got=f"max_length {config.max_length}", fix="leave max_length out")
            if self._num_codes(modality) and config.prompt_with_targets:
                raise UserError("only text can be prompted", got=f"modality '{modality}'",
                                fix="leave prompt_with_targets out")
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

    @property
    def description(self) -> str:
        """How each modality is written, in words that are the same in another process."""
        return repr({name: (self._length(name), config)
                     for name, config in sorted(self._configs.items())})

    def is_prompted(self, modality: str) -> bool:
        """Whether what is written of a modality begins with the example's target."""
        return self._configs[modality].prompt_with_targets

    def misfit(self, request: Request, modality: str | None = None) -> str | None:
        """Returns why a request cannot be answered, in words; None if it can.

        Args:
            request: what is asked.
            modality: what is to be written; None: the targets are to be scored.
        """
        if modality is None:
            size = request.target_slots().get("text", 0)
            return None if size <= self._max_text_length else (
                f"the target is too long to be scored ({size} tokens, at most "
                f"{self._max_text_length})")
        if not self.is_prompted(modality):
            return None
        size, most = len(_prompt(request, modality)), self._length(modality)
        return None if size < most else (
            f"the prompt leaves no room for what is to be written ({size} tokens, at most {most} "
            "in all)")

    def generate(self, params: Any, requests: Iterable[Request], modality: str, stream: int = 0,
                 token_scores: bool = False) -> Iterator[Generated]:
        """Writes `modality` for each request; results come batch by batch, not in order.

        Args:
            params: of the model, on the devices.
            requests: what to write something for.
            modality: what to write.
            stream: number that sampling draws from, beside the seed: another one for other examples
                of the same job.
            token_scores: give the log-probability of each token of a text, by one more pass.

        Raises:
            UserError: a prompt leaves no room for what is to be written.
        """
        config = self._configs[modality]
        prompted = config.prompt_with_targets
        if prompted:
            requests = self._prompts(requests, modality)
        for number, rows in enumerate(self._grouped(requests, prompted)):
            key = key_for(config.seed, modality, stream, number)
            arrays = self._arrays(rows, prompted)
            with self._placement.context():
                found = self._decode(params, self._placement.put(arrays), key, modality)
            found = jax.device_get(found)
            whole = [self._written(modality, tokens[-1], with_end=True)
                     for tokens in found.tokens[:len(rows)]]
            each = self._token_scores(params, rows, modality, whole) if token_scores else []
            for index, (request, ids) in enumerate(zip(rows, whole, strict=True)):
                decodes = [(self._written(modality, tokens), float(score)) for tokens, score in
                           zip(found.tokens[index], found.scores[index], strict=True)]
                yield Generated(
                    request.tag, {modality: decodes[-1][0]}, {modality: decodes[-1][1]},
                    {modality: ids}, {modality: decodes},
                    {modality: each[index][:len(ids)]} if len(each) else {})

    def score(self, params: Any, requests: Iterable[Request]) -> Iterator[Scored]:
        """Yields the log-probabilities of each request's targets, in another order."""
        for rows in self._grouped(requests, with_targets=True):
            arrays = self._arrays(rows, with_targets=True)
            with self._placement.context():
                found = self._score(params, self._placement.put(arrays))
            found = jax.device_get(found)
            for index, request in enumerate(rows):
                lengths = request.target_slots()
                yield Scored(
                    request.tag, {name: float(sums[index]) for name, (sums, _) in found.items()},
                    {name: each[index, :lengths.get(name, 0)]
                     for name, (_, each) in found.items()})

    def _token_scores(self, params: Any, rows: Sequence[Request], modality: str,
                      whole: Sequence[np.ndarray]) -> Any:
        """Log-probabilities [rows, n] of the tokens written; [] of a grid, whose other tokens were
        forbidden."""
        if self._num_codes(modality):
            return []
        targets = {modality: bucket(max(1, *map(len, whole)))}
        written = [dataclasses.replace(request, targets={f"targets/{modality}/targets": ids})
                   for request, ids in zip(rows, whole, strict=True)]
        arrays = self._arrays(written, True, targets)
        with self._placement.context():
            found = self._score(params, self._placement.put(arrays))
        return jax.device_get(found[modality][1])

    def _length(self, modality: str) -> int:
        """Most tokens of what is written, its end included."""
        return (self._num_codes(modality) or self._configs[modality].max_length
                or self._max_text_length)

    def _prompts(self, requests: Iterable[Request], modality: str) -> Iterator[Request]:
        """Leaves of the targets what is a prompt: those of one modality, without their end."""
        for request in requests:
            if (why := self.misfit(request, modality)) is not None:
                raise UserError(why, fix="DecodingConfig.max_length, or shorter prompts")
            yield dataclasses.replace(request, targets={
                f"targets/{modality}/targets": _prompt(request, modality)})

    # -- batches -------------------------------------------------------------------------------

    def _grouped(self, requests: Iterable[Request], with_targets: bool
                 ) -> Iterator[list[Request]]:
        """Yields up to a batch of requests of one shape; reads no further ahead than it must."""
        waiting: dict[Any, list[Request]] = {}
        for request in requests:
            shape = self._shape(request, with_targets)
            rows = waiting.setdefault(shape, [])
            rows.append(request)
            if len(rows) == self.batch_size:
                yield waiting.pop(shape)
        yield from waiting.values()

    def _shape(self, request: Request, with_targets: bool) -> Any:
        targets = request.target_slots() if with_targets else {}
        inputs = tuple((m, self._bucket(m, size)) for m, size in self._slots(request).items())
        return inputs, tuple((m, bucket(size)) for m, size in targets.items())

    def _slots(self, request: Request) -> dict[str, int]:
        """Slots of each input modality of a request; a frame takes several."""
        return {m: size * (self._histories[m].latents if m in self._histories else 1)
                for m, size in request.slots().items()}

    def _bucket(self, modality: str, size: int) -> int:
        """Slots of the array for `size` slots; of a history 1, 2, 4, 8, … frames."""
        most = self._largest.get(modality)
        if modality not in self._histories:
            return bucket(size, most)
        latents = self._histories[modality].latents
        frames = 1 << (size // latents - 1).bit_length()
        return max(size, min(frames * latents, most or frames * latents))

    def _arrays(self, rows: Sequence[Request], with_targets: bool,
                targets: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
        inputs, shape = map(dict, self._shape(rows[0], with_targets))
        targets = dict(shape if targets is None else targets)
        # A spec has targets; where none are wanted, one slot that is thrown away below.
        spec = BatchSpec(self.batch_size, sum(inputs.values()), sum(targets.values()) or 1,
                         inputs, targets or {"text": 1}, self._model.config.patch_dims,
                         packed=False, histories={m: history for m, history
                                                  in self._histories.items() if m in inputs})
        placed = []
        for index in range(self.batch_size):
            # Empty rows are filled with the last request: one that never ends would hold up all.
            request = rows[min(index, len(rows) - 1)]
            lengths = ModalityLengths(self._slots(request),
                                      request.target_slots() if with_targets else {})
            placed.append(PlacedExample(index, lengths, {**request.inputs, **request.targets}))
        arrays = assemble(spec, self.batch_size, placed)
        return {key: value for key, value in arrays.items()
                if with_targets or key.startswith("inputs/")}

    def _written(self, modality: str, tokens: np.ndarray, with_end: bool = False) -> np.ndarray:
        if self._num_codes(modality):
            return tokens
        ends = np.flatnonzero(tokens == decoding.EOS_ID)
        if ends.size:
            return tokens[:ends[0] + with_end]
        return tokens[:np.max(np.flatnonzero(tokens), initial=-1) + 1]

    # -- what is compiled ----------------------------------------------------------------------

    def _decode_batch(self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array,
                      modality: str) -> decoding.Decoded:
        model, config, variables = self._model, self._configs[modality], {"params": params}
        codes = self._num_codes(modality)
        length = self._length(modality)
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
        shared |= {"eos_id": None if codes else decoding.EOS_ID,
                   "prompt": batch.get(f"targets/{modality}/targets")}
        if config.method == "greedy":
            return decoding.greedy(step, cache, **shared)
        return decoding.sample(step, cache, key, num_decodes=config.num_decodes,
                               temperature=config.temperature, top_k=config.top_k,
                               top_p=config.top_p, **shared)

    def _score_batch(self, params: Any, batch: Mapping[str, jax.Array]
                     ) -> dict[str, tuple[jax.Array, jax.Array]]:
        logits = self._model.apply({"params": params}, batch, method="logits")
        scores = {}
        for modality, values in logits.items():
            log_probs = jax.nn.log_softmax(values.astype(jnp.float32))
            targets = batch[f"targets/{modality}/targets"]
            gained = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
            weights = batch[f"targets/{modality}/loss_mask"]
            counted = jnp.where(weights > 0, gained * weights, 0.0)
            scores[modality] = jnp.sum(counted, axis=-1), counted
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
