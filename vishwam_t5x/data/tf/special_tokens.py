"""A SeqIO vocabulary that knows the extra tokens of a layout by their names in a prompt."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.tf.refusals import map_or_refuse
from vishwam_t5x.objectives.vocabulary import EOS_ID, PAD_ID, UNK_ID, VocabularyLayout

_NAME = re.compile(r"(<(?:extra_id|image_history|audio_history)_\d+>|<(?:image|audio)_input>)")


class SpecialTokens(seqio.Vocabulary):
    """A base vocabulary, and behind its pieces the extra ids of a `VocabularyLayout`.

    `<image_input>`, `<extra_id_200>` and the like are one id each wherever they stand in a text;
    what is between two of them is encoded by itself. One that the layout does not have raises a
    UserError: as letters it would mean nothing.

    Args:
        base: vocabulary of the text, without extra ids of its own; not looked at before it is used.
        num_sentinels, num_location_bins, num_history: as in `VocabularyLayout`.
    """

    def __init__(self, base: seqio.Vocabulary, num_sentinels: int = 200,
                 num_location_bins: int = 1000, num_history: int = 8) -> None:
        super().__init__(extra_ids=0)
        self.base = base
        self._sizes = (num_sentinels, num_location_bins, num_history)

    @functools.cached_property
    def layout(self) -> VocabularyLayout:
        """Which id is which."""
        return VocabularyLayout(self.base.vocab_size, *self._sizes)

    @property
    def bos_id(self) -> int:
        """0: decoding starts from padding."""
        return PAD_ID

    @property
    def eos_id(self) -> int:
        """1, asked of no model."""
        return EOS_ID

    @property
    def unk_id(self) -> int:
        """2, asked of no model."""
        return UNK_ID

    @property
    def _base_vocab_size(self) -> int:
        return self.layout.size

    def _encode(self, s: str) -> Sequence[int]:
        ids: list[int] = []
        for number, part in enumerate(_NAME.split(s)):
            if number % 2 == 0:
                ids += self.base.encode(part) if part.strip() else []
            elif part in self.layout.special_ids:
                ids.append(self.layout.special_ids[part])
            else:
                raise UserError("a text has a token that the vocabulary lacks", got=part,
                                fix="raise num_location_bins or num_history of the vocabulary")
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        pieces: list[int] = []
        for token in [*map(int, ids), None]:
            name = None if token is None else self.layout.name(token)
            if token is not None and name is None:
                pieces.append(token)
                continue
            if pieces:
                parts.append(self.base.decode(pieces))
                pieces = []
            if name is not None:
                parts.append(name)
        return " ".join(parts)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:
            # Bytes within tf.data, an array of one object outside.
            data: bytes = np.asarray(text, object).item()
            return np.asarray(self._encode(data.decode("utf-8", "replace")), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32)
        ids.set_shape((None,))
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        text = tf.numpy_function(lambda given: self._decode(given).encode(), [ids], tf.string)
        text.set_shape(())
        return text

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, SpecialTokens) and self.base == other.base
                and self._sizes == other._sizes)

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._sizes))

    def __str__(self) -> str:
        return f"SpecialTokens({self.base}, {', '.join(map(str, self._sizes))})"


def tokenize(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
             ) -> tf.data.Dataset:
    """Encodes texts, as `seqio.preprocessors.tokenize` does; what cannot be encoded is refused.

    A text of someone else's may hold what looks like a token, `<extra_id_5000>`: such an example is
    left out and counted, with its `meta_id`, where SeqIO's preprocessor would end the run.

    Args:
        dataset: examples with texts, scalar strings.
        output_features: of the Task, which SeqIO gives; those with a `SpecialTokens` vocabulary are
            encoded here, other texts by SeqIO.
    """
    def encode(vocabulary: SpecialTokens, text: bytes) -> tuple[np.ndarray]:
        ids = vocabulary.encode(bytes(text).decode("utf-8", "replace"))
        return (np.asarray(ids, np.int32),)

    others = dict(output_features)
    for name, feature in output_features.items():
        spec = dataset.element_spec.get(name)
        if (isinstance(feature.vocabulary, SpecialTokens) and spec is not None
                and spec.dtype == tf.string):
            dataset = map_or_refuse(dataset, functools.partial(encode, feature.vocabulary), [name],
                                    {name: tf.TensorSpec((None,), tf.int32)})
            del others[name]
    return seqio.preprocessors.tokenize(dataset, others, copy_pretokenized=False)
