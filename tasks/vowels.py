"""Put the vowels back: a small real task to fine-tune a text-to-text model on.

`restore_vowels`: "Th xprssn s vltd" -> "The expression is evaluated", on sentences of CPython's
reference text; no sentence is in two splits. Scripts written without vowels pose it in earnest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import seqio
import tensorflow as tf

from vishwam_t5x.data.tf.features import text_feature
from vishwam_t5x.evaluation.metrics.text import exact_match, words_right
from vishwam_t5x_tasks import quickstart_fitted as fitted
from vishwam_t5x_tasks import quickstart_sources as sources
from vishwam_t5x_tasks.quickstart import VOCABULARY

MAX_WORDS = 12
"""Sentences are cut into pieces of at most this many words."""
_VOWELS = re.compile("[aeiou]", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?:;]) ")


def without_vowels(text: str) -> str:
    """Returns the text without the letters a, e, i, o and u, small or capital.

    Words of which no letter would be left stay: 'a', 'I'.
    """
    words = [(word, _VOWELS.sub("", word)) for word in text.split(" ")]
    return " ".join(rest if any(map(str.isalpha, rest)) else word for word, rest in words)


def pieces(passages: Sequence[str]) -> Iterator[str]:
    """Yields sentences of plain words, cut evenly where they are longer than MAX_WORDS.

    Code is not for guessing: a piece with any of it, or of less than four words, is left out.
    """
    for passage in passages:
        for sentence in _SENTENCE_END.split(passage):
            words = sentence.split()
            count = -(-len(words) // MAX_WORDS)
            for part in range(count):
                piece = words[part * len(words) // count:(part + 1) * len(words) // count]
                if len(piece) >= 4 and all(map(_is_word, piece)):
                    yield " ".join(piece)


def _is_word(word: str) -> bool:
    return bool(re.fullmatch(r"[(\"]?[A-Za-z'-]+[)\".,:;!?]*", word))


@functools.lru_cache
def _seen_before(split: str) -> frozenset[str]:
    earlier = sources.SPLITS[:sources.SPLITS.index(split)]
    return frozenset(piece for name in earlier for piece in pieces(sources.passages(name)))


def _examples(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # one in-memory source: there are no files to shuffle
    found = dict.fromkeys(pieces(sources.passages(split)))
    targets = [piece for piece in found if piece not in _seen_before(split)]
    return tf.data.Dataset.from_tensor_slices({
        "text_inputs": [without_vowels(piece) for piece in targets], "text_targets": targets})


seqio.TaskRegistry.add(
    "restore_vowels",
    source=seqio.FunctionDataSource(_examples, splits=sources.SPLITS),
    preprocessors=[functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)],
    output_features={"text_inputs": text_feature(VOCABULARY),
                     "text_targets": text_feature(VOCABULARY)},
    metric_fns=[exact_match, words_right])


def task_metadata(task_name: str) -> dict[str, Any]:
    """Returns what a cache's manifest records of the Task: its vocabulary and its metrics."""
    task = seqio.TaskRegistry.get(task_name)
    return {"vocabulary": fitted.describe(fitted.vocabulary_path()),
            "metric_fns": [f"{fn.__module__}:{fn.__qualname__}" for fn in task.metric_fns],
            "postprocess_fn": None}
