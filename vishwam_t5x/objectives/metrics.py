"""Training metrics from loss sums: the names of `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from vishwam_t5x.objectives.losses import LossConfig, LossSums, total_loss

PER_MODALITY = ("loss", "z_loss", "accuracy", "weight_sum")


def loss_metrics(sums: Mapping[str, LossSums], normalizers: Mapping[str, Float[Array, ""]],
                 config: LossConfig) -> dict[str, Float[Array, ""]]:
    """Returns float32 scalars by metric name; runs inside or outside `jit`.

    - `loss`: what is minimised (`total_loss`); `z_loss`: the part of it that is z-loss;
    - `loss/<m>`: nats per weighted position, with z-loss; `z_loss/<m>`: that part of it;
    - `accuracy/<m>`: weighted share of positions whose most probable token is the target;
    - `weight_sum/<m>`: sum of the weights (target tokens). If it is 0 the others are 0 too:
      `drop_empty` removes them.

    Args:
        sums: per modality, over the whole batch.
        normalizers: per modality.
        config: of the loss.
    """
    out = {"loss": total_loss(sums, normalizers, config)}
    out["z_loss"] = sum((config.modality_weights.get(m, 1.0) * part.z_loss / normalizers[m]
                         for m, part in sums.items()), jnp.zeros((), jnp.float32))
    for modality, part in sums.items():
        # Weights may be fractions, so a sum below 1 must not be taken for 1.
        weight = jnp.where(part.weight > 0.0, part.weight, 1.0)
        out[f"loss/{modality}"] = part.loss / weight
        out[f"z_loss/{modality}"] = part.z_loss / weight
        out[f"accuracy/{modality}"] = part.correct / weight
        out[f"weight_sum/{modality}"] = part.weight
    return out


def drop_empty(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns host-side metrics without the loss and accuracy of modalities the batch lacked.

    Their `weight_sum/<m>` of 0 stays and says so.
    """
    empty = {name.split("/", 1)[1] for name, value in metrics.items()
             if name.startswith("weight_sum/") and value == 0}
    return {name: value for name, value in metrics.items()
            if name.startswith("weight_sum/") or "/" not in name
            or name.split("/")[0] not in PER_MODALITY or name.split("/", 1)[1] not in empty}
