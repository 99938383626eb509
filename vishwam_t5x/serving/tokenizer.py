"""A SentencePiece tokenizer with our extra tokens, without TensorFlow."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.vocabulary import EOS_ID, PAD_ID, VocabularyLayout


class Tokenizer:
    """Text to ids and back: SentencePiece pieces, then the extra tokens of a `VocabularyLayout`.

    An extra token is written by its name, wherever it stands in the text: `<extra_id_0>`,
    `<image_input>`, `[Text] [S]` are one id each. The text between two of them is encoded by
    itself, so a word never continues across one ("jel<extra_id_0>ly" decodes with a space, as in
    SeqIO's vocabulary).

    Args:
        model: path of a SentencePiece model with ids 0 padding, 1 end, 2 unknown, or its bytes.
        layout: where the extra ids lie; None: behind the pieces, with the layout's defaults.

    Raises:
        UserError: the model cannot be read, its ids are others, or the layout is for another size.
    """

    def __init__(self, model: str | os.PathLike | bytes,
                 layout: VocabularyLayout | None = None) -> None:
        self._proto = model if isinstance(model, bytes) else _read(model)
        self._processor = _load(self._proto, "bytes" if isinstance(model, bytes) else str(model))
        pieces = [self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())]
        if layout is None:
            layout = VocabularyLayout.from_pieces(pieces)
        elif layout.base_size != len(pieces):
            raise UserError("the vocabulary layout is for a model of another size",
                            got=f"{layout.base_size} against {len(pieces)} pieces in the model",
                            fix=f"set VocabularyLayout.base_size = {len(pieces)}")
        self.layout = layout

    @property
    def base_size(self) -> int:
        """Pieces of the SentencePiece model."""
        return self.layout.base_size

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        # Longest first: <extra_id_1> must not be found inside <extra_id_10>.
        names = sorted(self.layout.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def encode(self, text: str, add_eos: bool = False) -> Int[np.ndarray, "length"]:
        """Returns the ids of `text`, int32 [length].

        Args:
            text: any text; extra tokens by their names.
            add_eos: append the end token.
        """
        ids: list[int] = []
        for index, part in enumerate(self._special.split(text)):
            # re.split with one group alternates text and extra token.
            ids += [self.layout.special_ids[part]] if index % 2 else self._processor.encode(part)
        return np.asarray([*ids, EOS_ID] if add_eos else ids, np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray, skip_special: bool = False) -> str:
        """Returns the text of `ids` up to the first end token; padding is skipped.

        Args:
            ids: [length], each below the layout's `table_size`.
            skip_special: leave the extra tokens out; otherwise they appear by name, and rows of
                the table that mean nothing as `<unused_ID>`.

        Raises:
            UserError: an id lies outside the table.
        """
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                parts.append(self._processor.decode(run))
                run.clear()

        for token in np.asarray(ids, np.int64).reshape(-1).tolist():
            if token == EOS_ID:
                break
            if not 0 <= token < self.layout.table_size:
                raise UserError("an id lies outside the vocabulary", got=token,
                                fix=f"ids are 0 to {self.layout.table_size - 1}; is this the "
                                    "vocabulary the model was trained with?")
            if token < self.base_size:
                if token != PAD_ID:
                    run.append(token)
                continue
            flush()
            if not skip_special:
                parts.append(self.layout.name(token) or f"<unused_{token}>")
        flush()
        return " ".join(part for part in parts if part)

    def decode_batch(self, ids: Int[np.ndarray, "batch length"] | Sequence[Sequence[int]],
                     skip_special: bool = False) -> list[str]:
        """Returns `decode` of every row."""
        return [self.decode(row, skip_special) for row in ids]

    def pieces(self, ids: Iterable[int] | np.ndarray) -> list[str]:
        """Returns the name of every id, nothing skipped; for looking at what a model reads."""
        out = []
        for token in np.asarray(ids, np.int64).reshape(-1).tolist():
            if 0 <= token < self.base_size:
                out.append(self._processor.id_to_piece(token))
            else:
                out.append(self.layout.name(token) or f"<unused_{token}>")
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {"proto": self._proto, "layout": self.layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["proto"], state["layout"])  # type: ignore[misc]


def text_ids(text: str, model: str, layout: VocabularyLayout | None = None) -> tuple[int, ...]:
    """Returns the ids of a text, without an end: for gin to bind where ids are wanted.

    Args:
        text: any text; extra tokens by their names.
        model: path of a SentencePiece model.
        layout: where the extra ids lie; None: behind the pieces.

    Raises:
        UserError: as `Tokenizer`.
    """
    return tuple(Tokenizer(model, layout).encode(text).tolist())


def _read(path: str | os.PathLike) -> bytes:
    try:
        return storage.read_bytes(path)
    except storage.StorageError:
        raise
    except OSError as error:
        raise UserError("the SentencePiece model cannot be read",
                        got=f"{path}: {error.strerror or 'there is none'}",
                        fix="give the path of a .model file; `vishwam cache` writes the "
                            "quickstart's") from error


def _load(proto: bytes, name: str) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise UserError("this is not a SentencePiece model", got=f"{name} ({len(proto)} bytes)",
                        fix="give the .model file, not the .vocab") from error
    ids = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    # LLaMA's own file has other ids; Unified-IO 2 moves them before use, and so must the user.
    if ids != (PAD_ID, EOS_ID, 2):
        raise UserError("the tokenizer's ids must be 0 padding, 1 end, 2 unknown", got=ids,
                        fix="train it with pad_id=0, eos_id=1, unk_id=2, bos_id=-1")
    return processor
