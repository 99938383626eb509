"""The quickstart's compiled train step under other settings; run in processes with many devices."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from vishwam_t5x import gin_config, train
from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.rng import key_for
from vishwam_t5x.data import source
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
from vishwam_t5x.training import setup
from vishwam_t5x.training.step import StepConfig, model_loss

RECIPE = ("--gin_file=gin/recipes/quickstart_cpu.gin", '--gin.MODEL_DIR="unused"',
          "--gin.BATCH_SIZE=16", "--gin.WARMUP_STEPS=1")


@dataclasses.dataclass
class Program:
    """A compiled step, ready to run.

    Attributes:
        parts: what it was made of.
        factory: shapes and first values of its state.
        step: the compiled function.
        batches: two host batches.
        plans: which examples are in their rows.
    """

    parts: setup.Parts
    factory: Any
    step: Any
    batches: list[dict[str, np.ndarray]]
    plans: list[Any]

    def losses(self, steps: int = 2) -> list[float]:
        """Losses of the first steps, then the norm of the parameters."""
        state = self.factory.create(key_for(0, "params")).on_device()
        shardings = self.parts.batch_shardings()
        out, metrics = [], {}
        for batch in self.batches[:steps]:
            state, metrics = self.step(state, jax.device_put(batch, shardings))
            out.append(float(metrics["loss"]))
        return [*out, float(metrics["param_norm"])]

    def loss_sums(self, rows: Any = slice(None)) -> Any:
        """Loss sums of rows of the first batch, at the first parameters."""
        loss = model_loss(self.parts.model, self.parts.step.loss)
        batch = {name: array[rows] for name, array in self.batches[0].items()}
        params = self.factory.create(key_for(0, "params")).params
        return jax.jit(lambda p: loss(p, batch, dropout_key=None))(params)


def build(*gin: str, mesh: dict[str, int] | None = None, devices: int | None = None,
          microbatches: int = 1, pack: bool = True, allow_uneven: str = "error",
          **model: Any) -> Program:
    """Compiles the step of the quickstart with some settings changed."""
    given = gin_config.parse([*RECIPE, *gin], "train").arguments(train.train)
    network = given["model"]
    network = network.clone(config=dataclasses.replace(network.config, **model))
    used = jax.devices()[:devices or (1 if mesh is None else None)]
    config = dataclasses.replace(given["train_dataset_cfg"], pack=pack)
    parts = setup.Parts(
        network, given["optimizer"], make_mesh(MeshConfig(**(mesh or {})), used),
        LogicalAxisRules(allow_uneven=allow_uneven),
        StepConfig(microbatches, given["loss"], given["stability"]),
        source.batch_spec(config, given["objective"]))
    factory = parts.factory()
    step = parts.compile(factory, parts.batch_shardings())
    dataset = source.open_dataset(config, given["objective"])
    position, made = DataPosition(), []
    for _ in range(2):
        made.append(dataset.batches.batch(position))
        position = made[-1].plan.end
    return Program(parts, factory, step, [batch.arrays for batch in made],
                   [batch.plan for batch in made])


_COLLECTIVE = re.compile(
    r"= (\(?[^=]*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\(")
_ARRAY = re.compile(r"(?:f|s|u|bf|pred)(\d*)\[([\d,]*)\]")


def collectives(step: Any) -> dict[str, list[int]]:
    """{kind: bytes of each array that one delivers}, read off the compiled program.

    XLA joins several small ones into one with a tuple of results: each of those counts.
    """
    found: dict[str, list[int]] = {}
    for results, kind in _COLLECTIVE.findall(step.as_text()):
        for bits, dims in _ARRAY.findall(results):
            size = int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
            found.setdefault(kind, []).append(int(bits or 8) // 8 * size)
    return found
