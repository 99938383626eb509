"""One training step as a pure function: microbatches, loss, gradients, verdict, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from vishwam_t5x.core.batch import Batch
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.core.trees import flatten_names, unflatten_names
from vishwam_t5x.objectives import losses
from vishwam_t5x.objectives.metrics import loss_metrics
from vishwam_t5x.precision.loss_scale import LossScaleState
from vishwam_t5x.training.stability import StabilityConfig, judge
from vishwam_t5x.training.state import TrainState

Metrics = dict[str, Any]


class LossFunction(Protocol):
    """Sums of the loss by target modality for one (micro)batch."""

    def __call__(self, params: Any, batch: Batch, *, dropout_key: jax.Array | None
                 ) -> dict[str, losses.LossSums]: ...


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a batch becomes one update.

    Attributes:
        num_microbatches: equal parts the batch is cut into, one after the other, to save memory;
            the result is that of the whole batch.
        loss: z-loss, label smoothing, modality weights and normalisation.
        stability: what counts as a bad step.
        seed: seed of dropout.
        rows_together: rows one after the other that stay in one microbatch, for what they share
            (`BatchSpec.rows_together`).
    """

    num_microbatches: int = 1
    loss: losses.LossConfig = dataclasses.field(default_factory=losses.LossConfig)
    stability: StabilityConfig = dataclasses.field(default_factory=StabilityConfig)
    seed: int = 0
    rows_together: int = 1

    def __post_init__(self) -> None:
        if self.num_microbatches < 1:
            raise UserError("NUM_MICROBATCHES must be at least 1", got=self.num_microbatches)


def split_microbatches(batch: Batch, num_microbatches: int, together: int = 1) -> Batch:
    """Cuts arrays [B, ...] into [k, B/k, ...].

    Row i goes to microbatch i // together % k, so each device keeps the rows it has and nothing
    moves, if it has a multiple of k * together rows.

    Raises:
        UserError: B is no multiple of k * together.
    """
    def split(array: jax.Array) -> jax.Array:
        rows = array.shape[0]
        if rows % (num_microbatches * together):
            raise UserError(
                "a batch cannot be cut into microbatches without cutting rows that share their "
                "frames", got=f"{rows} rows, {num_microbatches} microbatches, {together} share",
                fix="BATCH_SIZE = a multiple of microbatches times budget_rows")
        cut = array.reshape(-1, num_microbatches, together, *array.shape[1:])
        return jnp.moveaxis(cut, 1, 0).reshape(num_microbatches, -1, *array.shape[1:])

    return {name: split(array) for name, array in batch.items()}


def accumulate_gradients(loss_fn: LossFunction, params: Any, batch: Batch, config: StepConfig,
                         scale: Callable[[jax.Array], jax.Array], key: jax.Array,
                         accumulation_dtype: DTypeLike = jnp.float32
                         ) -> tuple[Any, dict[str, losses.LossSums]]:
    """Returns gradients of the whole batch's scaled loss, and its loss sums.

    Normalisers come from the whole batch before it is cut, so the parts simply add up: unlike a
    mean of means, the result does not depend on `num_microbatches`. Gradients are summed in
    `accumulation_dtype` and returned in their own.
    """
    normalizers = losses.normalizers(batch, config.loss)

    def scaled_loss(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        sums = loss_fn(params, part, dropout_key=key)
        return scale(losses.total_loss(sums, normalizers, config.loss)), sums

    gradient = jax.grad(scaled_loss, has_aux=True)
    if config.num_microbatches == 1:
        return gradient(params, batch, key)

    parts = split_microbatches(batch, config.num_microbatches, config.rows_together)
    keys = jax.random.split(key, config.num_microbatches)

    def add(total: Any, part_and_key: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part, part_key = part_and_key
        more = gradient(params, part, part_key)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more), None

    grads, sums = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], parts), key)
    zeros = (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, accumulation_dtype), grads),
             jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums))
    (total, sums), _ = jax.lax.scan(add, zeros, (parts, keys))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, grads), sums


def can_shrink(loss_scale: LossScaleState) -> jax.Array:
    """Whether a smaller loss scale may cure gradients that are not finite (bool [])."""
    if loss_scale.config.kind != "dynamic":
        return jnp.zeros((), bool)
    return loss_scale.value > loss_scale.config.minimum


def model_loss(model: Any, config: losses.LossConfig) -> LossFunction:
    """Returns the loss of a Flax module that has `loss_sums`; dropout acts when given a key."""

    def loss(params: Any, batch: Batch, *, dropout_key: jax.Array | None
             ) -> dict[str, losses.LossSums]:
        return model.apply(
            {"params": params}, batch, config, enable_dropout=dropout_key is not None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            method="loss_sums")

    return loss


def split_frozen(params: Any, frozen: Callable[[str], bool]) -> tuple[Any, dict[str, Any]]:
    """Returns the nested parameters that are trained, and {name: array} of the others."""
    flat = flatten_names(params)
    kept = {name: leaf for name, leaf in flat.items() if frozen(name)}
    if not kept:
        return params, kept
    return unflatten_names({name: leaf for name, leaf in flat.items() if name not in kept}), kept


def join_frozen(trained: Any, kept: dict[str, Any]) -> Any:
    """The inverse of `split_frozen`."""
    return unflatten_names(flatten_names(trained) | kept) if kept else trained


def make_train_step(loss_fn: LossFunction, optimizer: optax.GradientTransformation,
                    config: StepConfig, accumulation_dtype: DTypeLike = jnp.float32,
                    frozen: Callable[[str], bool] = lambda name: False
                    ) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the pure function (state, batch) -> (state, metrics).

    Metrics are scalars: those of `objectives.metrics.loss_metrics`, and `grad_norm`, `param_norm`
    (global L2 norms), `update_applied` (bool), `bad_in_a_row`, `skipped_steps`, `loss_scale`.
    Parameters that are `frozen` (told by '/'-joined name) are constants of the loss: they have no
    gradient, no share in `grad_norm`, and the optimizer's update does not see them.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key_for(config.seed, "dropout"), state.step)
        trained, kept = split_frozen(state.params, frozen)

        def loss_of_trained(params: Any, batch: Batch, *, dropout_key: jax.Array | None
                            ) -> dict[str, losses.LossSums]:
            return loss_fn(join_frozen(params, kept), batch, dropout_key=dropout_key)

        grads, sums = accumulate_gradients(
            loss_of_trained, trained, batch, config, state.loss_scale.scale, key,
            accumulation_dtype)
        grads = state.loss_scale.unscale(grads)
        metrics = loss_metrics(sums, losses.normalizers(batch, config.loss), config.loss)
        loss = metrics["loss"]
        grad_norm = optax.tree.norm(grads)
        grads_finite = jnp.isfinite(grad_norm)
        curable = jnp.isfinite(loss) & can_shrink(state.loss_scale)
        apply, stability = judge(state.stability, config.stability, loss,
                                 grads_finite & jnp.isfinite(loss), curable)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = optax.apply_updates(trained, updates)
        # A select fuses into the update; the old buffers are the donated ones.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(apply, new, old), (params, opt_state),
            (trained, state.opt_state))
        params = join_frozen(params, kept)
        new_state = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, stability=stability,
            loss_scale=state.loss_scale.update(grads_finite))
        metrics |= {"grad_norm": grad_norm, "param_norm": optax.tree.norm(params),
                    "update_applied": apply, "bad_in_a_row": stability.bad_in_a_row,
                    "skipped_steps": stability.skipped_steps,
                    "loss_scale": state.loss_scale.value}
        return new_state, metrics

    return train_step
