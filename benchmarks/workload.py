"""The benchmark's model, train step and data in this process, and how a call is measured."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from common import gin_arguments

from vishwam_t5x import gin_config
from vishwam_t5x.data import source
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.train import train
from vishwam_t5x.training import setup, step


@dataclasses.dataclass
class Workload:
    """What `vishwam train` would run: its parts, compiled step, first state and open dataset."""

    parts: setup.Parts
    state: Any
    compiled: Any
    dataset: source.Dataset

    @classmethod
    def create(cls, cache_dir: str | os.PathLike, bindings: Mapping[str, Any] | None = None
               ) -> Workload:
        """Builds it from t5x_size.gin and further bindings."""
        config = gin_config.parse(gin_arguments(cache_dir, "unused", bindings), "train")
        bound = config.arguments(train)
        data, objective = bound["train_dataset_cfg"], bound["objective"]
        parts = setup.Parts(
            bound["model"], bound["optimizer"], mesh_lib.make_mesh(bound["mesh"]),
            LogicalAxisRules(),
            step.StepConfig(loss=bound["loss"], stability=bound["stability"]),
            source.batch_spec(data, objective, model=bound["model"].config))
        factory = parts.factory()
        return cls(parts, factory.create(jax.random.key(0)),
                   parts.compile(factory, parts.batch_shardings()),
                   source.open_dataset(data, objective, model=bound["model"].config))

    @property
    def batches(self) -> PackedBatches:
        """Batches by position, on the host."""
        return self.dataset.batches

    def on_device(self, host: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Puts the arrays of a batch where the step wants them."""
        return jax.device_put(dict(host), self.parts.batch_shardings())

    def step(self, arrays: Mapping[str, jax.Array]) -> None:
        """Takes one step and waits for it."""
        state, metrics = self.compiled(self.state.on_device(), arrays)
        self.state = state.replace(position=self.state.position)
        jax.block_until_ready((state, metrics))


def milliseconds(function: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Returns (CPU, wall) milliseconds per call, all threads of this process counted."""
    cpu, wall = time.process_time(), time.monotonic()
    for _ in range(calls):
        function()
    return ((time.process_time() - cpu) * 1e3 / calls, (time.monotonic() - wall) * 1e3 / calls)
