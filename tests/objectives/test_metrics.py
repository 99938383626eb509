"""Names and values of the loss metrics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vishwam_t5x.objectives.losses import LossConfig, LossSums
from vishwam_t5x.objectives.metrics import drop_empty, loss_metrics


def test_metrics():
    sums = {"text": LossSums(*map(jnp.float32, (12.0, 0.5, 4.0, 1.0))),
            "image": LossSums(*map(jnp.float32, (1.0, 0.1, 0.5, 0.25))),
            "audio": LossSums.zeros()}
    norm = {"text": 4.0, "image": 1.0, "audio": 1.0}
    config = LossConfig(modality_weights={"image": 2.0})
    got = jax.device_get(jax.jit(lambda s: loss_metrics(s, norm, config))(sums))
    want = {"loss": 3.0 + 2.0, "z_loss": 0.125 + 0.2, "loss/text": 3.0, "z_loss/text": 0.125,
            "accuracy/text": 0.25, "weight_sum/text": 4.0, "loss/image": 2.0, "z_loss/image": 0.2,
            "accuracy/image": 0.5, "weight_sum/image": 0.5, "loss/audio": 0.0, "z_loss/audio": 0.0,
            "accuracy/audio": 0.0, "weight_sum/audio": 0.0}
    assert got == pytest.approx(want, rel=1e-6)
    kept = drop_empty({**got, "tokens/audio": 3.0, "seconds_per_step": 0.1})
    assert set(kept) == (set(want) - {"loss/audio", "z_loss/audio", "accuracy/audio"}
                         | {"tokens/audio", "seconds_per_step"})
