"""What the encoder-decoder asks of a modality: a config that builds an input or output module.

A new modality is one file in `inputs/` or `outputs/` with a frozen dataclass that has the members
below and the module it builds; nothing else in the model needs to know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vishwam_t5x.core.errors import UserError

if TYPE_CHECKING:
    from flax import linen as nn

    from vishwam_t5x.models.config import EncoderDecoderConfig
    from vishwam_t5x.models.layers import Embed
    from vishwam_t5x.models.vision_transformer import Transformer

Fields = Mapping[str, jax.Array]
"""The arrays of one modality of a batch, by the last part of their key ('tokens', 'mask', …)."""


class Table(NamedTuple):
    """An embedding table: modalities that name the same one share it.

    Attributes:
        name: the modality that owns it.
        num_embeddings: its rows; None where another modality owns it and says.
        features: width of its vectors; None: that of the model.
    """

    name: str
    num_embeddings: int | None
    features: int | None = None

    @property
    def rows(self) -> int:
        """Its rows, of a table of which that is known; see `tables.of`."""
        assert self.num_embeddings is not None
        return self.num_embeddings


class InputConfig(Protocol):
    """Config of an input modality; keys 'inputs/<modality>/…' of a batch."""

    @property
    def modality(self) -> str: ...
    @property
    def placeholders(self) -> tuple[int, ...]:
        """Text tokens that give way to picture 0, 1, … of an example; see `placement`."""

    @property
    def module_name(self) -> str:
        """Name of the module in the parameter tree."""

    @property
    def table(self) -> Table | None:
        """The embedding table it reads, or None."""

    @property
    def patch_dim(self) -> int | None:
        """Numbers in one patch of a continuous modality; None for tokens."""

    @property
    def transformer(self) -> Transformer | None:
        """The transformer its patches go through, or None; modalities that name one share it."""

    @property
    def teaches_transformer(self) -> bool:
        """Whether that transformer learns by way of it; where no input teaches one, it is frozen.
        """

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """Modules inside its own that never learn."""

    def check(self, config: EncoderDecoderConfig) -> None:
        """Raises `UserError` if it does not go with the sizes of the model."""

    def dummy(self) -> dict[str, Any]:
        """Returns the smallest arrays [1, 1, …] its module accepts, to initialize parameters."""

    def build(self, config: EncoderDecoderConfig, embedder: Embed | None,
              transformer: nn.Module | None) -> nn.Module:
        """Returns the module: (fields) -> `InputSequence`."""


class WithoutTransformer:
    """What an `InputConfig` says whose input goes through no transformer of its own."""

    @property
    def transformer(self) -> None:
        return None

    @property
    def teaches_transformer(self) -> bool:
        return False

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return ()


class TargetConfig(Protocol):
    """Config of a target modality; keys 'targets/<modality>/…' of a batch."""

    @property
    def modality(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def offset(self) -> int:
        """Row of token 0 in the table; all tokens outside the model count from there."""
    @property
    def modality_embedding(self) -> bool: ...
    @property
    def logits_via_embedding(self) -> bool: ...
    @property
    def adaptor(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def dynamic_mask(self) -> bool: ...

    @property
    def module_name(self) -> str:
        """Name of the module in the parameter tree."""

    @property
    def table(self) -> Table:
        """The embedding table it reads, and predicts with where `logits_via_embedding`."""

    def check(self, config: EncoderDecoderConfig) -> None:
        """Raises `UserError` if it does not go with the sizes of the model."""

    @property
    def reads_task_mask(self) -> bool:
        """Whether it makes something of 'task_mask' in a batch."""

    def next_inputs(self, tokens: jax.Array, hidden: jax.Array, index: jax.Array) -> jax.Array:
        """Returns the ids [R] that the decoder reads at place `index` while it writes, given those
        written before it [R] and which places the task hid [R, T]."""

    @property
    def pattern_width(self) -> int:
        """Columns of the grid whose patterns narrow its attention, 0 for none; see `patterns`."""

    def decoder_inputs(self, fields: Fields) -> jax.Array:
        """Returns the ids [B, M] the decoder reads, from the arrays of a batch."""

    def angles(self, pos_ids: jax.Array, head_dim: int, theta: float) -> jax.Array:
        """Returns the rotary angles [..., head_dim / 2] of positions."""

    def build(self, config: EncoderDecoderConfig, embedder: Embed) -> nn.Module:
        """Returns the module: (inputs, pos_ids) -> embeddings and angles; see `TargetEncoder`."""


def require(fields: Fields, name: str, where: str) -> jax.Array:
    """Returns `fields[name]`; raises `UserError` naming the batch key that is missing."""
    if name not in fields:
        raise UserError(f"the batch lacks '{where}/{name}'",
                        got=", ".join(f"{where}/{field}" for field in sorted(fields)) or "nothing")
    return fields[name]


def positions_or_default(fields: Fields, shape: tuple[int, ...]) -> jax.Array:
    """Returns `pos_ids` [B, N], or 0, 1, 2, … where the batch has none (one example a row)."""
    if "pos_ids" in fields:
        return fields["pos_ids"]
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape[:2])


def check_positive(config: Any, names: tuple[str, ...]) -> None:
    """Raises `UserError` unless the named fields of a config are whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{type(config).__name__}.{name} must be a whole number of at least 1",
                got=repr(value))


