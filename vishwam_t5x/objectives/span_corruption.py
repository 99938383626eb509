"""Span corruption of token sequences, T5's algorithm, in vectorised NumPy.

`random_spans_noise_mask` of Raffel et al. 2020 (arXiv:1910.10683; repository
google-research/text-to-text-transfer-transformer): a fixed number of noise tokens is cut into a
fixed number of spans, so lengths are known before any random number is drawn.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, Float, Int

from vishwam_t5x.core.errors import UserError


def check_span_parameters(mean_span: float, density: float) -> None:
    """Raises `UserError` unless 1 <= mean_span and 0 < density < 1."""
    if not mean_span >= 1.0:
        raise UserError("the mean span length must be at least one token", got=mean_span,
                        fix="UL2 uses 3, 8 and 64")
    if not 0.0 < density < 1.0:
        raise UserError("the corrupted share of a text must lie strictly between 0 and 1",
                        got=density, fix="UL2 uses 0.15 and 0.5")


def num_noise_and_spans_many(lengths: Int[np.ndarray, "n"], density: float, mean_span: float
                             ) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Returns (noise tokens, noise spans) of each text, exact and without sampling.

    Noise tokens: round(length * density) in float32, half to even, clipped to [1, length - 1].
    Spans: round(noise / mean_span), at least 1, and never more than there are kept tokens to put
    between them (T5 leaves that case undefined). A text of fewer than two tokens has neither: T5
    never hides a first token, so nothing could be hidden.

    Args:
        lengths: tokens of each text.
        density: share of the tokens to hide, in (0, 1).
        mean_span: mean length of a hidden span, in tokens.
    """
    lengths = np.asarray(lengths, np.int64)
    # float32 and half to even: tf.round of a float32 product decides T5's counts.
    noise = np.rint(lengths.astype(np.float32) * np.float32(density)).astype(np.int64)
    noise = np.minimum(np.maximum(noise, 1), lengths - 1)
    spans = np.rint(noise.astype(np.float32) / np.float32(mean_span)).astype(np.int64)
    spans = np.minimum(np.maximum(spans, 1), np.minimum(noise, lengths - noise))
    corruptible = lengths >= 2
    return noise * corruptible, spans * corruptible


@functools.lru_cache(maxsize=1 << 16)
def num_noise_and_spans(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """`num_noise_and_spans_many` of one text, remembered."""
    noise, spans = num_noise_and_spans_many(np.asarray([length]), density, mean_span)
    return int(noise[0]), int(spans[0])


def span_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Returns (input tokens, target tokens) after corruption, without EOS and prefix token."""
    noise, spans = num_noise_and_spans(length, density, mean_span)
    return length - noise + spans, noise + spans


def _cuts(total: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, "p"]:
    """Ends of `parts` consecutive non-empty pieces of `total` items; all cuts equally likely."""
    assert 1 <= parts <= total, (parts, total)
    # A composition is a choice of parts - 1 of the total - 1 gaps between items.
    ends = np.empty((parts,), np.int64)
    ends[-1] = total
    if parts > 1:
        ends[:-1] = rng.permutation(total - 1)[:parts - 1]
        ends[:-1] += 1
        ends[:-1].sort()
    return ends


def random_composition(total: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, "p"]:
    """Returns `parts` positive lengths that sum to `total`, uniform over all such lists.

    Args:
        total: items to divide, at least `parts`.
        parts: number of lengths, at least 1.
        rng: consumed once; not at all for one part.
    """
    return np.diff(_cuts(total, parts, rng), prepend=0)


def noise_mask(length: int, density: float, mean_span: float,
               rng: np.random.Generator) -> Bool[np.ndarray, "length"]:
    """Draws which tokens are hidden: kept and hidden spans alternate, beginning with a kept one.

    Args:
        length: tokens of the text; below 2 nothing is hidden.
        density: share of the tokens to hide, in (0, 1).
        mean_span: mean length of a hidden span, in tokens, at least 1.
        rng: two independent compositions are drawn from it.

    Returns:
        True where a token is hidden. The last token always is (length >= 2), the first never.

    Raises:
        UserError: density or mean_span is out of range.
    """
    check_span_parameters(mean_span, density)
    noise, spans = num_noise_and_spans(length, density, mean_span)
    if spans == 0:
        return np.zeros((length,), np.bool_)
    noise_ends = _cuts(noise, spans, rng)
    kept_ends = _cuts(length - noise, spans, rng)
    # Span i begins after i + 1 kept pieces and i hidden ones.
    steps = np.zeros((length + 1,), np.int8)
    steps[kept_ends + noise_ends] = -1
    steps[kept_ends[1:] + noise_ends[:-1]] = 1
    steps[kept_ends[0]] = 1
    return np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_)


def corrupt(tokens: Int[np.ndarray, "n"], mask: Bool[np.ndarray, "n"],
            sentinels: Int[np.ndarray, "s"]
            ) -> tuple[Int[np.ndarray, "i"], Int[np.ndarray, "t"]]:
    """Replaces each hidden span by its own sentinel; the target is each sentinel and its span.

    Args:
        tokens: the text, without EOS.
        mask: True where a token is hidden; any mask, also one that begins with noise.
        sentinels: ids by span number; span k takes `sentinels[k]`.

    Returns:
        (inputs, targets), dtype of `tokens`, both without EOS.

    Raises:
        UserError: more spans than sentinels.
    """
    assert tokens.shape == mask.shape, (tokens.shape, mask.shape)
    starts = mask.copy()
    starts[1:] &= ~mask[:-1]
    spans = int(starts.sum())
    if spans > len(sentinels):
        raise too_many_spans(spans, len(sentinels), len(tokens))
    marks = np.asarray(sentinels[:spans], tokens.dtype)
    keep = ~mask
    inputs = tokens.copy()
    inputs[starts] = marks
    inputs = inputs[keep | starts]
    # In the target a span is preceded by its sentinel, so each start counts twice.
    targets = np.repeat(tokens, np.where(starts, 2, mask))
    targets[np.flatnonzero(starts[mask]) + np.arange(spans)] = marks
    return inputs, targets


def too_many_spans(spans: int, sentinels: int, length: int) -> UserError:
    """Returns the error for a text with more hidden spans than there are sentinel ids."""
    return UserError(
        "a text has more hidden spans than the vocabulary has sentinels",
        got=f"{spans} spans in a text of {length} tokens, {sentinels} sentinels",
        fix="cut texts shorter, raise the mean span length, lower the density, or raise "
            "VocabularyLayout.num_sentinels (this changes the embedding table)")


def suffix_length(length: int, share: float) -> int:
    """Returns how many tokens at the end of a text [S] generates: round(length * share).

    At least one, and with two tokens or more at least one is left as the prefix; 0 of an empty
    text.
    """
    return min(max(round(length * share), 1), max(length - 1, 1), length)


def suffix_length_many(lengths: Int[np.ndarray, "n"],
                       shares: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """`suffix_length` of each text."""
    suffix = np.maximum(np.rint(lengths * shares).astype(np.int64), 1)
    return np.minimum(np.minimum(suffix, np.maximum(lengths - 1, 1)), lengths)
