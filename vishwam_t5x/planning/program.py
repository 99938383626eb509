"""The train step of a recipe on the devices of a target: the very program `vishwam train` compiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.source import DatasetConfig, batch_spec, cached_features
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism.axis_rules import MESH_AXES, LogicalAxisRules
from vishwam_t5x.precision.policy import policy_by_name
from vishwam_t5x.training import setup
from vishwam_t5x.training.stability import StabilityConfig
from vishwam_t5x.training.step import StepConfig

NEEDED = ("model", "objective", "train_dataset_cfg", "optimizer")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What may be changed about a recipe without changing what it learns; None: as in the recipe.

    Attributes:
        mesh: devices along `MESH_AXES`.
        remat: a policy of `parallelism.remat`.
        microbatches: parts a batch is cut into.
    """

    mesh: tuple[int, int, int, int] | None = None
    remat: str | None = None
    microbatches: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Choice:
        """The inverse of `dataclasses.asdict`, after JSON."""
        shape = values.get("mesh")
        return cls(None if shape is None else tuple(shape), values.get("remat"),
                   values.get("microbatches"))

    def gin_lines(self) -> list[str]:
        """Returns the lines to paste at the end of a recipe."""
        lines = []
        if self.mesh is not None:
            lines += ["from vishwam_t5x.parallelism import mesh", "MESH = @mesh.MeshConfig()"]
            lines += [f"mesh.MeshConfig.{axis} = {size}"
                      for axis, size in zip(MESH_AXES, self.mesh, strict=True)]
        if self.remat is not None:
            lines.append(f"REMAT = {self.remat!r}")
        if self.microbatches is not None:
            lines.append(f"NUM_MICROBATCHES = {self.microbatches}")
        return lines


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The parameters of `vishwam train` that decide the program; as there, but for the dataset.

    Attributes:
        model: Flax module with a `config`.
        optimizer: optimizer configuration.
        spec: shapes of a batch.
        mesh: devices along each axis; None: what suits the devices.
        rules: logical to mesh axes.
        step: microbatches, loss, stability, seed.
    """

    model: Any
    optimizer: Any
    spec: BatchSpec
    mesh: mesh_lib.MeshConfig | None
    rules: LogicalAxisRules
    step: StepConfig

    @classmethod
    def from_arguments(cls, given: Mapping[str, Any]) -> Recipe:
        """Takes what is bound to the parameters of `vishwam_t5x.train.train`.

        Raises:
            UserError: a part is missing, or model and objective do not fit together.
        """
        lacking = [name for name in NEEDED if given.get(name) is None]
        if lacking:
            raise UserError("the recipe does not say everything a training step needs",
                            got=f"nothing bound to train.{', train.'.join(lacking)}",
                            fix="plan what you would give to vishwam train: a recipe that includes "
                                "gin/runs/pretrain.gin")
        dataset: DatasetConfig = given["train_dataset_cfg"]
        spec = batch_spec(dataset, given["objective"], cached_features(dataset),
                          given["model"].config)
        setup.check_modalities(given["model"], given["objective"], spec)
        step = StepConfig(given.get("num_microbatches", 1), given.get("loss", LossConfig()),
                          given.get("stability", StabilityConfig()), given.get("random_seed", 0))
        return cls(given["model"], given["optimizer"], spec, given.get("mesh"),
                   given.get("logical_axis_rules", LogicalAxisRules()), step)

    def with_choice(self, choice: Choice) -> Recipe:
        """Returns the recipe with what was chosen."""
        changed: Recipe = self
        if choice.mesh is not None:
            sizes: dict[str, Any] = dict(zip(MESH_AXES, choice.mesh, strict=True))
            base = self.mesh or mesh_lib.MeshConfig()
            changed = dataclasses.replace(changed, mesh=dataclasses.replace(base, **sizes))
        if choice.remat is not None:
            changed = changed.with_config(remat_policy=choice.remat)
        if choice.microbatches is not None:
            step = dataclasses.replace(changed.step, num_microbatches=choice.microbatches)
            changed = dataclasses.replace(changed, step=step)
        return changed

    def with_config(self, **changes: Any) -> Recipe:
        """Returns the recipe with fields of the model's config changed."""
        config = dataclasses.replace(self.model.config, **changes)
        return dataclasses.replace(self, model=self.model.clone(config=config))

    def for_device(self, device: Any) -> Recipe:
        """Returns the recipe as a run on such a device would read it: 'auto' precision named."""
        if self.model.config.precision == "auto":
            return self.with_config(precision=policy_by_name("auto", device))
        return self

    def parts(self, devices: Sequence[Any]) -> setup.Parts:
        """Returns what `vishwam train` would make of it on these devices.

        Raises:
            UserError: the mesh, the batch or a parameter does not fit the devices.
        """
        recipe = self.for_device(devices[0])
        return setup.Parts(recipe.model, recipe.optimizer, mesh_lib.make_mesh(self.mesh, devices),
                           self.rules, self.step, self.spec)

    def flops(self) -> float:
        """Returns the FLOPs of a step on full rows, all devices together, nothing done twice."""
        encoder, decoder = setup.flops_per_slot(self.model.config, self.spec)
        row = encoder * self.spec.input_length + decoder * self.spec.target_length
        return row * self.spec.batch_size
