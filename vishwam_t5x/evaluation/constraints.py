"""What may be written at all: some tokens, some answers, or what a function of one's own allows.

`DecodingConfig.allowed` is one of the classes here, or a function (tokens so far [R, T] int32,
their number) -> bool [R, V] in JAX: which tokens may come next. Columns behind those so far are 0.
Tokens are ids of the modality's table: of a grid, code + 2; of a text, 1 ends it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models.decoding import EOS_ID, AllowedFn
from vishwam_t5x.objectives.vocabulary import UNK_ID, VocabularyLayout

Encode = Callable[[str], np.ndarray]
"""Text -> ids, without an end."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What a constraint must know of the modality that it is for.

    Attributes:
        modality: its name.
        num_tokens: rows of its table.
        max_length: most tokens, the end of a text included.
        has_end: a text; False: a grid, which has all its tokens.
        encode: of a text; None: the generator has no vocabulary.
    """

    modality: str
    num_tokens: int
    max_length: int
    has_end: bool
    encode: Encode | None = None


class Constraint(Protocol):
    """Makes a mask for a modality."""

    needs_text: bool

    def mask(self, written: Written) -> AllowedFn:
        """Returns which tokens may come next; refuses what cannot be written."""
        ...


def is_constraint(value: Any) -> bool:
    """Whether something can be `DecodingConfig.allowed`; a class is none: it lacks its values."""
    return not isinstance(value, type) and (
        callable(getattr(value, "mask", None)) or callable(value))


def needs_text(value: Any) -> bool:
    """Whether a constraint can be told only with a vocabulary."""
    return bool(getattr(value, "needs_text", False))


def mask_of(value: Any, written: Written) -> AllowedFn:
    """Returns the mask of a constraint, or of a function of one's own.

    Raises:
        UserError: nothing that it allows can be written.
    """
    if callable(getattr(value, "mask", None)):
        if needs_text(value) and written.encode is None:
            raise UserError("the allowed answers are text, and there is no vocabulary",
                            fix="Generator(..., encode=…), or AllowedTokens")
        return value.mask(written)

    def checked(tokens: jax.Array, position: jax.Array) -> jax.Array:
        mask, shape = jnp.asarray(value(tokens, position)), (len(tokens), written.num_tokens)
        if mask.dtype != jnp.bool_ or mask.shape not in (shape, shape[1:]):
            raise UserError(f"what is allowed of {written.modality} must be told as a bool for "
                            "each token", got=f"{mask.dtype}{list(mask.shape)}",
                            fix=f"a function of (tokens, position) to bool{list(shape)}")
        return jnp.broadcast_to(mask, shape)

    return checked


@dataclasses.dataclass(frozen=True)
class AllowedTokens:
    """These tokens and no others.

    Attributes:
        tokens: ids of the table.
        least: tokens of a text before its end, at least.
        most: at most; None: as many as have room.
    """

    tokens: Sequence[int]
    least: int = 0
    most: int | None = None

    needs_text = False

    def mask(self, written: Written) -> AllowedFn:
        """See `Constraint`.

        Raises:
            UserError: a token that is not in the table, or a number of them without room.
        """
        first = 2  # before it are padding and the end, or what is no code
        for token in self.tokens:
            if not first <= token < written.num_tokens:
                raise UserError(f"an allowed token is not in the table of {written.modality}",
                                got=token, fix=f"{first} to {written.num_tokens - 1}")
        if not len(self.tokens):
            raise UserError("AllowedTokens allows no token", fix="name some, or leave it out")
        if not written.has_end and (self.least or self.most is not None):
            raise UserError(f"modality '{written.modality}' is always written whole",
                            got=f"least {self.least}, most {self.most}", fix="leave them out")
        if written.has_end:
            self._check_room(written)
        inside = np.zeros((written.num_tokens,), bool)
        inside[np.asarray(self.tokens)] = True
        end = np.arange(written.num_tokens) == EOS_ID
        least, most = self.least, written.max_length if self.most is None else self.most

        def allowed(tokens: jax.Array, position: jax.Array) -> jax.Array:
            row = jnp.asarray(inside) & (position < most)
            if written.has_end:
                row = row | (jnp.asarray(end) & (position >= least))
            return jnp.broadcast_to(row, (tokens.shape[0], written.num_tokens))

        return allowed

    def _check_room(self, written: Written) -> None:
        if self.least < 0 or (self.most is not None and not max(self.least, 1) <= self.most):
            raise UserError("AllowedTokens allows no number of tokens",
                            got=f"least {self.least}, most {self.most}",
                            fix="0 <= least <= most, and 1 <= most")
        number = self.least if self.most is None else self.most
        if number + 1 > written.max_length:
            raise UserError(f"{number} tokens and an end have no room in what is written",
                            got=f"at most {written.max_length} tokens",
                            fix="raise DecodingConfig.max_length")


def locations(vocabulary: VocabularyLayout, number: int = 4) -> AllowedTokens:
    """Returns the constraint of a box or a point: so many location bins, then the end.

    Args:
        vocabulary: of the objective: says which ids the bins have.
        number: 4 for a box (y1 x1 y2 x2), 2 for a point.

    Raises:
        UserError: the vocabulary has no bins.
    """
    if not vocabulary.num_location_bins:
        raise UserError("the vocabulary has no location bins", got="num_location_bins = 0",
                        fix="VocabularyLayout.num_location_bins = 1000")
    return AllowedTokens(range(vocabulary.location_start, vocabulary.sentinel_start), number,
                         number)


@dataclasses.dataclass(frozen=True)
class AllowedAnswers:
    """One of these texts, letter by letter: what is written is a way down the tree of their tokens.

    The tree is held as a table of the answers, along which a sequence is followed for as long as
    it agrees: a step takes time as answers times tokens, and no state beside what is written.

    Attributes:
        answers: the texts.
    """

    answers: Sequence[str]

    needs_text = True

    def mask(self, written: Written) -> AllowedFn:
        """See `Constraint`.

        Raises:
            UserError: no answers, or one that cannot be written.
        """
        table = self._table(written)
        number, length = table.shape

        def allowed(tokens: jax.Array, position: jax.Array) -> jax.Array:
            answers, width = jnp.asarray(table), min(length, tokens.shape[1])
            agrees = (tokens[:, None, :width] == answers[None, :, :width]) | (
                jnp.arange(width) >= position)
            alive = jnp.all(agrees, axis=-1) & (position < length)
            following = jax.lax.dynamic_index_in_dim(
                answers, jnp.minimum(position, length - 1), axis=1, keepdims=False)
            rows = jnp.arange(tokens.shape[0])[:, None]
            mask = jnp.zeros((tokens.shape[0], written.num_tokens), jnp.bool_)
            # What comes after an end is padding (0), which is no continuation.
            return mask.at[rows, following[None]].max(alive & (following > 0)[None])

        return allowed

    def _table(self, written: Written) -> np.ndarray:
        """The ids of all answers with their ends [n, L], 0 behind them."""
        assert written.encode is not None
        if not written.has_end:
            raise UserError("allowed answers are texts", got=f"modality '{written.modality}'",
                            fix="AllowedTokens")
        if not self.answers or isinstance(self.answers, str):
            raise UserError("AllowedAnswers.answers must be a list of texts",
                            got=repr(self.answers), fix="('yes', 'no')")
        found = []
        for answer in self.answers:
            ids = np.asarray(written.encode(answer), np.int32)
            why = None
            if not len(ids):
                why = "it has no tokens"
            elif len(ids) + 1 > written.max_length:
                why = f"{len(ids)} tokens and an end, at most {written.max_length}"
            elif UNK_ID in ids:
                why = "the vocabulary has no piece for a part of it"
            elif ids.min() <= EOS_ID or ids.max() >= written.num_tokens:
                why = f"ids {ids.tolist()}, of a table of {written.num_tokens}"
            if why is not None:
                raise UserError(f"an allowed answer cannot be written: {answer!r}", got=why,
                                fix="leave it out" + (", or raise DecodingConfig.max_length"
                                                      if "at most" in why else ""))
            found.append(np.append(ids, np.int32(EOS_ID)))
        table = np.zeros((len(found), max(map(len, found))), np.int32)
        for row, ids in zip(table, found, strict=True):
            row[:len(ids)] = ids
        return table
