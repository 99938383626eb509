"""Loss scaling for float16 over `jmp`, as one pytree that is checkpointed whatever the precision.

The arithmetic is jmp's. Two things about its classes are why they are rebuilt here at each use and
not stored: as pytrees, `DynamicLossScale` forgets its minimum and `StaticLossScale` has no leaves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import jmp
from jaxtyping import Array, Bool, Float, Int

from vishwam_t5x.precision.policy import LossScaleConfig, Policy

_NEVER_CHANGES = -1


@flax.struct.dataclass
class LossScaleState:
    """The loss scale of one run: the same three arrays for every kind, so precision may change.

    Attributes:
        value: f32 scalar the loss is multiplied by.
        good_steps: i32 scalar, finite steps since the scale last changed; -1 if it never does.
        num_skipped: i32 scalar, steps whose gradients were not finite, of any kind of scale.
        config: what the scale does; not an array.
    """

    value: Float[Array, ""]
    good_steps: Int[Array, ""]
    num_skipped: Int[Array, ""]
    config: LossScaleConfig = flax.struct.field(pytree_node=False, default=LossScaleConfig())

    def scale(self, loss: Float[Array, ""]) -> Float[Array, ""]:
        """Returns the loss times the scale, in float32: a float16 loss would overflow."""
        if self.config.kind == "none":
            return loss
        return self._jmp().scale(loss.astype(jnp.float32))

    def unscale(self, grads: Any) -> Any:
        """Returns the gradients divided by the scale, in float32 at least.

        Sum microbatches first, or unscale each: the two are equal. float16 gradients are widened
        before the division, so that what scaling saved from underflow is not lost again.
        """
        if self.config.kind == "none":
            return grads
        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
        return self._jmp().unscale(wide)

    def update(self, finite: Bool[Array, ""]) -> LossScaleState:
        """Returns the state after a step whose gradients were finite, or were not (and it skipped).

        Args:
            finite: bool scalar, `all_finite` of the gradients.
        """
        finite = jnp.asarray(finite)
        skipped = self.num_skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
        if self.config.kind != "dynamic":
            return dataclasses.replace(self, num_skipped=skipped)
        adjusted = self._jmp().adjust(finite)
        return dataclasses.replace(
            self, value=jnp.minimum(adjusted.loss_scale, jnp.float32(self.config.maximum)),
            good_steps=adjusted.counter.astype(jnp.int32), num_skipped=skipped)

    def metrics(self) -> dict[str, jax.Array]:
        """Returns {'loss_scale': f32, 'num_skipped_steps': i32}."""
        return {"loss_scale": self.value, "num_skipped_steps": self.num_skipped}

    def _jmp(self) -> jmp.LossScale:
        if self.config.kind == "static":
            return jmp.StaticLossScale(self.value)
        return jmp.DynamicLossScale(
            self.value, self.good_steps, period=self.config.growth_interval,
            factor=self.config.factor, min_loss_scale=jnp.float32(self.config.minimum))


def init_loss_scale(config: LossScaleConfig | Policy) -> LossScaleState:
    """Returns the state at step 0; the value is 1 where no scale is used."""
    config = config.loss_scale if isinstance(config, Policy) else config
    return LossScaleState(
        value=jnp.float32(1.0 if config.kind == "none" else config.initial),
        good_steps=jnp.int32(0 if config.kind == "dynamic" else _NEVER_CHANGES),
        num_skipped=jnp.int32(0), config=config)


def adopt_config(state: LossScaleState, config: LossScaleConfig | Policy) -> LossScaleState:
    """Returns a restored state under this run's config; a scale of another kind starts anew.

    The count of skipped steps goes on in any case. Not for use under `jax.jit`.

    Args:
        state: state from a checkpoint, perhaps written at another precision.
        config: the loss scale of this run.
    """
    fresh = init_loss_scale(config)
    known = fresh.config
    was_dynamic = int(state.good_steps) != _NEVER_CHANGES
    in_range = known.minimum <= float(state.value) <= known.maximum
    if known.kind == "dynamic" and was_dynamic and in_range:
        return dataclasses.replace(state, config=known)
    return dataclasses.replace(fresh, num_skipped=state.num_skipped)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Returns a bool scalar: no array of the tree has an infinity or a NaN in it."""
    return jmp.all_finite(tree)
