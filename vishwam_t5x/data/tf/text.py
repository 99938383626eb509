"""Text preprocessing in tf.data: vocabularies fitted on first use, and cutting without loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.tf.refusals import map_or_refuse


class LazyVocabulary(seqio.Vocabulary):
    """A SentencePiece vocabulary whose model is looked for (or fitted) when it is first needed.

    Registering a Task must not read or fit anything: many Tasks are registered and few are used.
    The model's ids must be 0 padding, 1 end, 2 unknown, as SeqIO assumes.

    Args:
        find_model: called once, returns the path of the SentencePiece model. A module-level
            function, so that the vocabulary can be pickled.
    """

    def __init__(self, find_model: Callable[[], str]) -> None:
        super().__init__(extra_ids=0)
        self._find_model = find_model
        self._delegate: seqio.SentencePieceVocabulary | None = None

    def _loaded(self) -> seqio.SentencePieceVocabulary:
        if self._delegate is None:
            path = self._find_model()
            delegate = seqio.SentencePieceVocabulary(path)
            ids = (delegate.tokenizer.pad_id(), delegate.eos_id, delegate.unk_id)
            if ids != (0, 1, 2):
                raise UserError("a vocabulary must have ids 0 padding, 1 end, 2 unknown",
                                got=f"{ids} in {path}",
                                fix="fit it with pad_id=0, eos_id=1, unk_id=2, bos_id=-1")
            self._delegate = delegate
        return self._delegate

    @property
    def model_file(self) -> str:
        """Path of the SentencePiece model (fits or finds it)."""
        return self._loaded().sentencepiece_model_file

    @property
    def bos_id(self) -> int:
        """0: decoding starts from padding, as in T5."""
        return 0

    @property
    def eos_id(self) -> int:
        """1; asked of no model, so that a Task can be validated before its vocabulary exists."""
        return 1

    @property
    def unk_id(self) -> int:
        """2; see `eos_id`."""
        return 2

    @property
    def _base_vocab_size(self) -> int:
        return self._loaded().vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self._loaded().encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._loaded().decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return self._loaded().encode_tf(s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return self._loaded().decode_tf(ids)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_delegate": None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyVocabulary) and self._find_model == other._find_model

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._find_model))

    def __str__(self) -> str:
        return f"LazyVocabulary({self._find_model.__module__}.{self._find_model.__qualname__})"


def split_evenly(dataset: tf.data.Dataset, feature: str, max_length: int) -> tf.data.Dataset:
    """Cuts each `feature` (int32 [n]) into ceil(n / max_length) pieces of nearly equal length.

    Lengths differ by at most one, so no piece is a useless stump, and the pieces in order are the
    whole: nothing is dropped. The other features of the example are repeated for every piece;
    an example of length 0 gives no piece.

    Args:
        dataset: examples with `feature`, int32 [n].
        feature: name of the token feature to cut.
        max_length: longest piece, in tokens.

    Raises:
        UserError: `max_length` is not positive.
    """
    if max_length < 1:
        raise UserError("max_length must be a positive number of tokens", got=max_length)

    def pieces(example: dict[str, tf.Tensor]) -> tf.data.Dataset:
        tokens = example[feature]
        length = tf.size(tokens)
        count = -(-length // max_length)
        index = tf.range(count)
        starts = index * length // tf.maximum(count, 1)
        ends = (index + 1) * length // tf.maximum(count, 1)
        cut = tf.data.Dataset.from_tensor_slices((starts, ends))
        return cut.map(lambda start, end: {**example, feature: tokens[start:end]})

    return dataset.flat_map(pieces)


def refuse_longer(dataset: tf.data.Dataset, feature: str, most: int) -> tf.data.Dataset:
    """Refuses examples whose `feature` (int32 [n]) has more than `most` tokens: they are named,
    counted and left out. Otherwise a text that fits in no row ends a run before it begins.

    Args:
        dataset: examples with `feature`, already tokenized.
        feature: name of the token feature.
        most: tokens it may have; an objective adds its end and a prefix token for each target.

    Raises:
        UserError: `most` is not positive.
    """
    if most < 1:
        raise UserError("a text may have a positive number of tokens", got=most)

    def check(tokens: np.ndarray) -> tuple[np.ndarray]:
        if len(tokens) > most:
            raise UserError(f"{feature} is too long", got=f"{len(tokens)} tokens, at most {most}")
        return (tokens,)

    return map_or_refuse(dataset, check, [feature], {feature: tf.TensorSpec((None,), tf.int32)})


def rename(dataset: tf.data.Dataset, names: dict[str, str]) -> tf.data.Dataset:
    """Renames features: {old name: new name}; the others stay.

    Raises:
        UserError: the examples lack one of the old names.
    """
    missing = sorted(set(names) - set(dataset.element_spec))
    if missing:
        raise UserError("the examples lack features that are to be renamed", got=missing,
                        fix="they have: " + ", ".join(sorted(dataset.element_spec)))
    return dataset.map(lambda example: {names.get(key, key): value
                                        for key, value in example.items()})
