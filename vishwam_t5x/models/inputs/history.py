"""Frames of a video, further images, or segments of sound as encoder input: few latents for each.

Each frame goes through the transformer of its kind, whose features a resampler reads into a fixed
number of latents. No gradient reaches the transformer from here, as in Unified-IO 2: it learns if
the image or audio input that shares it teaches it, and is frozen otherwise.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vishwam_t5x.core.batch import rows_sharing
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.models import modalities, rows
from vishwam_t5x.models.layers import Dense, Embed, modality_embedding
from vishwam_t5x.models.perceiver import PerceiverResampler, Resampler
from vishwam_t5x.models.positions import grid_angles
from vishwam_t5x.models.vision_transformer import Transformer

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig

PRE_PROJECTION, RESAMPLER, POST_PROJECTION = "pre_projection", "resampler", "post_projection"
"""Names of the modules between the transformer's features and the width of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryInput:
    """Config of frames as encoder input.

    Attributes:
        modality: name of the modality in batches, e.g. 'image_history'.
        transformer: what turns patches into features; share it with the image or audio input by
            giving both the same.
        resampler: what reads the features of a frame.
        grid: (rows, columns) of patches in a whole frame, or (time steps, mel bands).
        mean: subtracted from every number of a patch, in the units of the patches; or one a
            channel.
        std: every number is divided by it after that; or one a channel.
        freeze: the resampler and the projections around it stay bit for bit as they are, without
            gradient, update, weight decay or optimizer state; only the modality's own vector
            learns.
        frame_budget: frames that are encoded for each row on average: the frames of several rows
            are gathered first, and absent ones cost nothing. What makes batches must keep to it:
            frames beyond it become NaN, which stops a run. None: all frames, present or not.
        budget_rows: rows one after the other that share their budget, all of a batch that is no
            multiple of it. While those of a run lie on one device, frames stay where they are.
        placeholders: text tokens that give way to frames 0, 1, … of an example, see
            `models.placement`; (): all stand behind the text.
    """

    modality: str
    transformer: Transformer
    resampler: Resampler
    grid: tuple[int, int]
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    freeze: bool = False
    frame_budget: float | None = None
    budget_rows: int = 8
    placeholders: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        modalities.check_positive(self, ("budget_rows",))
        modalities.check_normalization(self)
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "placeholders", tuple(self.placeholders))
        if self.frame_budget is not None and not self.frame_budget > 0:
            raise UserError("HistoryInput.frame_budget counts frames for each row, more than 0",
                            got=self.frame_budget, fix="None to encode all frames of a batch")

    @property
    def module_name(self) -> str:
        return f"input_encoders_{self.modality}"

    @property
    def table(self) -> None:
        return None

    @property
    def patch_dim(self) -> int:
        return self.transformer.patch_dim

    @property
    def teaches_transformer(self) -> bool:
        return False

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return (PRE_PROJECTION, RESAMPLER, POST_PROJECTION) if self.freeze else ()

    @property
    def rope_scale(self) -> float:
        """Rotary positions are the frame and the latent, as they are counted."""
        return 1.0

    def check(self, config: EncoderDecoderConfig) -> None:
        modalities.check_grid(self, config.head_dim)
        self.transformer.check_grid(self.grid)

    def dummy(self) -> dict[str, Any]:
        return {"input": jnp.zeros((1, 1, 1, self.patch_dim), jnp.float32)}

    def build(self, config: EncoderDecoderConfig, embedder: Embed | None,
              transformer: nn.Module | None) -> HistoryInputEncoder:
        assert embedder is None and transformer is not None
        return HistoryInputEncoder(config, self, transformer, name=self.module_name)


