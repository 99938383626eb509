"""Text metrics: exact match, right words, and a unigram model's loss to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from vishwam_t5x.core.errors import UserError


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {'exact_match': share of predictions equal to their target, in [0, 1]}.

    Raises:
        UserError: there are no examples, or not as many predictions as targets.
    """
    _check_pairs("exact match", targets, predictions)
    same = sum(target == prediction
               for target, prediction in zip(targets, predictions, strict=True))
    return {"exact_match": same / len(targets)}


def words_right(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {'words_right': share of the targets' words predicted at their place, in [0, 1]}.

    Words are what white space parts; a word that is missing or put in moves all that follow.

    Raises:
        UserError: there are no examples, not as many predictions as targets, or no word.
    """
    _check_pairs("words_right", targets, predictions)
    words = [target.split() for target in targets]
    if not any(words):
        raise UserError("words_right needs a target with a word")
    same = sum(one == other for target, prediction in zip(words, predictions, strict=True)
               for one, other in zip(target, prediction.split(), strict=False))
    return {"words_right": same / sum(map(len, words))}


def _check_pairs(metric: str, targets: Sequence[str], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions) or not len(targets):
        raise UserError(f"{metric} needs as many predictions as targets, and at least one",
                        got=f"{len(targets)} targets, {len(predictions)} predictions")


def unigram_loss(train_tokens: Iterable[np.ndarray] | np.ndarray,
                 test_tokens: Iterable[np.ndarray] | np.ndarray, vocab_size: int) -> float:
    """Cross-entropy, in nats per token, of test tokens under train frequencies, add-one smoothed.

    The model knows how often each token occurs and nothing of its neighbours: a language model
    that does not get clearly below this has learned no context.
    -mean log((count(token) + 1) / (number of train tokens + vocab_size)).

    Args:
        train_tokens: ids in [0, vocab_size), one array or many, any shapes.
        test_tokens: the same, at least one token.
        vocab_size: number of ids that may occur.

    Raises:
        UserError: an id lies outside [0, vocab_size), or there is no test token.
    """
    train = _counts(train_tokens, vocab_size, "train")
    test = _counts(test_tokens, vocab_size, "test")
    if not test.sum():
        raise UserError("the unigram loss needs at least one test token")
    log_probability = np.log((train + 1.0) / (train.sum() + vocab_size))
    return float(-(test * log_probability).sum() / test.sum())


def _counts(tokens: Iterable[np.ndarray] | np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for piece in [tokens] if isinstance(tokens, np.ndarray) else tokens:
        ids = np.asarray(piece).reshape(-1)
        if not ids.size:
            continue
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise UserError(f"the {name} tokens leave the vocabulary",
                            got=f"ids {ids.min()} to {ids.max()}, vocabulary of {vocab_size}",
                            fix="pass the size of the whole table, with its extra ids")
        counts += np.bincount(ids, minlength=vocab_size)
    return counts
