"""Encoding once and decoding with a cache, in batches of few shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.evaluation import constraints, options, programs
from vishwam_t5x.evaluation.coding import Coder
from vishwam_t5x.evaluation.decoding_config import DecodingConfig as DecodingConfig
from vishwam_t5x.evaluation.options import OptionScoring
from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.evaluation.requests import Generated, Request, Scored, Unwritten
from vishwam_t5x.evaluation.shapes import Shapes, bucket, histories, without_budgets
from vishwam_t5x.models import beam_search, decoding
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules

WithoutText = Callable[[np.ndarray, str], np.ndarray]
"""(ids of an input text, modality to be written) -> ids of the same input without its text."""

_NOTHING_LEFT = ("DecodingConfig.allowed left nothing to write: it must allow a token after every "
                 "beginning that it allows (1 ends a text)")


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
                 largest_inputs: Mapping[str, int], *, without_text: WithoutText | None = None,
                 encode: constraints.Encode | None = None,
                 option_scoring: OptionScoring = OptionScoring()) -> None:
        """Args:
            model: Flax module with `encode`, `init_cache`, `decode_step`, `decode`, `logits_of`.
            mesh: devices.
            rules: logical axis rules; the standard ones by default.
            batch_size: examples decoded together.
            decoding_cfg: how to write each modality; greedily those it does not name.
            max_text_length: most tokens of a text whose config does not say.
            largest_inputs: most slots of each input modality (shapes do not exceed them).
            without_text: of the objective; for guidance.
            encode: text -> ids without an end, for answers that `DecodingConfig.allowed` gives as
                text; None: `read_text` comes.
            option_scoring: how the best of a request's options is found.

        Raises:
            UserError: a modality the model does not write, beams of something without end, rows
                that do not divide over the devices, or a constraint that nothing can meet.
        """
        # Requests have as many frames as they have: no budget is kept to.
        self._model = model = without_budgets(model)
        self._placement, self.batch_size = Placement(mesh, rules, batch_size), batch_size
        self._coder = Coder(model, self._placement)
        self._shapes = Shapes(batch_size, dict(largest_inputs), model.config.patch_dims,
                              histories(model.config))
        self._max_text_length, self._without_text = max_text_length, without_text
        self._options = option_scoring
        for modality, config in decoding_cfg.items():
            self._check(modality, config)
        self._configs = {modality: decoding_cfg.get(modality, DecodingConfig())
                         for modality in model.config.target_modalities}
        self._writings = {modality: self._writing(modality, encode)
                          for modality, config in self._configs.items()
                          if encode is not None or not constraints.needs_text(config.allowed)}
        replicated = self._placement.replicated
        self._decode: Any = jax.jit(self._decode_batch, static_argnums=(3,),
                                    out_shardings=replicated)
        self._score: Any = jax.jit(self._score_batch, static_argnums=(2,),
                                   out_shardings=replicated)
        self._encode: Any = jax.jit(lambda params, batch: model.apply(
            {"params": params}, batch, method="encode"))
        self._choose: Any = jax.jit(lambda *arguments: programs.score_tokens(model, *arguments),
                                    out_shardings=replicated)

    @property
    def num_compiles(self) -> int:
        """How many programs were compiled so far, for writing, scoring and choosing."""
        return sum(program._cache_size() for program in (self._decode, self._score, self._encode,
                                                         self._choose))

    @property
    def configs(self) -> Mapping[str, DecodingConfig]:
        """How each modality is written."""
        return self._configs

    @property
    def description(self) -> str:
        """How each modality is written, in words that are the same in another process."""
        return re.sub(r" at 0x[0-9a-f]+", "", repr((
            {name: (self._length(name), config) for name, config in sorted(self._configs.items())},
            self._options)))

    def read_text(self, encode: constraints.Encode) -> None:
        """Takes the vocabulary, text -> ids without an end, once it is known.

        Raises:
            UserError: an answer that `DecodingConfig.allowed` gives as text cannot be written.
        """
        for modality, config in self._configs.items():
            if constraints.needs_text(config.allowed):
                self._writings[modality] = self._writing(modality, encode)

    def read_codes(self, encoders: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        """Takes what codes inputs that are read as codes, by modality: see `coding.Coder.use`."""
        self._coder.use(encoders)

    def with_codes(self, params: Any, requests: Iterable[Request]) -> Iterator[Request]:
        """Yields requests with their inputs coded, as `generate` and `score` do by themselves."""
        return self._coder.read(params, requests)

    def writing(self, modality: str) -> programs.Writing:
        """Returns how a modality is written, as the compiled programs know it.

        Raises:
            UserError: what is allowed is told in text, and there is no vocabulary.
        """
        if modality not in self._writings:
            self._writings[modality] = self._writing(modality, None)
        return self._writings[modality]

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
        if request.options:
            if modality != "text":
                return f"its options are texts, but what is to be written is {modality}"
            return options.misfit(request.options, self._max_text_length)
        if self._configs[modality].guidance and not request.slots().get("text"):
            return "its inputs have no text to be guided by"
        if getattr(self._model.config.target(modality), "shift_back", False) and np.any(
                request.targets.get(f"targets/{modality}/task_mask", 0)):
            return (f"the task hid a part of its {modality}, and CodeOutput.shift_back reads the "
                    "rest of it: it can be scored, but not written")
        if not self.is_prompted(modality):
            return None
        size, most = len(_prompt(request, modality)), self._length(modality)
        return None if size < most else (
            f"the prompt leaves no room for what is to be written ({size} tokens, at most {most} "
            "in all)")

    def generate(self, params: Any, requests: Iterable[Request], modality: str, stream: int = 0,
                 token_scores: bool = False) -> Iterator[Generated | Unwritten]:
        """Writes `modality` for each request, or chooses the best of its options; results come
        batch by batch, not in order. `Unwritten` are those that a constraint left nothing.

        Args:
            params: of the model, on the devices.
            requests: what to write something for.
            modality: what to write.
            stream: number that sampling draws from, beside the seed: another one for other examples
                of the same job.
            token_scores: give the log-probability of each token of a text, by one more pass.

        Raises:
            UserError: a prompt leaves no room for what is to be written, or an option cannot be
                scored.
        """
        config = self._configs[modality]
        self.writing(modality)  # says what it lacks, before anything is read
        prompted = config.prompt_with_targets
        asked = self._asked(self._coder.read(params, requests), modality)
        for number, rows in enumerate(self._shapes.grouped(asked, prompted)):
            if rows[0].options:
                yield from self._chosen(params, rows, token_scores)
                continue
            key = key_for(config.seed, modality, stream, number)
            arrays = self._shapes.arrays(rows, prompted)
            if self._model.config.target(modality).reads_task_mask:
                arrays[f"targets/{modality}/task_mask"] = self._shapes.task_mask(
                    rows, modality, self._num_codes(modality))
            with self._placement.context():
                found = self._decode(params, self._placement.put(arrays), key, modality)
            found = jax.device_get(found)
            whole = [self._cut(modality, tokens[-1], with_end=True)
                     for tokens in found.tokens[:len(rows)]]
            each = self._token_scores(params, rows, modality, whole) if token_scores else []
            for index, (request, ids) in enumerate(zip(rows, whole, strict=True)):
                decodes = [(self._cut(modality, tokens), float(score)) for tokens, score in
                           zip(found.tokens[index], found.scores[index], strict=True)]
                if config.allowed is not None and not (decodes := _possible(decodes)):
                    yield Unwritten(request.tag, _NOTHING_LEFT)
                    continue
                yield Generated(
                    request.tag, {modality: decodes[-1][0]}, {modality: decodes[-1][1]},
                    {modality: ids}, {modality: decodes},
                    {modality: each[index][:len(ids)]} if len(each) else {})

    def score(self, params: Any, requests: Iterable[Request]) -> Iterator[Scored]:
        """Yields the model's own log-probabilities of each request's targets, in another order."""
        for rows in self._shapes.grouped(self._coder.coded(params, requests),
                                         with_targets=True):
            arrays = self._shapes.arrays(rows, with_targets=True)
            with self._placement.context():
                found = self._score(params, self._placement.put(arrays), None)
            found = jax.device_get(found)
            for index, request in enumerate(rows):
                lengths = request.target_slots()
                yield Scored(
                    request.tag, {name: float(sums[index]) for name, (sums, _) in found.items()},
                    {name: each[index, :lengths.get(name, 0)]
                     for name, (_, each) in found.items()})

    def drawn(self, params: Any, modality: str, codes: Int[np.ndarray, "b n"]
              ) -> Float[np.ndarray, "b ..."]:
        """Returns what the model's own codec makes of at most `batch_size` grids of codes from 0:
        pictures in [0, 1], or spectrograms; every process must call it together."""
        return self._coder.drawn(params, modality, codes)

    def _chosen(self, params: Any, rows: Sequence[Request], token_scores: bool
                ) -> Iterator[Generated]:
        """Scores the options of requests of one shape; the inputs are encoded once."""
        texts = [request.options for request in rows]
        found: list[list[np.ndarray]] = [[] for _ in rows]
        # Without an encoder distances to the inputs grow with what stands between: one at a time.
        apart = not self._model.config.decoder_only
        most = self._options.max_tokens if apart else 1
        with self._placement.context():
            encoded = self._encode(params, self._placement.put(self._shapes.arrays(rows, False)))
            for now in options.rounds(texts, most):
                targets = options.laid_out(texts, now, self.batch_size, apart)
                scores = jax.device_get(self._choose(params, encoded,
                                                     self._placement.put(targets)))
                for row, values in options.token_scores(scores, texts, now):
                    found[row].append(values)
        for request, each in zip(rows, found, strict=True):
            scores = tuple(map(self._options.of, each))
            order = sorted(range(len(scores)), key=lambda one, by=scores: (by[one], -one))
            best = order[-1]
            decodes = [(self._cut("text", request.options[one]), scores[one]) for one in order]
            yield Generated(
                request.tag, {"text": decodes[-1][0]}, {"text": float(np.sum(each[best]))},
                {"text": request.options[best]}, {"text": decodes},
                {"text": each[best]} if token_scores else {}, scores)

    def _token_scores(self, params: Any, rows: Sequence[Request], modality: str,
                      whole: Sequence[np.ndarray]) -> Any:
        """Log-probabilities [rows, n] of the tokens written; [] of a grid, whose other tokens were
        forbidden."""
        if self._num_codes(modality):
            return []
        targets = {modality: bucket(max(1, *map(len, whole)))}
        written = [dataclasses.replace(request, targets={f"targets/{modality}/targets": ids})
                   for request, ids in zip(rows, whole, strict=True)]
        arrays = self._shapes.arrays(written, True, targets)
        with self._placement.context():
            found = self._score(params, self._placement.put(arrays), modality)
        return jax.device_get(found[modality][1])

    def _asked(self, requests: Iterable[Request], modality: str) -> Iterator[Request]:
        """Leaves of the targets what is a prompt: those of one modality, without their end; and
        adds the text that guidance leads away from."""
        config = self._configs[modality]
        for request in requests:
            if (why := self.misfit(request, modality)) is not None:
                raise UserError(why, fix="DecodingConfig.max_length, or shorter prompts and "
                                         "options")
            if config.prompt_with_targets and not request.options:
                request = dataclasses.replace(request, targets={
                    f"targets/{modality}/targets": _prompt(request, modality)})
            if config.guidance and not request.options:
                assert self._without_text is not None
                request = dataclasses.replace(request, bare=self._without_text(
                    request.inputs["inputs/text/tokens"], modality))
            yield request

    # -- how a modality is written -------------------------------------------------------------

    def _check(self, modality: str, config: DecodingConfig) -> None:
        self._model.config.target(modality)
        if self._num_codes(modality) and config.max_length is not None:
            raise UserError(f"modality '{modality}' is always written whole",
                            got=f"max_length {config.max_length}", fix="leave max_length out")
        if self._num_codes(modality) and config.prompt_with_targets:
            raise UserError("only text can be prompted", got=f"modality '{modality}'",
                            fix="leave prompt_with_targets out")
        if config.guidance and self._without_text is None:
            raise UserError("guidance needs an objective that knows an input without its text",
                            got=f"guidance {config.guidance} of {modality}",
                            fix="an objective with a method without_text, or guidance = 0")

    def _writing(self, modality: str, encode: constraints.Encode | None) -> programs.Writing:
        config = self._configs[modality]
        allowed = None if config.allowed is None else constraints.mask_of(
            config.allowed, self._written(modality, encode))
        return programs.Writing(modality, config, self._length(modality),
                                getattr(self._model.config.target(modality), "token_range", None),
                                allowed)

    def _written(self, modality: str, encode: constraints.Encode | None) -> constraints.Written:
        return constraints.Written(
            modality, self._model.config.target(modality).vocab_size,
            self._length(modality), not self._num_codes(modality), encode)

    def _length(self, modality: str) -> int:
        """Most tokens of what is written, its end included."""
        return (self._num_codes(modality) or self._configs[modality].max_length
                or self._max_text_length)

    def _num_codes(self, modality: str) -> int:
        """Tokens of a whole grid; 0 for text, which has an end."""
        return getattr(self._model.config.target(modality), "num_tokens", 0)

    def _cut(self, modality: str, tokens: np.ndarray, with_end: bool = False) -> np.ndarray:
        if self._num_codes(modality):
            return tokens
        ends = np.flatnonzero(tokens == decoding.EOS_ID)
        if ends.size:
            return tokens[:ends[0] + with_end]
        return tokens[:np.max(np.flatnonzero(tokens), initial=-1) + 1]

    # -- what is compiled ----------------------------------------------------------------------

    def _decode_batch(self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array,
                      modality: str) -> decoding.Decoded:
        return programs.write(self._model, params, batch, key, self._writings[modality])

    def _score_batch(self, params: Any, batch: Mapping[str, jax.Array], modality: str | None
                     ) -> dict[str, tuple[jax.Array, jax.Array]]:
        return programs.score(self._model, params, batch,
                              None if modality is None else self._writings[modality])


def _possible(decodes: list[tuple[np.ndarray, float]]) -> list[tuple[np.ndarray, float]]:
    """Leaves out what the constraint made impossible: beams or draws that it left nothing. A score
    that is no number is the model's doing."""
    return [(tokens, score) for tokens, score in decodes if not score <= beam_search.NEVER / 2]
