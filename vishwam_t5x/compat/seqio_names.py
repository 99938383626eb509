"""SeqIO's names in T5X's gin files, without SeqIO: what they say is all that training needs.

The ids of a task come from its own vocabulary, in the process that fills its cache; the vocabulary
of a model is held against them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vishwam_t5x.compat import refused
from vishwam_t5x.core.errors import UserError

STANDS_FOR = "seqio"
_BYTES = 256
_RESERVED = 3  # padding, end, unknown


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What all vocabularies share.

    Attributes:
        extra_ids: sentinels beyond the pieces; None: as many as the file says.
    """

    extra_ids: int | None = None

    @property
    def least_size(self) -> int:
        """Ids that there are at least."""
        return _RESERVED + (self.extra_ids or 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceVocabulary(Vocabulary):
    """Pieces of a SentencePiece model.

    Attributes:
        sentencepiece_model_file: path.
        normalizer_spec_overrides_serialized: of the task's own vocabulary.
        reverse_extra_ids: whether the first sentinel has the largest id.
    """

    sentencepiece_model_file: str
    normalizer_spec_overrides_serialized: bytes | None = None
    reverse_extra_ids: bool = True


@dataclasses.dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
    """Bytes of UTF-8."""

    extra_ids: int | None = 0

    @property
    def least_size(self) -> int:
        """Ids that there are."""
        return _BYTES + super().least_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassThroughVocabulary(Vocabulary):
    """Ids that are none of text.

    Attributes:
        size: how many.
        eos_id: the end: 1, or None.
    """

    size: int
    eos_id: int | None = None

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.PassThroughVocabulary", vars(self))

    @property
    def least_size(self) -> int:
        """Ids that there are."""
        return self.size


@dataclasses.dataclass(frozen=True)
class PyLoggingLogger:
    """Metrics in the log: there they always are."""


@dataclasses.dataclass(frozen=True)
class TensorBoardLogger:
    """Metrics for TensorBoard: a run writes them there."""


@dataclasses.dataclass(frozen=True)
class JSONLogger:
    """Predictions in JSON lines: there they always are.

    Attributes:
        write_n_results: all.
    """

    write_n_results: int | None = None

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.JSONLogger", vars(self))


_LOGGERS = (PyLoggingLogger, TensorBoardLogger, JSONLogger)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """How predictions are judged.

    Attributes:
        num_examples: at most so many of each task; None: all.
        use_memory_cache: examples are read from the cache, some kept in memory.
        logger_cls: who hears of the metrics: SeqIO's own loggers, which they all do anyway.
    """

    num_examples: int | None = None
    use_memory_cache: bool = True
    logger_cls: Sequence[type] = ()

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.Evaluator", vars(self))
        for logger in self.logger_cls:
            if not (isinstance(logger, type) and issubclass(logger, _LOGGERS)):
                raise UserError(
                    f"{STANDS_FOR}.Evaluator.logger_cls is not honoured: metrics and predictions "
                    "are written in one way", got=getattr(logger, "__name__", repr(logger)),
                    fix="leave it out; read metrics.jsonl and the predictions beside it")
            logger()  # so that what is bound to it is looked at


def check_fits(vocabulary: Any, rows: int) -> str | None:
    """Returns what is wrong with a model's table of `rows` for a vocabulary, if that is known."""
    least = getattr(vocabulary, "least_size", 0)
    if least > rows:
        return f"{type(vocabulary).__name__} has {least} ids, vocab_size is {rows}"
    return None
