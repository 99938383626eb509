"""What a model made of one example, by modality, and the line of JSON that says so."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vishwam_t5x.core.errors import one_of
from vishwam_t5x.evaluation.generator import Generator
from vishwam_t5x.evaluation.predictions import Prediction
from vishwam_t5x.evaluation.requests import Generated, Request, Unwritten
from vishwam_t5x.evaluation.task_metrics import PREDICT, PREDICT_WITH_AUX, SCORE
from vishwam_t5x.objectives.vocabulary import CODE_OFFSET, EOS_ID

MODES = (PREDICT, SCORE, PREDICT_WITH_AUX)
DecodeText = Callable[[np.ndarray], str]
_NOTHING: Mapping[str, np.ndarray] = types.MappingProxyType({})


@dataclasses.dataclass
class Answer:
    """One example and what was written for it.

    Attributes:
        inputs: the text the encoder read.
        input_slots: tokens, patches or frames of each input modality.
        targets: ids of the reference, by modality; {} where there is none.
        pretokenized: the reference as a task keeps it beside its ids, or None.
        written: what was written of each modality.
        target_scores: log-probability of the reference, in nats, by modality.
        options: texts of which the best is what is written of text; (): it is written freely.
        signals: modalities whose reference is pixels or a spectrogram; it is not kept here.
    """

    inputs: str
    input_slots: dict[str, int]
    targets: dict[str, np.ndarray]
    pretokenized: str | None = None
    written: dict[str, Generated] = dataclasses.field(default_factory=dict)
    target_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    options: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()

    @classmethod
    def to(cls, request: Request, decode_text: DecodeText, pretokenized: Any = None,
           options: tuple[str, ...] = (), signals: tuple[str, ...] = ()) -> Answer:
        """Returns the answer to a request, before anything is written."""
        tokens = request.inputs.get("inputs/text/tokens", np.zeros((0,), np.int32))
        if isinstance(pretokenized, bytes):
            pretokenized = pretokenized.decode("utf-8")
        return cls(decode_text(tokens), request.slots(),
                   {name: request.targets[f"targets/{name}/targets"]
                    for name in request.target_slots()}, pretokenized, options=options,
                   signals=signals)

    @property
    def tokens(self) -> dict[str, np.ndarray]:
        """Ids of what was written, by modality, as the tables number them."""
        return {name: done.tokens[name] for name, done in self.written.items()}

    @property
    def score(self) -> float:
        """Log-probability of what was written, in nats."""
        return sum(done.scores[name] for name, done in self.written.items())

    @property
    def target_score(self) -> float:
        """Log-probability of the reference, in nats; not a number if it was not asked for."""
        return sum(self.target_scores.values()) if self.target_scores else float("nan")

    @property
    def option_scores(self) -> dict[str, float]:
        """Score of each option; {} where there are none."""
        done = self.written.get("text")
        if done is None or done.option is None:
            return {}
        return dict(zip(self.options, done.option_scores, strict=True))

    def told(self, decode_text: DecodeText, drawn: Mapping[str, np.ndarray] = _NOTHING) -> Any:
        """Returns what was written; of options the best as it was given.

        Args:
            decode_text: ids -> text.
            drawn: pixels or spectrograms, by modality, in the place of the codes written.
        """
        scores = self.option_scores
        if not scores:
            return only({**_by_name(self.tokens, decode_text), **drawn})
        rest = {name: values for name, values in self.tokens.items() if name != "text"}
        return only({"text": max(scores, key=scores.__getitem__), **_by_name(rest, decode_text),
                     **drawn})

    def reference(self, decode_text: DecodeText, signals: Mapping[str, np.ndarray] = _NOTHING
                  ) -> Any:
        """The reference: text, or codes; None where there is none.

        Args:
            decode_text: ids -> text.
            signals: the pixels or spectrograms that are part of it, by modality.
        """
        if self.pretokenized is not None and not (signals and "text" in self.targets):
            return self.pretokenized
        found = {**_by_name(self.targets, decode_text), **signals}
        if self.pretokenized is not None:
            found["text"] = self.pretokenized
        return only(found) if found else None

    def prediction(self, task: str, number: int, mode: str, decode_text: DecodeText,
                   all_decodes: bool = False, extra: Mapping[str, Any] | None = None) -> Prediction:
        """Returns what is recorded of the example.

        Args:
            task: name of the task or file.
            number: of the record or line.
            mode: one of `MODES`.
            decode_text: ids -> text.
            all_decodes: add all that was sampled, or all beams, by rising score.
            extra: further JSON values.
        """
        one_of(mode, MODES, "mode of inference")
        more, reference = dict(extra or {}), self.reference(decode_text)
        if mode == SCORE:
            if len(self.target_scores) > 1:
                more["scores"] = dict(self.target_scores)
            return Prediction(task, number, self.inputs, self.input_slots, reference, None,
                              self.target_score, more)
        if self.option_scores:
            more["scores"] = self.option_scores
        if mode == PREDICT_WITH_AUX:
            more["aux"] = {"scores": only({name: done.scores[name]
                                           for name, done in self.written.items()})}
            tokens = {name: done.token_scores[name] for name, done in self.written.items()
                      if done.token_scores}
            if tokens:
                more["aux"]["token_scores"] = only(tokens)
        if all_decodes:
            more["decodes"] = only({name: [
                {"prediction": decoded({name: values}, decode_text), "score": score}
                for values, score in done.decodes[name]] for name, done in self.written.items()})
        return Prediction(task, number, self.inputs, self.input_slots, reference,
                          self.told(decode_text), self.score, more, tuple(self.written))


def write(generator: Generator, params: Any, requests: Iterable[Request], modality: str,
          answers: Mapping[Any, Answer], left_out: Callable[[Any, str], object], stream: int = 0,
          token_scores: bool = False, done: Callable[[], object] = lambda: None) -> None:
    """Writes a modality for each request, into the answer that its tag names.

    Args:
        generator: writes.
        params: of the model.
        requests: may be read from the records while this goes on.
        modality: what to write.
        answers: by the requests' tags.
        left_out: called with (tag, why) of each for which nothing can be written.
        stream: see `Generator.generate`.
        token_scores: see `Generator.generate`.
        done: called after each.
    """
    for found in generator.generate(params, requests, modality, stream, token_scores):
        if isinstance(found, Unwritten):
            left_out(found.tag, found.why)
        else:
            answers[found.tag].written[modality] = found
        done()


def score(generator: Generator, params: Any, requests: Iterable[Request],
          answers: Mapping[Any, Answer], done: Callable[[], object] = lambda: None) -> None:
    """Scores the targets of each request, into the answer that its tag names."""
    for found in generator.score(params, requests):
        answers[found.tag].target_scores = {name: value for name, value in found.scores.items()
                                            if len(found.token_scores[name])}
        done()


def ids(tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ids as vocabularies and codebooks number them: text without its end, codes from 0."""
    return {modality: (values[values != EOS_ID] if modality == "text" else values - CODE_OFFSET)
            for modality, values in tokens.items()}


def decoded(tokens: Mapping[str, np.ndarray], decode_text: DecodeText) -> Any:
    """Text, or the codes of a grid; of several modalities a mapping."""
    return only(_by_name(tokens, decode_text))


def _by_name(tokens: Mapping[str, np.ndarray], decode_text: DecodeText) -> dict[str, Any]:
    return {modality: decode_text(tokens[modality]) if modality == "text" else values
            for modality, values in ids(tokens).items()}


def only(by_modality: Mapping[str, Any]) -> Any:
    """The value of the one modality, or the mapping of several."""
    return next(iter(by_modality.values())) if len(by_modality) == 1 else dict(by_modality)
