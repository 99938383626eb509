"""Codes of a grid as decoder output: an image's or a spectrogram's codebook indices."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.models import modalities, tables
from vishwam_t5x.models.codecs.audio_vqgan import AudioVQGANConfig
from vishwam_t5x.models.codecs.image_vqgan import ImageVQGANConfig
from vishwam_t5x.models.layers import Embed
from vishwam_t5x.models.outputs.targets import TargetEncoder
from vishwam_t5x.models.positions import grid_angles
from vishwam_t5x.parallelism.sharding import constrain

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig

FIRST_CODE = 2
"""Code c is token c + 2: token 0 starts a grid and token 1 is [MASK]."""

MASK = 1


def _in_segments_with(hidden: Bool[Array, "B M"], segments: Int[Array, "B M"]
                      ) -> Bool[Array, "B M"]:
    """Whether a slot's example has a hidden one; segment numbers are at most M."""
    number = hidden.shape[1] + 1
    some = jax.vmap(lambda values, at: jnp.zeros(number, jnp.bool_).at[at].max(values))(
        hidden, segments)
    return jnp.take_along_axis(some, segments, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeOutput:
    """Config of codebook indices as decoder output.

    Attributes:
        modality: name of the modality in batches, e.g. 'image'.
        vocab_size: tokens, each a row of the embedding table: codes, `FIRST_CODE` special ones, and
            padding.
        grid: (rows, columns) of codes in one example.
        num_codes: codes of the codebook; by default those of `codec`, or all rows after the
            special ones.
        rope_scale: multiplies row and column numbers before they become rotary angles.
        layout: (rows, columns) in which the codes really lie, where that is not `grid`: spectrogram
            codes of Unified-IO 2 are 32 x 16, and their angles those of a 16 x 32 grid.
        pattern_mask: layers see rows, columns or neighbourhoods of the layout, see
            `models.patterns`; False: all earlier codes, as the code released with Unified-IO 2.
        dynamic_mask: inputs that the task hid from the encoder are seen by no other slot: those
            with 'task_mask' 1 in the batch. False: all are seen, as in the released code. What is
            written is masked as in training; the released code hides nothing while it writes.
        mask_token: inputs that the task hid are [MASK], while it is written too.
        codec: sizes of the codec whose codes they are, to have it in the model: batches may hold
            pixels or spectrograms instead of codes, and what is written can be drawn or sounded. It
            is never trained with the model. None: the codec is kept apart.
        in_table: modality whose table the tokens are rows of (early fusion, arXiv 2405.09818): one
            softmax over all of it in training. None: a table of their own.
        offset: row of token 0 in that table.
        embedding_dim: width of the vectors of a table of their own; None: that of the model.
        adaptor: 'mlp': two layers with a GELU between the vectors and the model (Janus-Pro, arXiv
            2501.17811); 'none'.
        logits_via_embedding: predict with the embedding table; else with a kernel of its own.
        head: 'mlp': a layer and a GELU before that kernel (Janus-Pro); 'linear': none.
        modality_embedding: add a learned vector to every slot.
        shift_back: in examples of which the task hid something, slot i reads its own token i
            instead of the one before; needs `mask_token`, or every answer would be read.
    """

    modality: str
    vocab_size: int
    grid: tuple[int, int]
    num_codes: int | None = None
    rope_scale: float = 1.0
    layout: tuple[int, int] | None = None
    pattern_mask: bool = False
    dynamic_mask: bool = False
    mask_token: bool = False
    shift_back: bool = False
    codec: ImageVQGANConfig | AudioVQGANConfig | None = None
    in_table: str | None = None
    offset: int = 0
    embedding_dim: int | None = None
    adaptor: Literal["none", "mlp"] = "none"
    logits_via_embedding: bool = True
    head: Literal["linear", "mlp"] = "linear"
    modality_embedding: bool = True

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("vocab_size",))
        tables.check_own_settings(self)
        self._check_head()
        object.__setattr__(self, "grid", tuple(self.grid))
        self._check_codec()
        modalities.check_codes(self, FIRST_CODE)
        if self.layout is not None:
            object.__setattr__(self, "layout", tuple(self.layout))
            if math.prod(self.layout) != self.num_tokens:
                raise UserError("CodeOutput.layout must have as many places as its grid",
                                got=f"{self.layout} and {self.grid}", fix="layout = None")
        if self.shift_back and not self.mask_token:
            raise UserError("CodeOutput.shift_back without mask_token lets the decoder read what "
                            "it is to predict", got="mask_token = False",
                            fix="mask_token = True, or shift_back = False")

    def _check_codec(self) -> None:
        codec = self.codec
        if codec is None:
            return
        if self.num_codes is None:
            object.__setattr__(self, "num_codes", codec.num_codes)
        places = tuple(self.layout or self.grid)
        if places != codec.grid or self.num_codes != codec.num_codes:
            raise UserError(
                f"the codec of modality '{self.modality}' has other codes than its output",
                got=f"{codec.num_codes} codes, {codec.grid[0]} x {codec.grid[1]} a grid, not "
                    f"{self.num_codes}, {places[0]} x {places[1]}",
                fix="make num_codes and grid (or layout) of CodeOutput agree with the codec")

    def _check_head(self) -> None:
        one_of(self.adaptor, ("none", "mlp"), "CodeOutput.adaptor")
        one_of(self.head, ("linear", "mlp"), "CodeOutput.head")
        if self.head == "mlp" and self.logits_via_embedding:
            raise UserError("CodeOutput.head = 'mlp' needs a kernel of its own behind it",
                            got="logits_via_embedding = True", fix="logits_via_embedding = False")
        if self.embedding_dim is None:
            return
        modalities.check_positive(self, ("embedding_dim",))
        if self.adaptor == "none" or self.logits_via_embedding:
            raise UserError("vectors that are not as wide as the model need an adaptor before it, "
                            "and cannot predict", got=f"embedding_dim {self.embedding_dim}",
                            fix="adaptor = 'mlp' and logits_via_embedding = False")

    @property
    def module_name(self) -> str:
        return f"target_encoders_{self.modality}"

    @property
    def table(self) -> modalities.Table:
        return tables.of_codes(self, self.embedding_dim)

    @property
    def num_tokens(self) -> int:
        """Tokens of one whole grid."""
        return self.grid[0] * self.grid[1]

    @property
    def token_range(self) -> tuple[int, int]:
        """First token that is a code, and one past the last."""
        codes = self.vocab_size - FIRST_CODE if self.num_codes is None else self.num_codes
        return FIRST_CODE, FIRST_CODE + codes

    @property
    def reads_task_mask(self) -> bool:
        return self.dynamic_mask or self.mask_token

    @property
    def pattern_width(self) -> int:
        return (self.layout or self.grid)[1] if self.pattern_mask else 0

    def check(self, config: EncoderDecoderConfig) -> None:
        modalities.check_grid(self, config.head_dim)
        if config.decoder_only and (self.pattern_mask or self.dynamic_mask):
            raise UserError("pattern_mask and dynamic_mask need an encoder",
                            got=f"num_encoder_layers 0, modality '{self.modality}'",
                            fix="set num_encoder_layers, or both to False")

    def decoder_inputs(self, fields: modalities.Fields) -> jax.Array:
        where = f"targets/{self.modality}"
        inputs = modalities.require(fields, "inputs", where)
        if not self.mask_token or "task_mask" not in fields:
            return inputs
        hidden = fields["task_mask"] > 0
        starts = modalities.positions_or_default(fields, inputs.shape) == 0
        before = jnp.pad(hidden, ((0, 0), (1, 0)))[:, :-1] & ~starts
        shifted = jnp.where(before, MASK, inputs)
        if not self.shift_back:
            return shifted
        own = jnp.where(hidden, MASK, modalities.require(fields, "targets", where))
        segments = fields.get("segment_ids", jnp.ones_like(inputs))
        return jnp.where(_in_segments_with(hidden, segments), own, shifted)

    def next_inputs(self, tokens: jax.Array, hidden: jax.Array, index: jax.Array) -> jax.Array:
        if not self.mask_token:
            return tokens
        before = jnp.take(hidden, jnp.maximum(index - 1, 0), axis=1) & (index > 0)
        return jnp.where(before, MASK, tokens)

    def angles(self, pos_ids: jax.Array, head_dim: int, theta: float) -> jax.Array:
        return grid_angles(pos_ids, self.grid[1], head_dim, theta, self.rope_scale)

    def build(self, config: EncoderDecoderConfig, embedder: Embed) -> nn.Module:
        return CodeEncoder(config, self, embedder, name=self.module_name)


