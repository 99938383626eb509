"""Text-to-text as SeqIO's tasks give it: `inputs` and `targets` go to the model as they are.

Unlike `MixtureOfDenoisers` this adds no prefix token and no end: a task that wants an end appends
it (`seqio.preprocessors.append_eos`). What is longer than its side of a row is cut, as T5X does.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np

from vishwam_t5x.core.batch import ModalityLengths
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.features import feature_roles
from vishwam_t5x.objectives.objective import ManyLengths
from vishwam_t5x.objectives.vocabulary import EOS_ID

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TextToText:
    """Predicts the text feature of the targets from that of the inputs.

    A text that is cut keeps its end, where it has one, as T5's `append_eos_after_trim` gives it.

    Attributes:
        max_inputs: tokens of an input at most.
        max_targets: tokens of a target at most.
        ignored_features: features of the examples to leave out.
        vocabulary_files: SentencePiece models of the model's vocabularies, held against those that
            the caches name; see `data.fit.check_vocabularies`.
    """

    max_inputs: int
    max_targets: int
    ignored_features: tuple[str, ...] = ()
    vocabulary_files: tuple[str, ...] = ()

    input_modalities = ("text",)
    target_modalities = ("text",)
    vocabulary = None
    adds_ends = False

    def __post_init__(self) -> None:
        for name in ("max_inputs", "max_targets"):
            if getattr(self, name) < 1:
                raise UserError(f"TextToText.{name} must be at least 1 token",
                                got=getattr(self, name), fix="see TASK_FEATURE_LENGTHS")

    def _features(self, names: tuple[str, ...]) -> tuple[str | None, str]:
        roles = feature_roles(names, self.input_modalities, self.target_modalities,
                              self.ignored_features)
        if not roles.supervised:
            raise UserError("an example does not say what to predict from what",
                            got=", ".join(names), fix="features 'inputs' and 'targets'")
        return roles.inputs.get("text"), roles.targets["text"]

    def lengths(self, clean_lengths: Mapping[str, int], *, seed: int, example: int
                ) -> ModalityLengths:
        """Returns the slots each side will take."""
        del seed, example
        given, wanted = self._features(tuple(clean_lengths))
        length = min(clean_lengths[given], self.max_inputs) if given else 0
        return ModalityLengths({"text": length},
                               {"text": min(clean_lengths[wanted], self.max_targets)})

    def lengths_many(self, clean_lengths: Mapping[str, np.ndarray], examples: np.ndarray, *,
                     seed: int) -> ManyLengths:
        """`lengths` of many examples that have the same features."""
        del seed
        given, wanted = self._features(tuple(clean_lengths))
        length = (np.minimum(clean_lengths[given], self.max_inputs) if given
                  else np.zeros((len(examples),)))
        return ManyLengths(
            {"text": np.asarray(length, np.int64)},
            {"text": np.asarray(np.minimum(clean_lengths[wanted], self.max_targets), np.int64)})

    def possible_lengths(self, clean_lengths: Mapping[str, int]) -> list[ModalityLengths]:
        """Returns what `lengths` may be; asked of the longest examples, which may have to be cut.
        """
        given, wanted = self._features(tuple(clean_lengths))
        for name, most in ((given, self.max_inputs), (wanted, self.max_targets)):
            if name and clean_lengths[name] > most:
                _logger.warning("'%s' has up to %d tokens and is cut to %d, as T5X cuts it", name,
                                clean_lengths[name], most)
        return [self.lengths(clean_lengths, seed=0, example=0)]

    def apply(self, clean: Mapping[str, np.ndarray], *, seed: int, example: int
              ) -> dict[str, np.ndarray]:
        """Returns the model example: 'inputs/text/tokens' and 'targets/text/targets'."""
        del seed, example
        given, wanted = self._features(tuple(clean))
        tokens = clean[given] if given else np.zeros((0,), np.int32)
        return {"inputs/text/tokens": _cut(tokens, self.max_inputs),
                "targets/text/targets": _cut(clean[wanted], self.max_targets)}

    def without_text(self, tokens: np.ndarray, modality: str) -> np.ndarray:
        """Returns what is left of an input's ids [n] without its text: the end, if it has one."""
        del modality
        return tokens[tokens == EOS_ID][-1:]


def _cut(tokens: np.ndarray, most: int) -> np.ndarray:
    tokens = np.asarray(tokens, np.int32)
    if len(tokens) <= most:
        return tokens
    if tokens[-1] == EOS_ID:
        return np.concatenate([tokens[:most - 1], tokens[-1:]])
    return tokens[:most]