def check_grid(owner: Any, head_dim: int) -> None:
    """Raises `UserError` unless a modality's grid, scale and the head size give 2-D rotations."""
    name = type(owner).__name__
    grid = owner.grid
    if len(grid) != 2 or not all(isinstance(side, int) and side >= 1 for side in grid):
        raise UserError(f"{name}.grid is (rows, columns), whole numbers of at least 1",
                        got=repr(grid), fix="e.g. (24, 24)")
    if not owner.rope_scale > 0:
        raise UserError(f"{name}.rope_scale must be positive", got=owner.rope_scale, fix="e.g. 1.0")
    if head_dim % 4:
        raise UserError("head_dim must be a multiple of 4 when a modality lies on a grid",
                        got=f"head_dim {head_dim}, {name} '{owner.modality}'",
                        fix=f"head_dim = {-(-head_dim // 4) * 4}")


def check_patches(owner: Any, patches: jax.Array, axes: int) -> None:
    """Raises `UserError` unless an array holds the patches that an input was built for."""
    if patches.ndim == axes and patches.shape[-1] == owner.patch_dim:
        return
    where = f"inputs/{owner.modality}"
    lead = "rows, frames, patches" if axes == 4 else "rows, slots"
    raise UserError(f"'{where}/input' does not hold the patches the model was built for",
                    got=f"shape {patches.shape}",
                    fix=f"[{lead}, {owner.patch_dim}], or set patch_dim of modality "
                    f"'{owner.modality}'")


def normalize(patches: jax.Array, mean: float | tuple[float, ...],
              std: float | tuple[float, ...], dtype: DTypeLike) -> jax.Array:
    """Returns (patches - mean) / std in `dtype`; uint8 patches stand for shares of 255.

    Args:
        patches: [..., patch_dim]; the channels of a pixel lie next to each other.
        mean: one number, or one a channel.
        std: likewise.
        dtype: of the result; floating patches that are not changed keep theirs.
    """
    if patches.dtype == jnp.uint8:
        patches = patches.astype(dtype) / 255
    if (mean, std) == (0.0, 1.0):
        return patches

    def spread(values: float | tuple[float, ...]) -> float | jax.Array:
        if not isinstance(values, tuple):
            return values
        return jnp.tile(jnp.asarray(values, dtype), patches.shape[-1] // len(values))

    return (patches.astype(dtype) - spread(mean)) / spread(std)


def check_normalization(owner: Any) -> None:
    """Raises `UserError` unless mean and std of patches are numbers, or one a channel."""
    name = type(owner).__name__
    values = {}
    for field in ("mean", "std"):
        value = getattr(owner, field)
        if isinstance(value, list | tuple):
            object.__setattr__(owner, field, tuple(float(number) for number in value))
            if not value or owner.patch_dim % len(value):
                raise UserError(f"{name}.{field} must have a number for each channel of a patch",
                                got=f"{len(value)} numbers, {owner.patch_dim} a patch",
                                fix="one number for all, or three for RGB")
        values[field] = value if isinstance(value, list | tuple) else (value,)
    if not all(value > 0 for value in values["std"]):
        raise UserError(f"{name}.std must be positive", got=owner.std,
                        fix="the standard deviation of the numbers in the patches, or 1.0")


def check_codes(owner: Any, first_code: int) -> None:
    """Raises `UserError` unless a code output's table has room for its codes."""
    room = owner.vocab_size - first_code
    if owner.num_codes is not None and not 1 <= owner.num_codes <= room:
        raise UserError(
            f"the codes of modality '{owner.modality}' do not fit in its table",
            got=f"num_codes {owner.num_codes}, vocab_size {owner.vocab_size}",
            fix=f"vocab_size >= num_codes + {first_code} (tokens 0 and 1 are no codes)")
