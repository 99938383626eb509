"""Codes of a grid as input: an image that is read as the tokens it is written with."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen as nn

from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.models import modalities, tables
from vishwam_t5x.models.layers import Embed, modality_embedding
from vishwam_t5x.models.outputs.codes import FIRST_CODE
from vishwam_t5x.models.positions import grid_angles

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeInput(modalities.WithoutTransformer):
    """Config of codebook indices as input; see `outputs.codes.CodeOutput`, whose table it shares.

    Attributes:
        modality: name of the modality in batches, e.g. 'image'.
        vocab_size: tokens: codes, `FIRST_CODE` special ones, and padding.
        grid: (rows, columns) of codes in a whole image.
        num_codes: codes of the codebook; by default all tokens after the special ones.
        rope_scale: multiplies row and column numbers before they become rotary angles.
        in_table: modality whose table the tokens are rows of; None: that of this modality.
        offset: row of token 0 in that table.
        modality_embedding: add a learned vector to every slot.
        placeholder: text token that gives way to the codes, see `models.placement`; None: they
            stand behind the text.
    """

    modality: str
    vocab_size: int
    grid: tuple[int, int]
    num_codes: int | None = None
    rope_scale: float = 1.0
    in_table: str | None = None
    offset: int = 0
    modality_embedding: bool = True
    placeholder: int | None = None

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("vocab_size",))
        object.__setattr__(self, "grid", tuple(self.grid))
        modalities.check_codes(self, FIRST_CODE)
        tables.check_own_settings(self)

    @property
    def placeholders(self) -> tuple[int, ...]:
        return () if self.placeholder is None else (self.placeholder,)

    @property
    def module_name(self) -> str:
        return f"input_{self.modality}_encoder"

    @property
    def table(self) -> modalities.Table:
        return tables.of_codes(self)

    @property
    def token_range(self) -> tuple[int, int]:
        """First token that is a code, and one past the last."""
        codes = self.vocab_size - FIRST_CODE if self.num_codes is None else self.num_codes
        return FIRST_CODE, FIRST_CODE + codes

    @property
    def patch_dim(self) -> None:
        return None

    def check(self, config: EncoderDecoderConfig) -> None:
        modalities.check_grid(self, config.head_dim)

    def dummy(self) -> dict[str, Any]:
        return {"tokens": jnp.ones((1, 1), jnp.int32)}

    def build(self, config: EncoderDecoderConfig, embedder: Embed | None,
              transformer: nn.Module | None) -> CodeInputEncoder:
        assert embedder is not None and transformer is None
        return CodeInputEncoder(config, self, embedder, name=self.module_name)


class CodeInputEncoder(nn.Module):
    """Code embedding plus, if configured, the modality's own vector; positions are 2-D."""

    config: EncoderDecoderConfig
    input: CodeInput
    embedder: Embed

    @nn.compact
    def __call__(self, fields: modalities.Fields) -> InputSequence:
        """Embeds one modality of a batch.

        Args:
            fields: `tokens` [B, N] int32, code c as c + `FIRST_CODE`; `mask` (default: tokens > 0),
                `pos_ids` (row-major index in the grid, default: 0, 1, …) and `segment_ids`
                (default: the mask), all [B, N] int32.
        """
        cfg, this = self.config, self.input
        tokens = modalities.require(fields, "tokens", f"inputs/{this.modality}")
        mask = fields.get("mask", (tokens > 0).astype(jnp.int32))
        x = self.embedder(tokens + this.offset)
        if this.modality_embedding:
            x = x + modality_embedding(self, cfg.emb_dim, cfg.policy)
        pos_ids = modalities.positions_or_default(fields, tokens.shape)
        angles = None if cfg.rope_theta is None else grid_angles(
            pos_ids, this.grid[1], cfg.head_dim, cfg.rope_theta, this.rope_scale)
        return InputSequence.create(x, angles, mask, fields.get("segment_ids"))
