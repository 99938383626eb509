"""Cross-entropy per modality as sums and weights, never means; divided once, at the end.

The formula is T5X's (google-research/t5x, `losses.py`): cross-entropy against smoothed labels,
less the entropy of the smoothed labels (so a perfect prediction costs 0), plus
z_loss * log(Z)^2. It is computed from log-sum-exp and a gathered logit, not from a one-hot array.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vishwam_t5x.core.batch import Batch
from vishwam_t5x.core.errors import UserError, one_of


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=("loss", "z_loss", "weight", "correct"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Weighted sums over target positions, each a float32 scalar. Add them with `+`.

    Attributes:
        loss: cross-entropy plus z-loss, in nats times weight. The only part with a gradient.
        z_loss: the part of `loss` that is z-loss.
        weight: sum of the weights.
        correct: sum of the weights of positions whose most probable token is the target.
    """

    loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]

    def __add__(self, other: LossSums) -> LossSums:
        return jax.tree.map(jnp.add, self, other)

    @classmethod
    def zeros(cls) -> LossSums:
        """Returns the sums over nothing."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(4)))


NORMALIZATIONS = ("modality", "token", "position", "sequence", "sum")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the loss is put together.

    Attributes:
        z_loss: weight of log(Z)^2; 1e-4 in T5X and Unified-IO 2.
        label_smoothing: probability spread evenly over the wrong tokens, in [0, 1).
        modality_weights: factor on the loss of a modality; 1 where not named.
        normalization: 'modality': each modality's sum over its own weight (Unified-IO 2);
            'token': over the weight of all modalities (T5X's NUM_REAL_TARGET_TOKENS); 'position':
            over the number of target positions, padding included (NUM_TOTAL_TARGET_TOKENS);
            'sequence': tokens of an example weigh 1 together, and the sum is divided by the number
            of examples (AVERAGE_PER_SEQUENCE); 'sum': not divided (None); a number: over that
            number.
        chunk_tokens: most target positions (rows x positions) of the whole batch whose logits
            exist at once; None: all, or by size if the batch is big (see `should_chunk`); 0: all.
    """

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    modality_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    normalization: Literal["modality", "token", "position", "sequence", "sum"] | float = "modality"
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.normalization, (int, float)):
            if not 0.0 < self.normalization < math.inf:
                raise UserError("LossConfig.normalization must be a positive number or a name",
                                got=self.normalization, fix=f"one of {', '.join(NORMALIZATIONS)}")
        else:
            one_of(self.normalization, NORMALIZATIONS, "LossConfig.normalization")
        if not 0.0 <= self.z_loss < math.inf:
            raise UserError("LossConfig.z_loss must be finite and not negative", got=self.z_loss,
                            fix="1e-4, or 0 for none")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError("LossConfig.label_smoothing must be in [0, 1)",
                            got=self.label_smoothing)
        for modality, weight in self.modality_weights.items():
            if not 0.0 <= weight < math.inf:
                raise UserError(f"LossConfig.modality_weights['{modality}'] must be finite and "
                                "not negative", got=weight)
        if self.chunk_tokens is not None and (
                not isinstance(self.chunk_tokens, int) or self.chunk_tokens < 0):
            raise UserError("LossConfig.chunk_tokens must be a whole number of positions",
                            got=repr(self.chunk_tokens), fix="None to choose by size, 0 for never")


def smoothing_constants(label_smoothing: float, vocab_size: int) -> tuple[float, float, float]:
    """Returns (probability of the target, of each other token, entropy of that distribution)."""
    target = 1.0 - label_smoothing
    other = label_smoothing / (vocab_size - 1) if vocab_size > 1 else 0.0
    entropy = -target * math.log(target)
    if other > 0.0:
        entropy -= (vocab_size - 1) * other * math.log(other)
    return target, other, entropy


def token_losses(logits: Float[Array, "*batch v"], targets: Int[Array, "*batch"], z_loss: float,
                 label_smoothing: float) -> tuple[Array, Array, Array, Array]:
    """Returns (loss, z-loss, correct, log Z) of each position, unweighted, float32.

    Args:
        logits: float32.
        targets: token ids in [0, v).
        z_loss: weight of log(Z)^2.
        label_smoothing: in [0, 1).
    """
    vocab_size = logits.shape[-1]
    target_share, other_share, entropy = smoothing_constants(label_smoothing, vocab_size)
    highest = jnp.max(logits, axis=-1)
    shift = jnp.where(jnp.isfinite(highest), highest, 0.0)
    log_z = shift + jnp.log(jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1))
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - target_share * at_target
    if other_share > 0.0:
        loss = loss - other_share * (jnp.sum(logits, axis=-1) - at_target)
    z = z_loss * jnp.square(log_z)
    # The first of equal maxima, as argmax; a plain minimum is several times faster than an
    # index-carrying reduction on CPUs.
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    best = jnp.min(jnp.where(logits == highest[..., None], tokens, vocab_size), axis=-1)
    return loss - entropy + z, z, (best == targets).astype(jnp.float32), log_z


def token_gradients(logits: Float[Array, "*batch v"], targets: Int[Array, "*batch"],
                    log_z: Float[Array, "*batch"], z_loss: float,
                    label_smoothing: float) -> Float[Array, "*batch v"]:
    """Returns d loss / d logits of each position, unweighted: elementwise, so XLA fuses it."""
    target_share, other_share, _ = smoothing_constants(label_smoothing, logits.shape[-1])
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    labels = jnp.where(tokens == targets[..., None], target_share, other_share)
    slope = 1.0 + 2.0 * z_loss * log_z
    return slope[..., None] * jnp.exp(logits - log_z[..., None]) - labels


