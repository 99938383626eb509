"""What a choice would need and cost, from shapes alone: to say what is worth compiling."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism import sharding
from vishwam_t5x.parallelism.axis_rules import MESH_AXES
from vishwam_t5x.planning import activations
from vishwam_t5x.planning.compile import shard_bytes
from vishwam_t5x.planning.figures import Figures
from vishwam_t5x.planning.program import Choice, Recipe
from vishwam_t5x.planning.roofline import RECOMPUTED
from vishwam_t5x.planning.targets import Target

TRAFFIC = 10
"""How often what an unrematerialised forward pass keeps is read or written in a step, all uses of
all arrays counted as if they were of these: 10 to 14 in compiled programs of the base model."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Per device and step.

    Attributes:
        total: bytes on one device.
        seconds: of a step in which nothing overlaps; None for a CPU. For ranking only.
    """

    total: int
    seconds: float | None


class Predictor:
    """Predicts bytes and seconds of choices; corrected by what has been compiled."""

    def __init__(self, recipe: Recipe, target: Target) -> None:
        """Traces the recipe on one device of this process's CPU; allocates nothing.

        Raises:
            UserError: the recipe is not sound.
        """
        self.recipe, self.target = recipe.for_device(target), target
        one = dataclasses.replace(
            self.recipe, mesh=mesh_lib.MeshConfig(),
            step=dataclasses.replace(recipe.step, num_microbatches=1))
        self._parts = one.parts(jax.devices("cpu")[:1])
        self._factory = self._parts.factory()
        state = self._factory.abstract.on_device()
        self.parameters = shard_bytes(state.params)
        self.optimizer = shard_bytes(state) - self.parameters
        self._axes = sharding.logical_axes_by_name(self._factory.boxed_params)
        self._shapes = {name: tuple(leaf.shape)
                        for name, leaf in flatten_names(state.params).items()}
        self._batch = sum(math.prod(feature.shape) * feature.dtype.itemsize
                          for feature in one.spec.arrays().values())
        self._elements = sum(map(math.prod, self._shapes.values()))
        self.correction = 1.0
        self.traffic_correction = 1.0

    def learn(self, choice: Choice, figures: Figures) -> None:
        """Corrects later predictions by what a compiled choice needed."""
        complete = self._complete(choice)
        predicted = self._temporary(complete)
        if figures.bytes.temporary and predicted:
            self.correction = _bounded(figures.bytes.temporary / predicted)
        if figures.traffic_bytes:
            self.traffic_correction = _bounded(figures.traffic_bytes / self._traffic(complete))

    def allowed(self, choice: Choice, batch_size: int | None = None) -> bool:
        """Whether a batch (the recipe's by default), heads and parameters divide over the mesh."""
        mesh, _, microbatches = self._complete(choice)
        if self.recipe.model.config.num_heads % mesh[3]:
            return False  # a head cut in two would be put together again for every product
        abstract = AbstractMesh(mesh, MESH_AXES)
        try:
            sharding.check_batch_size(batch_size or self.recipe.spec.batch_size, abstract,
                                      self.recipe.rules, microbatches)
            sharding.parameter_mesh_axes(self._axes, self._shapes, abstract, self.recipe.rules)
        except UserError:
            return False
        return True

    def predict(self, choice: Choice, *, optimizer_share: float = 1.0,
                activation_share: float = 1.0) -> Prediction:
        """Returns what the choice would need.

        Args:
            choice: what is chosen; the rest as in the recipe.
            optimizer_share: of the optimizer's state that another optimizer would need.
            activation_share: of what is kept for the backward pass, and of the batch, that a
                smaller batch or dtype would need.
        """
        complete = self._complete(choice)
        mesh = dict(zip(MESH_AXES, complete[0], strict=True))
        split = mesh["fsdp"] * mesh["tensor"]
        rows = mesh["replica"] * mesh["data"] * mesh["fsdp"]
        total = ((self.parameters + optimizer_share * self.optimizer) / split
                 + activation_share * self._batch / rows
                 + self.correction * self._temporary(complete, activation_share))
        return Prediction(int(total), self._seconds(mesh, complete))

    def _complete(self, choice: Choice) -> tuple[tuple[int, int, int, int], str, int]:
        mesh = choice.mesh or self.default_mesh()
        return (mesh, choice.remat or self.recipe.model.config.remat_policy,
                choice.microbatches or self.recipe.step.num_microbatches)

    def default_mesh(self) -> tuple[int, int, int, int]:
        """Returns the recipe's mesh on the target's devices.

        Raises:
            UserError: it does not fit them.
        """
        count = self.target.num_devices
        config = self.recipe.mesh or mesh_lib.default_mesh_config([self.target] * count)
        return config.shape(count)

    def _temporary(self, complete: tuple[tuple[int, int, int, int], str, int],
                   activation_share: float = 1.0) -> float:
        mesh, remat, microbatches = complete
        replica, data, fsdp, tensor = mesh
        kept = self._kept(remat) / (replica * data * fsdp * tensor * microbatches)
        gradients = self.parameters / (fsdp * tensor) * (2 if microbatches > 1 else 1)
        return activation_share * kept + gradients

    @functools.cache  # noqa: B019  (a predictor lives as long as the command)
    def _kept(self, remat: str) -> int:
        parts: Any = self._parts
        model = parts.model.clone(config=dataclasses.replace(parts.model.config,
                                                             remat_policy=remat))
        return activations.kept_bytes(dataclasses.replace(parts, model=model), self._factory)

    def _traffic(self, complete: tuple[tuple[int, int, int, int], str, int]) -> float:
        """Bytes that one device reads and writes in a step."""
        (replica, data, fsdp, tensor), remat, microbatches = complete
        again = 1 + RECOMPUTED[remat.partition(":")[0]]
        rows = TRAFFIC * again * self._kept("none") / (replica * data * fsdp * tensor)
        gathered = 3 * again * microbatches * self.parameters / tensor
        return rows + gathered + 3 * (self.parameters + self.optimizer) / (fsdp * tensor)

    def _seconds(self, mesh: dict[str, int],
                 complete: tuple[tuple[int, int, int, int], str, int]) -> float | None:
        _, remat, microbatches = complete
        hardware = self.target.hardware
        if hardware is None:
            return None
        config, spec = self.recipe.model.config, self.recipe.spec
        item = config.policy.compute_dtype.itemsize
        sent = self._elements * item / mesh["tensor"]
        passes = 3 + (remat.partition(":")[0] == "full")
        messages = sent * (1 - 1 / mesh["fsdp"]) * passes * microbatches
        copies = mesh["replica"] * mesh["data"]
        messages += 2 * sent / mesh["fsdp"] * (1 - 1 / copies) * microbatches
        rows = spec.batch_size / (copies * mesh["fsdp"])
        slots = (2 * config.num_encoder_layers * spec.input_length
                 + 3 * config.num_decoder_layers * spec.target_length)
        if config.decoder_only:
            slots = 2 * config.num_decoder_layers * (spec.input_length + spec.target_length)
        messages += 4 * rows * slots * config.emb_dim * item * (1 - 1 / mesh["tensor"])
        compute = self.recipe.flops() * (1 + RECOMPUTED[remat.partition(":")[0]]) / (
            self.target.num_devices * hardware.matmul_peak(config.policy.name))
        memory = self.traffic_correction * self._traffic(complete) / hardware.hbm_bandwidth
        return compute + memory + messages / hardware.link_bandwidth


def _bounded(ratio: float) -> float:
    """So that one odd program does not decide everything."""
    return min(4.0, max(0.25, ratio))
