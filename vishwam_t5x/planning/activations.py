"""Bytes that a forward pass keeps for the backward pass, from the shapes of the traced program."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import Literal

from vishwam_t5x.objectives import losses
from vishwam_t5x.parallelism.sharding import batch_parts
from vishwam_t5x.training import step
from vishwam_t5x.training.setup import Parts


def kept_bytes(parts: Parts, factory: Any) -> int:
    """Returns the bytes on one device that one microbatch's forward pass keeps.

    Traces the loss and its residuals; parameters themselves are not counted. What XLA then keeps
    differs: it computes cheap results again, and keeps some in another form.

    Args:
        parts: the run.
        factory: `parts.factory()`.
    """
    config = parts.step.loss
    loss = step.model_loss(parts.model, config)
    rows = parts.spec.batch_size // parts.step.num_microbatches
    batch = {name: jax.ShapeDtypeStruct((rows, *feature.shape[1:]), feature.dtype)
             for name, feature in parts.spec.arrays().items()}
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                          factory.abstract.params)

    def residuals(params: Any, batch: Any, key: jax.Array) -> list[jax.Array]:
        normalizers = losses.normalizers(batch, config)

        def total(params: Any) -> jax.Array:
            return losses.total_loss(loss(params, batch, dropout_key=key), normalizers, config)

        _, pullback = jax.vjp(total, params)
        return jax.tree.leaves(pullback)

    with factory.context():
        traced = jax.make_jaxpr(residuals)(params, batch, jax.random.key(0)).jaxpr
    given = set(traced.invars)
    kept = {id(var): var for var in traced.outvars
            if not isinstance(var, Literal) and var not in given}
    by_rows = batch_parts(parts.mesh, parts.rules)
    tensor = parts.mesh.shape.get("tensor", 1)
    total = 0
    for var in kept.values():
        shape = var.aval.shape
        # Along 'tensor' the residual stream is whole; heads, hidden units and logits are split.
        split = tensor if shape and shape[-1] != parts.model.config.emb_dim else 1
        total += math.prod(shape) * var.aval.dtype.itemsize // (by_rows * split)
    return total
