"""Which text ids mean what beyond the base vocabulary: sentinels, locations, prefix tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from vishwam_t5x.core.errors import UserError, did_you_mean

PAD_ID = 0
BOS_ID = 0
EOS_ID = 1
UNK_ID = 2
MASK_CODE = 1
CODE_OFFSET = 2
"""Image and audio target ids: 0 is BOS, 1 is [MASK], code c is c + CODE_OFFSET."""

PREFIXES = ("[Text] [S]", "[Text] [R]", "[Text] [X]", "[Image] [S]", "[Image] [R]",
            "[Audio] [S]", "[Audio] [R]")
"""Prefix tokens in id order: the modality to write and the paradigm, one id each."""


@dataclasses.dataclass(frozen=True)
class VocabularyLayout:
    """The text ids of Unified-IO 2, with the size of the base vocabulary left free.

    In id order after the base pieces: location bins (reversed), span sentinels (reversed),
    history references, `<image_input>`, `<audio_input>`, the seven prefix tokens, and unused rows
    up to a multiple of `table_multiple`. With the defaults the ids are those of the published
    Unified-IO 2 checkpoints (the LLaMA pieces, 33,280 rows).

    Attributes:
        base_size: pieces of the tokenizer, of which 0 is padding and BOS, 1 EOS, 2 UNK.
        num_sentinels: span sentinels; a corrupted text may have at most this many spans.
        num_location_bins: bins for box coordinates and other values in [0, 1].
        num_history: image and audio references `<image_history_i>`, `<audio_history_i>`, i from 1.
        table_multiple: rows of the embedding table are rounded up to a multiple of this.
    """

    base_size: int = 32_000
    num_sentinels: int = 200
    num_location_bins: int = 1_000
    num_history: int = 8
    table_multiple: int = 128

    def __post_init__(self) -> None:
        least = {"base_size": 3, "num_sentinels": 1, "num_location_bins": 0, "num_history": 0,
                 "table_multiple": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise UserError(f"VocabularyLayout.{name} is not usable", got=repr(value),
                                fix=f"a whole number of at least {smallest}")

    @classmethod
    def from_pieces(cls, pieces: Sequence[str], *, num_sentinels: int = 200,
                    num_location_bins: int = 1_000, num_history: int = 8,
                    table_multiple: int = 128) -> VocabularyLayout:
        """Lays the extra ids out behind the pieces of a tokenizer.

        Args:
            pieces: the tokenizer's pieces in id order, without the extra ids.
            num_sentinels: see the class.
            num_location_bins: see the class.
            num_history: see the class.
            table_multiple: see the class.

        Raises:
            UserError: ids 1 and 2 are not EOS and UNK, or a piece is one of the extra tokens.
        """
        for index, names in ((EOS_ID, ("</s>", "<eos>")), (UNK_ID, ("<unk>",))):
            got = pieces[index] if len(pieces) > index else None
            if got not in names:
                raise UserError(
                    f"the tokenizer's piece {index} must be {names[0]}", got=repr(got),
                    fix="train it with pad_id=0, eos_id=1, unk_id=2, bos_id=-1")
        layout = cls(len(pieces), num_sentinels, num_location_bins, num_history, table_multiple)
        clash = sorted(set(pieces) & set(layout.special_ids))
        if clash:
            raise UserError("the tokenizer already holds extra tokens that are added behind it",
                            got=", ".join(clash[:5]),
                            fix="give the pieces without extra ids (SeqIO: extra_ids=0)")
        return layout

    @property
    def location_start(self) -> int:
        """Smallest location id; bin b is `location_start + num_location_bins - 1 - b`."""
        return self.base_size

    @property
    def sentinel_start(self) -> int:
        """Smallest sentinel id; it is the last sentinel, as T5 numbers them downwards."""
        return self.base_size + self.num_location_bins

    @property
    def history_start(self) -> int:
        """Id of `<image_history_1>`; the references alternate image, audio."""
        return self.sentinel_start + self.num_sentinels

    @property
    def input_start(self) -> int:
        """Id of `<image_input>`; `<audio_input>` follows."""
        return self.history_start + 2 * self.num_history

    @property
    def prefix_start(self) -> int:
        """Id of `[Text] [S]`, the first of `PREFIXES`."""
        return self.input_start + 2

    @property
    def size(self) -> int:
        """Ids that mean something."""
        return self.prefix_start + len(PREFIXES)

    @property
    def table_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.size // self.table_multiple) * self.table_multiple

    def sentinel(self, index: int) -> int:
        """Returns the id of the sentinel of span `index` (from 0)."""
        if not 0 <= index < self.num_sentinels:
            raise UserError("there is no such sentinel", got=index,
                            fix=f"0 to {self.num_sentinels - 1}, or raise num_sentinels")
        return self.history_start - 1 - index

    @functools.cached_property
    def sentinels(self) -> np.ndarray:
        """Sentinel ids by span number, int32 [num_sentinels]."""
        return np.arange(self.history_start - 1, self.sentinel_start - 1, -1, dtype=np.int32)

    def location(self, value: float) -> int:
        """Returns the id of `value` in [0, 1]: bin floor(value * (bins - 1))."""
        if not 0.0 <= value <= 1.0 or self.num_location_bins == 0:
            raise UserError("a location must lie in [0, 1] and the vocabulary must have bins",
                            got=f"{value} with {self.num_location_bins} bins")
        return self.sentinel_start - 1 - int(value * (self.num_location_bins - 1))

    def prefix(self, modality: str, paradigm: str) -> int:
        """Returns the id of e.g. `[Text] [R]` for ('text', 'R')."""
        name = f"[{modality.capitalize()}] [{paradigm}]"
        if name not in PREFIXES:
            raise UserError("there is no such prefix token", got=name,
                            fix=did_you_mean(name, PREFIXES) or "one of: " + ", ".join(PREFIXES))
        return self.prefix_start + PREFIXES.index(name)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Every extra token by the name it has in a prompt.

        Location bin b is named `<extra_id_{num_sentinels + b}>`, as Unified-IO 2 names it.
        """
        out = {f"<extra_id_{i}>": self.sentinel(i) for i in range(self.num_sentinels)}
        for b in range(self.num_location_bins):
            out[f"<extra_id_{self.num_sentinels + b}>"] = self.sentinel_start - 1 - b
        for i in range(self.num_history):
            out[f"<image_history_{i + 1}>"] = self.history_start + 2 * i
            out[f"<audio_history_{i + 1}>"] = self.history_start + 2 * i + 1
        out["<image_input>"], out["<audio_input>"] = self.input_start, self.input_start + 1
        out.update({name: self.prefix_start + i for i, name in enumerate(PREFIXES)})
        return out

    def token(self, name: str) -> int:
        """Returns the id of an extra token by the name it has in a prompt, '<image_input>' say."""
        if name not in self.special_ids:
            raise UserError("the vocabulary has no such extra token", got=name,
                            fix=did_you_mean(name, self.special_ids) or "'<image_input>', "
                            "'<audio_input>', or raise num_history of VocabularyLayout")
        return self.special_ids[name]

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return {token: name for name, token in self.special_ids.items()}

    def name(self, token: int) -> str | None:
        """Returns the name of an extra token, or None for a piece of the base vocabulary."""
        return self._names.get(int(token))


def token_id(layout: VocabularyLayout, name: str) -> int:
    """Returns `layout.token(name)`; for gin: the placeholder of a picture by its name."""
    return layout.token(name)
