"""`TrainState`: the one object that is trained, saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.core import meta
from jax.sharding import Mesh

from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.parallelism import sharding
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.precision.loss_scale import LossScaleState, adopt_config, init_loss_scale
from vishwam_t5x.precision.policy import Policy
from vishwam_t5x.training.stability import StabilityState


class TrainState(struct.PyTreeNode):
    """Everything a run needs to go on exactly where it was.

    The same structure also holds shapes (`StateFactory.abstract`) and shardings.

    Attributes:
        step: int32 [], batches trained on (or skipped) so far.
        params: nested dictionary of parameter arrays.
        opt_state: state of the optax optimizer.
        loss_scale: state of the loss scaler.
        stability: running statistics of the loss.
        position: {'next_example': int64 [], 'carried': int64 [32]} on the host, or None inside a
            compiled step, which has no use for it.
    """

    step: Any
    params: Any
    opt_state: Any
    loss_scale: LossScaleState
    stability: StabilityState
    position: dict[str, np.ndarray] | None = None

    @property
    def data_position(self) -> DataPosition:
        """Where in the data the next batch begins."""
        assert self.position is not None
        return DataPosition.from_arrays(self.position)

    def at(self, position: DataPosition) -> TrainState:
        """Returns the state with its data position set."""
        return self.replace(position=position.to_arrays())

    def on_device(self) -> TrainState:
        """Returns the state without what lives on the host."""
        return self.replace(position=None)


class StateFactory:
    """Shapes, shardings and first values of a `TrainState` on a mesh.

    Attributes:
        abstract: `TrainState` of `ShapeDtypeStruct`s with shardings, position on the host.
        shardings: `TrainState` of `NamedSharding`s, position None.
        logical_axes: {parameter name: logical axis names}.
    """

    def __init__(self, init_params: Callable[[jax.Array], Any],
                 optimizer: optax.GradientTransformation, policy: Policy, mesh: Mesh,
                 rules: LogicalAxisRules) -> None:
        """Works the shapes out without allocating anything.

        Args:
            init_params: key -> parameters, leaves boxed with their logical axes.
            optimizer: optax transformation.
            policy: precision; says how the loss is scaled.
            mesh: devices.
            rules: logical to mesh axes.

        Raises:
            UserError: a dimension does not divide over its mesh axes.
        """
        self._init_params, self._optimizer, self._policy = init_params, optimizer, policy
        self._mesh, self._rules = mesh, rules
        boxed = jax.eval_shape(init_params, jax.random.key(0))
        self.boxed_params = boxed
        abstract = jax.eval_shape(self._create, jax.random.key(0))
        params = sharding.parameter_shardings(boxed, mesh, rules)
        replicated = sharding.replicated(mesh)
        self.shardings = TrainState(
            step=replicated, params=params,
            opt_state=sharding.state_shardings(
                abstract.opt_state, abstract.params, params, mesh),
            loss_scale=jax.tree.map(lambda _: replicated, abstract.loss_scale),
            stability=jax.tree.map(lambda _: replicated, abstract.stability))
        placed = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract, self.shardings)
        self.abstract = placed.at(DataPosition())

    def _create(self, key: jax.Array) -> TrainState:
        return self._start(meta.unbox(self._init_params(key)))

    def _start(self, params: Any) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32), params=params, opt_state=self._optimizer.init(params),
            loss_scale=init_loss_scale(self._policy), stability=StabilityState.create())

    @property
    def mesh(self) -> Mesh:
        """The devices that the state is laid out on."""
        return self._mesh

    def context(self) -> contextlib.AbstractContextManager:
        """The mesh and axis rules, to be entered while tracing."""
        return sharding.partitioning(self._mesh, self._rules)

    def create(self, key: jax.Array) -> TrainState:
        """Initialises a state from `key`, each shard on its own device."""
        with self.context():
            state = jax.jit(self._create, out_shardings=self.shardings)(key)
        return state.at(DataPosition())

    def with_params(self, params: Any) -> TrainState:
        """Starts a run from given parameters (fine-tuning): everything else is fresh."""
        with self.context():
            state = jax.jit(self._start, out_shardings=self.shardings)(params)
        return state.at(DataPosition())

    def adopt(self, state: TrainState) -> TrainState:
        """Returns a restored state under this run's precision: its loss scale may be another."""
        scale = jax.device_put(adopt_config(state.loss_scale, self._policy),
                               self.shardings.loss_scale)
        return state.replace(loss_scale=scale)
