"""Choosing among given answers: the most probable option is the prediction.

The inputs are encoded once; the options of an example lie side by side in one row of the decoder,
where none sees another, as many at a time as `OptionScoring.max_tokens` lets in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.evaluation.shapes import bucket
from vishwam_t5x.objectives.vocabulary import EOS_ID

FEATURE = "meta_options"
"""Feature of a task whose examples have options: a JSON list of texts, as a string."""
Options = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class OptionScoring:
    """How the best of some options is found: by their log-probabilities in nats, ends included.

    Attributes:
        score: 'sum' over an option's tokens, or their 'mean', which does not favour short ones.
        max_tokens: tokens of the options of an example that are scored at once, at most; what the
            decoder holds grows with it. A longer option is scored alone.
        tasks: examples of tasks with the feature `meta_options` are answered by the best of them;
            False: freely.
    """

    score: Literal["sum", "mean"] = "sum"
    max_tokens: int = 128
    tasks: bool = True

    def __post_init__(self) -> None:
        one_of(self.score, ("sum", "mean"), "OptionScoring.score")
        if self.max_tokens < 1:
            raise UserError("OptionScoring.max_tokens must be at least 1", got=self.max_tokens)

    def of(self, token_scores: np.ndarray) -> float:
        """Returns the score of an option, given the log-probabilities of its tokens [k]."""
        return float(np.mean(token_scores) if self.score == "mean" else np.sum(token_scores))


def checked(options: Any) -> tuple[str, ...]:
    """Returns options that can be chosen among.

    Raises:
        UserError: they are none.
    """
    if not isinstance(options, list | tuple) or not all(isinstance(one, str) for one in options):
        raise UserError("the options are no list of texts", got=repr(options))
    if len(options) < 2 or len(set(options)) < len(options):
        raise UserError("there must be two options or more, all different", got=repr(options))
    return tuple(options)


def of_example(clean: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the options of a task's example; () where it has none.

    Raises:
        UserError: its feature `meta_options` is no JSON list of texts.
    """
    if FEATURE not in clean:
        return ()
    try:
        found = json.loads(bytes(clean[FEATURE]).decode("utf-8"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{FEATURE} is no JSON", got=error) from error
    return checked(found)


@dataclasses.dataclass(frozen=True)
class OptionReader:
    """Turns options into ids.

    Attributes:
        encode: text -> ids, without an end.
        ends: whether 'targets' get one.
    """

    encode: Callable[[str], np.ndarray]
    ends: Sequence[str] = ("targets",)

    def ids(self, options: Sequence[str]) -> Options:
        """Returns the ids of each option, with its end."""
        end = [EOS_ID] if "targets" in self.ends else []
        return tuple(np.asarray([*self.encode(option), *end], np.int32) for option in options)


def misfit(options: Options, longest: int) -> str | None:
    """Returns why options cannot be scored, in words; None if they can."""
    if any(not len(option) for option in options):
        return "an option has no tokens"
    size = max(map(len, options), default=0)
    return None if size <= longest else (
        f"an option is too long ({size} tokens, with the end, at most {longest})")


def rounds(rows: Sequence[Options], max_tokens: int) -> Iterator[list[range]]:
    """Yields which options of each row are scored at once, until all have been.

    Args:
        rows: the options of each row.
        max_tokens: at once in a row; one option may always be.
    """
    begins = [0] * len(rows)
    while any(begin < len(options) for begin, options in zip(begins, rows, strict=True)):
        now = []
        for row, options in enumerate(rows):
            end, size = begins[row], 0
            while end < len(options) and (
                    end == begins[row] or size + len(options[end]) <= max_tokens):
                size += len(options[end])
                end += 1
            now.append(range(begins[row], end))
            begins[row] = end
        yield now


def laid_out(rows: Sequence[Options], now: Sequence[range], num_rows: int, apart: bool = True
             ) -> dict[str, np.ndarray]:
    """Returns the targets [num_rows, M] of one round: options side by side.

    Args:
        rows: the options of each row.
        now: which of them, see `rounds`.
        num_rows: of the batch; those behind `rows` are empty.
        apart: tell them apart by 'subsegment_ids'; False: no row has several.
    """
    width = bucket(max(sum(len(options[one]) for one in which)
                       for options, which in zip(rows, now, strict=True)))
    assert apart or all(len(which) <= 1 for which in now), now
    names = ("targets", "inputs", "mask", "pos_ids", "subsegment_ids")[:4 + apart]
    arrays = {f"targets/text/{name}": np.zeros((num_rows, width), np.int32) for name in names}
    for row, (options, which) in enumerate(zip(rows, now, strict=True)):
        at = 0
        for one in which:
            ids, slots = options[one], slice(at, at + len(options[one]))
            values = (ids, np.concatenate([[0], ids[:-1]]), 1, np.arange(len(ids)),
                      one - which.start + 1)
            for name, value in zip(names, values, strict=False):
                arrays[f"targets/text/{name}"][row, slots] = value
            at += len(ids)
    return arrays


def token_scores(found: np.ndarray, rows: Sequence[Options], now: Sequence[range]
                 ) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (row, log-probabilities of an option's tokens) of one round, in the rows' order.

    Args:
        found: [num_rows, M], of the slots of `laid_out`.
        rows: as there.
        now: as there.
    """
    for row, (options, which) in enumerate(zip(rows, now, strict=True)):
        at = 0
        for one in which:
            yield row, found[row, at:at + len(options[one])]
            at += len(options[one])
