"""What is asked of a `Generator`, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vishwam_t5x.core.batch import modality_order


@dataclasses.dataclass(frozen=True)
class Request:
    """One example to write something for.

    Attributes:
        inputs: its part of a batch: 'inputs/text/tokens' [n], 'inputs/image/input' [n, p], ….
        targets: the same of the targets, 'targets/text/targets' [m]; {} where there are none. Used
            for scoring, and as prompts where `DecodingConfig.prompt_with_targets` says so.
        tag: handed back with the result, untouched.
        options: texts to choose among, each int32 [k] with its end; (): none, write freely.
        bare: int32 [b], what the text of the inputs is without its text, for guidance; None: not
            wanted.
    """

    inputs: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tag: Any = None
    options: tuple[np.ndarray, ...] = ()
    bare: np.ndarray | None = None

    @classmethod
    def from_example(cls, example: Mapping[str, np.ndarray], tag: Any = None) -> Request:
        """Splits what an objective made of a clean example."""
        return cls({key: value for key, value in example.items() if key.startswith("inputs/")},
                   {key: value for key, value in example.items() if key.startswith("targets/")},
                   tag)

    def without_text(self) -> Request:
        """Returns the request with its bare text instead of its own; other inputs stay."""
        inputs = {name: value for name, value in self.inputs.items()
                  if not name.startswith("inputs/text/")}
        return dataclasses.replace(self, inputs={**inputs, "inputs/text/tokens": self.bare})

    def slots(self) -> dict[str, int]:
        """Returns the tokens, patches or frames of each input modality, in row order; those without
        any are left out."""
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
            penalty. Guided or constrained, of the distribution that it was taken from.
        whole: {modality: int32 [n]}: as `tokens`, with the end that a text has if it was not cut.
        decodes: {modality: [(tokens, score)]} of all `num_decodes`, by rising score: the last is
            what `tokens` and `scores` give.
        token_scores: {modality: float32 [n]}, teacher-forced log-probability of each of `whole`;
            {} unless asked for.
        option_scores: of each of the request's options, in their order, see `OptionScoring`; then
            the best of them is what was written.
    """

    tag: Any
    tokens: dict[str, np.ndarray]
    scores: dict[str, float]
    whole: dict[str, np.ndarray]
    decodes: dict[str, list[tuple[np.ndarray, float]]]
    token_scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    option_scores: tuple[float, ...] = ()

    @property
    def option(self) -> int | None:
        """The number of the best option; None where something was written freely."""
        return int(np.argmax(self.option_scores)) if self.option_scores else None


class Unwritten(NamedTuple):
    """A request for which nothing can be written.

    Attributes:
        tag: the request's.
        why: in words.
    """

    tag: Any
    why: str


class Scored(NamedTuple):
    """Log-probabilities of a request's targets, teacher-forced, in nats.

    Attributes:
        tag: the request's.
        scores: {modality: sum over its targets}.
        token_scores: {modality: float32 [n]}, of each target token.
    """

    tag: Any
    scores: dict[str, float]
    token_scores: dict[str, np.ndarray]