class HistoryInputEncoder(nn.Module):
    """Frames to latents of the width of the model, plus the modality's own vector."""

    config: EncoderDecoderConfig
    input: HistoryInput
    transformer: nn.Module

    @nn.compact
    def __call__(self, fields: modalities.Fields) -> InputSequence:
        """Embeds one modality of a batch: F · num_latents slots of each row, frame by frame.

        Args:
            fields: `input` [B, F, P, patch_dim], floating, or uint8 with 255 standing for 1.0;
                `mask` [B, F, P] (default: ones; a frame without any patch is absent), `pos_ids`
                [B, F, P] (row-major index in the frame, default: 0, 1, …), `frame_ids` [B, F]
                (number of the frame in its example from 0, default: 0, 1, …) and `segment_ids`
                [B, F] (default: one example a row); all int32.

        Raises:
            UserError: patches of another size than `patch_dim`.
        """
        cfg, policy, this = self.config, self.config.policy, self.input
        patches = modalities.require(fields, "input", f"inputs/{this.modality}")
        modalities.check_patches(this, patches, 4)
        batch, number, places = patches.shape[:3]
        mask = fields.get("mask", jnp.ones(patches.shape[:3], jnp.int32)) > 0
        present = jnp.any(mask, axis=-1)
        flat = (batch * number, places)
        pos_ids = fields.get("pos_ids")
        x = self._encode(
            patches.reshape(*flat, -1), mask.reshape(flat),
            jnp.broadcast_to(jnp.arange(places), flat) if pos_ids is None
            else pos_ids.reshape(flat), present)
        latents = this.resampler.num_latents
        x = x.reshape(batch, number * latents, cfg.emb_dim)
        x = x + modality_embedding(self, cfg.emb_dim, policy)
        frames = fields.get("frame_ids", jnp.broadcast_to(jnp.arange(number), (batch, number)))
        segments = fields.get("segment_ids", jnp.ones((batch, number), jnp.int32)) * present
        slot_ids = (frames[:, :, None] * latents + jnp.arange(latents)).reshape(batch, -1)
        angles = None if cfg.rope_theta is None else grid_angles(
            slot_ids, latents, cfg.head_dim, cfg.rope_theta, this.rope_scale)
        return InputSequence.create(x, angles, jnp.repeat(segments, latents, axis=1))

    def _encode(self, patches: Float[Array, "N P C"], mask: Bool[Array, "N P"],
                pos_ids: Int[Array, "N P"], present: Bool[Array, "B F"]) -> Float[Array, "N L D"]:
        """Returns the latents of each of N = B · F frames; those of absent ones mean nothing."""
        budget, shared = self.input.frame_budget, rows_sharing(
            self.input.budget_rows, present.shape[0])
        kept = 0 if budget is None else max(1, round(budget * shared))
        if not 0 < kept < shared * present.shape[1]:
            return self._latents(patches, mask, pos_ids)
        # The frames of each run of rows side by side, those present first.
        present = present.reshape(-1, shared * present.shape[1])
        runs, number = present.shape
        index = jnp.argsort(~present, axis=1, stable=True)[:, :kept].astype(jnp.int32)
        gathered = (rows.take(array.reshape(runs, number, *array.shape[1:]), index)
                    for array in (patches, mask, pos_ids))
        latents = self._latents(*(array.reshape(runs * kept, *array.shape[2:])
                                  for array in gathered))
        inverse = rows.invert(index, number)
        spread = rows.permute(latents.reshape(runs, kept, -1), inverse, index)
        spread = jnp.where((present & (inverse < 0))[..., None], jnp.nan, spread)
        return spread.reshape(runs * number, *latents.shape[1:])

    def _latents(self, patches: jax.Array, mask: jax.Array, pos_ids: jax.Array) -> jax.Array:
        cfg, policy, this = self.config, self.config.policy, self.input

        def dense(features: int, name: str) -> Dense:
            return Dense(features, ("image_patch", "embed"), dtype=policy.compute_dtype,
                         param_dtype=policy.param_dtype, name=name)

        patches = modalities.normalize(patches, this.mean, this.std, jnp.float32)
        features = self.transformer(patches, pos_ids, mask.astype(jnp.int32), this.grid)
        x = dense(this.resampler.emb_dim, PRE_PROJECTION)(jax.lax.stop_gradient(features.last))
        x = PerceiverResampler(this.resampler, policy, name=RESAMPLER)(x, mask)
        x = dense(cfg.emb_dim, POST_PROJECTION)(x)
        return jax.lax.stop_gradient(x) if this.freeze else x
