"""Codes of a grid as decoder output: an image's or a spectrogram's codebook indices."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
from flax import linen as nn

from vishwam_t5x.models import modalities
from vishwam_t5x.models.layers import Embed
from vishwam_t5x.models.outputs.targets import TargetEncoder
from vishwam_t5x.models.positions import grid_angles

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig

FIRST_CODE = 2
"""Code c is token c + 2: token 0 starts a grid and token 1 is [MASK]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeOutput:
    """Config of codebook indices as decoder output.

    Attributes:
        modality: name of the modality in batches, e.g. 'image'.
        vocab_size: rows of the embedding table: codes, `FIRST_CODE` special tokens, and padding.
        grid: (rows, columns) of codes in one example.
        num_codes: codes of the codebook; by default all rows after the special ones.
        rope_scale: multiplies row and column numbers before they become rotary angles.
    """

    modality: str
    vocab_size: int
    grid: tuple[int, int]
    num_codes: int | None = None
    rope_scale: float = 1.0

    modality_embedding: ClassVar[bool] = True
    logits_via_embedding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("vocab_size",))
        object.__setattr__(self, "grid", tuple(self.grid))
        modalities.check_codes(self, FIRST_CODE)

    @property
    def module_name(self) -> str:
        return f"target_encoders_{self.modality}"

    @property
    def table(self) -> modalities.Table:
        return modalities.Table(self.modality, self.vocab_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of one whole grid."""
        return self.grid[0] * self.grid[1]

    @property
    def token_range(self) -> tuple[int, int]:
        """First token that is a code, and one past the last."""
        codes = self.vocab_size - FIRST_CODE if self.num_codes is None else self.num_codes
        return FIRST_CODE, FIRST_CODE + codes

    def check(self, config: EncoderDecoderConfig) -> None:
        modalities.check_grid(self, config.head_dim)

    def angles(self, pos_ids: jax.Array, head_dim: int, theta: float) -> jax.Array:
        return grid_angles(pos_ids, self.grid[1], head_dim, theta, self.rope_scale)

    def build(self, config: EncoderDecoderConfig, embedder: Embed) -> nn.Module:
        return TargetEncoder(config, self, embedder, name=self.module_name)