def weighted(values: Float[Array, "*batch"], weights: Float[Array, "*batch"],
             axis: int | None = None) -> Float[Array, "..."]:
    """Returns the weighted sum over `axis` (None: over all); weight 0 hides even a NaN."""
    return jnp.sum(jnp.where(weights == 0.0, 0.0, values * weights), axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sums(logits: Array, targets: Array, weights: Array, z_loss: float,
          label_smoothing: float) -> LossSums:
    return _sums_forward(logits, targets, weights, z_loss, label_smoothing)[0]


def _sums_forward(logits: Array, targets: Array, weights: Array, z_loss: float,
                  label_smoothing: float) -> tuple[LossSums, Any]:
    loss, z, correct, log_z = token_losses(
        logits.astype(jnp.float32), targets, z_loss, label_smoothing)
    sums = LossSums(weighted(loss, weights), weighted(z, weights),
                    jnp.sum(weights, dtype=jnp.float32), weighted(correct, weights))
    return sums, (logits, targets, weights, log_z)


def _sums_backward(z_loss: float, label_smoothing: float, residuals: Any,
                   cotangent: LossSums) -> tuple[Any, ...]:
    logits, targets, weights, log_z = residuals
    gradient = token_gradients(logits.astype(jnp.float32), targets, log_z, z_loss, label_smoothing)
    scaled = (weights * cotangent.loss)[..., None]
    gradient = jnp.where(weights[..., None] == 0.0, 0.0, gradient * scaled)
    return gradient.astype(logits.dtype), None, jnp.zeros_like(weights)


_sums.defvjp(_sums_forward, _sums_backward)


def constant_parts(sums: LossSums) -> LossSums:
    """Stops the gradient of everything but `loss`."""
    stop = jax.lax.stop_gradient
    return LossSums(sums.loss, stop(sums.z_loss), stop(sums.weight), stop(sums.correct))


def cross_entropy_sums(logits: Float[Array, "*batch v"], targets: Int[Array, "*batch"],
                       weights: Float[Array, "*batch"], z_loss: float = 1e-4,
                       label_smoothing: float = 0.0) -> LossSums:
    """Returns the weighted cross-entropy of logits, T5X's formula.

    Computed in float32 whatever the dtype of the logits. Positions of weight 0 add nothing to
    value or gradient even where their logits are NaN or infinite. Only `loss` has a gradient, and
    only with respect to the logits.

    Args:
        logits: unnormalised log-probabilities, any floating dtype.
        targets: token ids in [0, v).
        weights: weight of each position, usually 0 or 1; any real or integer dtype.
        z_loss: weight of log(Z)^2.
        label_smoothing: probability spread evenly over the wrong tokens, in [0, 1).
    """
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    return constant_parts(_sums(logits, targets, weights, z_loss, label_smoothing))


def loss_weights(batch: Batch, modality: str, config: LossConfig | None = None
                 ) -> Float[Array, "B M"]:
    """Returns what weighs the loss of each target position of a modality, float32.

    That is its `loss_mask` if the batch has one, else its `mask`; with `normalization='sequence'`
    divided by the sum over the example. A position's weight depends on its row alone.
    """
    weights = batch.get(f"targets/{modality}/loss_mask")
    weights = batch[f"targets/{modality}/mask"] if weights is None else weights
    weights = weights.astype(jnp.float32)
    if config is None or config.normalization != "sequence":
        return weights
    segments = batch.get(f"targets/{modality}/segment_ids")
    if segments is None:
        totals = jnp.sum(weights, axis=-1, keepdims=True)
    else:
        same = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)
        totals = jnp.einsum("bqk,bk->bq", same, weights, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(totals > 0.0, weights / jnp.where(totals > 0.0, totals, 1.0), 0.0)


def normalizers(batch: Batch, config: LossConfig) -> dict[str, Float[Array, ""]]:
    """Returns what each modality's loss is divided by; where that is counted, at least 1.

    Take them from the whole batch, before it is cut into microbatches: sums over microbatches then
    add up to the loss of the whole batch exactly as if it had not been cut.

    Args:
        batch: flat batch; its target modalities are those with a mask.
        config: `normalization` decides.
    """
    modalities = list(dict.fromkeys(
        key.split("/")[1] for key in batch
        if key.startswith("targets/") and key.endswith(("/mask", "/loss_mask"))))
    how = config.normalization
    if how == "sum" or not isinstance(how, str):
        factor = 1.0 if isinstance(how, str) else how
        return {m: jnp.asarray(factor, jnp.float32) for m in modalities}
    if how == "position":
        sums = {m: jnp.asarray(loss_weights(batch, m).size, jnp.float32) for m in modalities}
    else:
        sums = {m: jnp.sum(loss_weights(batch, m, config)) for m in modalities}
    if how != "modality":
        total = sum(sums.values(), jnp.zeros((), jnp.float32))
        sums = dict.fromkeys(sums, total)
    return {m: jnp.maximum(weight, 1.0) for m, weight in sums.items()}


def total_loss(sums: Mapping[str, LossSums], normalizers: Mapping[str, Float[Array, ""]],
               config: LossConfig) -> Float[Array, ""]:
    """Returns the sum over modalities of weight * loss / normalizer, float32.

    Args:
        sums: per modality.
        normalizers: per modality, from `normalizers` of the whole batch.
        config: `modality_weights`.

    Raises:
        UserError: `modality_weights` names a modality that is not trained.
    """
    for modality in config.modality_weights:
        one_of(modality, sums, "modality in LossConfig.modality_weights")
    total = jnp.zeros((), jnp.float32)
    for modality, part in sums.items():
        weight = config.modality_weights.get(modality, 1.0)
        total = total + weight * part.loss / normalizers[modality]
    return total
