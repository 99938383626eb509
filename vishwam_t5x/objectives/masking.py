"""Patches of images and spectrograms: cutting, masking, and the mask's shadow on the code grid."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

from vishwam_t5x.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class PatchSpec:
    """How one continuous modality is cut into patches.

    Attributes:
        patch_size: pixels (or frames x mel bins) of a patch: one number for a square, or
            (height, width).
        channels: values per pixel; 3 for RGB, 1 for grey images and spectrograms.
        code_grid: (rows, columns) of the target code grid; None: the grid with the patch grid's
            proportions (Unified-IO 2 has 24 x 24 patches and 32 x 32 codes).
    """

    patch_size: int | tuple[int, int] = 16
    channels: int = 3
    code_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        size = self.patch_size
        pair = (size, size) if isinstance(size, int) else size
        for name, value in (("patch_size", pair), ("code_grid", self.code_grid)):
            if value is None:
                continue
            if (not isinstance(value, tuple | list) or len(value) != 2
                    or not all(isinstance(n, int) and n > 0 for n in value)):
                raise UserError(f"PatchSpec.{name} must be two positive whole numbers",
                                got=repr(getattr(self, name)), fix="e.g. (16, 16)")
            # gin gives lists; the field must stay hashable and comparable.
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.channels, int) or self.channels < 1:
            raise UserError("PatchSpec.channels must be a positive whole number",
                            got=repr(self.channels))

    @property
    def height(self) -> int:
        """Rows of pixels of a patch."""
        return self.patch_size[0]  # type: ignore[index]  # a pair after __post_init__

    @property
    def width(self) -> int:
        """Columns of pixels of a patch."""
        return self.patch_size[1]  # type: ignore[index]

    @property
    def patch_dim(self) -> int:
        """Values per patch."""
        return self.height * self.width * self.channels

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the patch grid (rows, columns) of an array [H, W] or [H, W, C].

        Raises:
            UserError: a side is not a multiple of the patch, or the channels differ.
        """
        channels = shape[2] if len(shape) == 3 else 1
        if len(shape) not in (2, 3) or channels != self.channels:
            raise UserError("an image or spectrogram has the wrong number of axes or channels",
                            got=f"shape {tuple(shape)}, PatchSpec.channels {self.channels}",
                            fix="[H, W, channels], or [H, W] where channels is 1")
        if shape[0] % self.height or shape[1] % self.width:
            raise UserError(
                "the sides of an image or spectrogram must be multiples of its patch",
                got=f"{shape[0]} x {shape[1]} with patches of {self.height} x {self.width}",
                fix="resize or pad it in the task's preprocessor, or change PatchSpec.patch_size")
        return shape[0] // self.height, shape[1] // self.width

    def num_patches(self, shape: tuple[int, ...]) -> int:
        """Returns how many patches an array [H, W] or [H, W, C] has."""
        rows, columns = self.grid(shape)
        return rows * columns

    def codes_grid(self, patch_grid: tuple[int, int], num_codes: int) -> tuple[int, int]:
        """Returns the (rows, columns) in which `num_codes` target codes are laid out.

        Raises:
            UserError: no grid of the patch grid's proportions has that many cells, or
                `code_grid` is set and does not.
        """
        rows, columns = patch_grid
        if self.code_grid is not None:
            grid = self.code_grid
        else:
            down = math.isqrt(num_codes * rows // columns) if columns else 0
            grid = (down, num_codes // down if down else 0)
            if grid[0] * columns != grid[1] * rows:
                grid = (0, 0)
        if grid[0] * grid[1] != num_codes:
            raise UserError(
                "the target codes do not form a grid",
                got=f"{num_codes} codes, {rows} x {columns} patches, code_grid {self.code_grid}",
                fix="set PatchSpec.code_grid to the codec's (rows, columns)")
        return grid


@dataclasses.dataclass(frozen=True)
class FrameSpec:
    """How the frames of a history are cut, and what the model makes of each.

    Attributes:
        patch: how a frame is cut into patches.
        grid: (rows, columns) of patches of a frame; frames of another size are refused.
        latents: slots of a row that a frame becomes, `Resampler.num_latents` of the model.
        max_frames: examples of more are refused: their prompts and positions know no more.
        budget: frames for each row on average, as `HistoryInput.frame_budget` of the model has it;
            None: as many as fit.
        budget_rows: rows one after the other that share their budget, as in the model.
    """

    patch: PatchSpec = PatchSpec(16)
    grid: tuple[int, int] = (16, 16)
    latents: int = 32
    max_frames: int = 8
    budget: float | None = None
    budget_rows: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        for name, value in (("grid", min(self.grid)), ("latents", self.latents),
                            ("max_frames", self.max_frames), ("budget_rows", self.budget_rows)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"FrameSpec.{name} must be a positive whole number",
                                got=repr(getattr(self, name)))
        if self.budget is not None and not self.budget > 0:
            raise UserError("FrameSpec.budget counts frames for each row, more than 0",
                            got=self.budget, fix="None for as many as fit")

    @property
    def places(self) -> int:
        """Patches of a frame."""
        return self.grid[0] * self.grid[1]

    def slots(self, frames: Any) -> Any:
        """Returns the slots of a number of frames, or of many numbers.

        Raises:
            UserError: there are more than `max_frames`.
        """
        if np.any(np.asarray(frames) > self.max_frames):
            raise UserError("an example has too many frames",
                            got=f"{np.max(frames)}, at most {self.max_frames}",
                            fix="choose frames in the task's preprocessors")
        return frames * self.latents


def patchify_frames(frames: Shaped[np.ndarray, "n ..."], spec: FrameSpec
                    ) -> Shaped[np.ndarray, "n places p"]:
    """Cuts each frame of [n, H, W, C] or [n, H, W] as `patchify` does.

    Raises:
        UserError: frames are of another size than `spec.grid` says.
    """
    if frames.ndim < 3 or (grid := spec.patch.grid(frames.shape[1:])) != spec.grid:
        raise UserError(
            "the frames of a history are not of the size that the model knows",
            got=f"shape {frames.shape}; frames of "
                + " x ".join(str(n * side) for n, side in zip(
                    spec.grid, (spec.patch.height, spec.patch.width), strict=True)),
            fix="resize them in the task's preprocessors, or set FrameSpec.grid")
    (rows, columns), cut = grid, spec.patch
    parts = frames.reshape(len(frames), rows, cut.height, columns, cut.width, cut.channels)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(len(frames), spec.places, cut.patch_dim)


def patchify(image: Shaped[np.ndarray, "..."], spec: PatchSpec) -> Shaped[np.ndarray, "n p"]:
    """Cuts an array into patches, row-major; each patch is flattened in (dy, dx, c) order.

    Args:
        image: [H, W, C] or [H, W]; dtype is kept.
        spec: patch size and channels.

    Returns:
        [rows * columns, height * width * channels].
    """
    rows, columns = spec.grid(image.shape)
    cut = image.reshape(rows, spec.height, columns, spec.width, spec.channels)
    return cut.transpose(0, 2, 1, 3, 4).reshape(rows * columns, spec.patch_dim)


def num_masked(num_patches: int, rate: float) -> int:
    """Returns round(n * rate), but with two patches or more at least one masked and one kept."""
    if num_patches == 0:
        return 0
    return min(max(round(num_patches * rate), 1), max(num_patches - 1, 1))


def num_masked_many(num_patches: Int[np.ndarray, "n"], rate: float) -> Int[np.ndarray, "n"]:
    """`num_masked` of each number of patches."""
    masked = np.maximum(np.rint(num_patches * rate).astype(np.int64), 1)
    masked = np.minimum(masked, np.maximum(num_patches - 1, 1))
    return np.minimum(masked, num_patches)


def patch_mask(num_patches: int, rate: float,
               rng: np.random.Generator) -> Bool[np.ndarray, "n"]:
    """Draws `num_masked(n, rate)` patches to hide, uniform over all such sets.

    He et al. 2022 (arXiv:2111.06377) mask this way at a rate of 0.75.
    """
    mask = np.zeros((num_patches,), np.bool_)
    mask[rng.permutation(num_patches)[:num_masked(num_patches, rate)]] = True
    return mask


def nearest_grid(source: tuple[int, int], target: tuple[int, int]) -> Int[np.ndarray, "t"]:
    """Returns for each cell of the `target` grid the cell of `source` under its centre.

    Both row-major; the cells are taken to cover the same picture.
    """
    # floor((i + 1/2) * source / target), in whole numbers.
    rows = (2 * np.arange(target[0]) + 1) * source[0] // (2 * target[0])
    columns = (2 * np.arange(target[1]) + 1) * source[1] // (2 * target[1])
    return (rows[:, None] * source[1] + columns[None, :]).reshape(-1)


def code_mask(mask: Bool[np.ndarray, "n"], patch_grid: tuple[int, int],
              code_grid: tuple[int, int]) -> Bool[np.ndarray, "m"]:
    """Returns which codes are hidden: those whose centre lies in a masked patch.

    Args:
        mask: row-major patch mask.
        patch_grid: (rows, columns) of the patches.
        code_grid: (rows, columns) of the codes; need not be a multiple of the patch grid.
    """
    assert mask.size == patch_grid[0] * patch_grid[1], (mask.size, patch_grid)
    return mask[nearest_grid(patch_grid, code_grid)]