class CodeEncoder(TargetEncoder):
    """A target encoder with the codec, if its config has one."""

    target: CodeOutput  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        if self.target.codec is not None:
            self.discrete_vae = self.target.codec.build()

    def __call__(self, inputs: Int[Array, "B M"], pos_ids: Int[Array, "B M"]
                 ) -> tuple[Float[Array, "B M D"], Float[Array, "B M P"] | None]:
        """See `TargetEncoder`."""
        if self.is_initializing() and (codec := self.target.codec) is not None:
            self.discrete_vae(codec.prepare(jnp.zeros((1, *codec.smallest), jnp.float32)))
        return super().__call__(inputs, pos_ids)

    def tokens(self, signals: Shaped[Array, "B P *one"]) -> dict[str, Int[Array, "B M"]]:
        """Returns 'targets' and decoder 'inputs' of pictures or spectrograms, without gradient.

        Args:
            signals: as `SignalSpec` of the codec says, P of them a row.

        Returns:
            Arrays [B, P · codes of a grid]: codes + `FIRST_CODE`; and the same, shifted right
            within each grid, after a 0.
        """
        assert self.target.codec is not None
        rows, number = signals.shape[:2]
        flat = self.target.codec.prepare(signals.reshape(rows * number, *signals.shape[2:]))
        # Whole pictures, split over the devices as the rows are.
        flat = constrain(flat, ("batch", *(None for _ in flat.shape[1:])))
        codes = jax.lax.stop_gradient(self.discrete_vae.encode(flat)) + FIRST_CODE
        shifted = jnp.pad(codes, ((0, 0), (1, 0)))[:, :-1]
        return {"targets": codes.reshape(rows, -1), "inputs": shifted.reshape(rows, -1)}

    def render(self, codes: Int[Array, "b n"]) -> Float[Array, "b *one"]:
        """Returns the pictures in [0, 1], or the spectrograms, of codes from 0, float32."""
        assert self.target.codec is not None
        return self.target.codec.finish(self.discrete_vae.decode(codes))
