"""T5X's partitioners, as a mesh and rules of ours.

T5X's mesh has the axes 'data' and 'model' (and 'replica' across slices). 'model' is our 'tensor';
'data' is our 'fsdp' where parameters are split over it, and our 'data' where they are not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from vishwam_t5x.compat import refused
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.parallelism.axis_rules import (
    LogicalAxisRules,
    MeshAxes,
)
from vishwam_t5x.parallelism.axis_rules import (
    standard_logical_axis_rules as our_rules,
)
from vishwam_t5x.parallelism.mesh import FILL, MeshConfig

STANDS_FOR = "t5x.partitioning"
Rule = tuple[str, str | Sequence[str] | None]
_BATCH = ("replica", "data", "fsdp")
_AXES = {"model": ("tensor",), "data": ("fsdp",), "replica": ("replica",)}
_WHOLE = ("relpos_buckets", "abspos_buckets", "length", "layers", "stack", "mlp_activations")


def standard_logical_axis_rules(activation_partitioning_dims: int = 1,
                                parameter_partitioning_dims: int = 1,
                                additional_rules: Sequence[Rule] | None = None) -> tuple[Rule, ...]:
    """Returns T5X's rules, on T5X's mesh axes.

    Args:
        activation_partitioning_dims: 1: activations are split by batch; 2: their features over
            'model' as well.
        parameter_partitioning_dims: 1: parameters are split over 'model'; 2: over 'data' as well.
        additional_rules: put behind the others.
    """
    for name, dims in (("activation", activation_partitioning_dims),
                       ("parameter", parameter_partitioning_dims)):
        if dims not in (1, 2):
            raise UserError(f"{name}_partitioning_dims must be 1 or 2", got=dims)
    rules: list[Rule] = [("batch", "data"), ("vocab", "model"), ("mlp", "model"),
                         ("heads", "model"), ("kv", None), ("joined_kv", "model")]
    if activation_partitioning_dims == 2:
        rules.append(("embed", "model"))
    if parameter_partitioning_dims == 2:
        rules.append(("embed", "data"))
    if not any(name == "embed" for name, _ in rules):
        rules.append(("embed", None))
    return (*rules, *((name, None) for name in _WHOLE), *(additional_rules or ()))


@dataclasses.dataclass(frozen=True)
class PjitPartitioner:
    """Where arrays lie.

    Attributes:
        num_partitions: devices of the 'model' axis.
        model_parallel_submesh: the same as a tile (x, y, z, cores) of the torus, which goes before
            num_partitions; jax lays it out.
        params_on_devices: True.
        backend: None.
        ici_mesh_shape: ('replica', 'data', 'model') within a slice.
        dcn_mesh_shape: the same across slices. With both shapes the two settings above mean
            nothing; without `ici_mesh_shape` this one does not. The log says so.
        use_cpu_pjit: False.
        use_shardy_partitioner: jax's own choice, whatever this says.
        logical_axis_rules: which dimension is split over which axis; None: the standard ones.
    """

    num_partitions: int | None = None
    model_parallel_submesh: Sequence[int] | None = None
    params_on_devices: bool = True
    backend: str | None = None
    ici_mesh_shape: Sequence[int] | None = None
    dcn_mesh_shape: Sequence[int] | None = None
    use_cpu_pjit: bool | None = False
    use_shardy_partitioner: bool | None = None
    logical_axis_rules: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.PjitPartitioner", vars(self))
        for name in ("ici_mesh_shape", "dcn_mesh_shape"):
            shape = getattr(self, name)
            if shape is not None and len(shape) != 3:
                raise UserError(f"{name} is ('replica', 'data', 'model')", got=repr(shape))
        given = self._given()
        if self.ici_mesh_shape is not None and self.dcn_mesh_shape is None:
            model = self.ici_mesh_shape[2]
            if given and given != model:
                raise UserError(
                    "ici_mesh_shape and num_partitions or model_parallel_submesh say two things",
                    got=f"'model' of {model} and of {given}",
                    fix="num_partitions = None and model_parallel_submesh = None")
        for why in self._set_aside():
            _say_once(why)

    def _given(self) -> int | None:
        """Devices of 'model' by the settings other than mesh shapes: the tile goes first in T5X."""
        tile = self.model_parallel_submesh
        return math.prod(tile) if tile else self.num_partitions

    def _set_aside(self) -> Iterator[str]:
        """What T5X does nothing with beside the other settings, as a line for the log."""
        if self.ici_mesh_shape is not None and self.dcn_mesh_shape is not None:
            model = self.ici_mesh_shape[2] * self.dcn_mesh_shape[2]
            if self._given() not in (None, model):
                yield (f"'model' is {model}, as ici_mesh_shape and dcn_mesh_shape say: "
                       f"num_partitions = {self.num_partitions} and model_parallel_submesh = "
                       f"{self.model_parallel_submesh} are set aside, as in T5X")
            return
        if self.dcn_mesh_shape is not None:
            yield (f"dcn_mesh_shape = {tuple(self.dcn_mesh_shape)} is set aside, as in T5X: it "
                   "needs ici_mesh_shape too")
        if self.model_parallel_submesh and self.num_partitions not in (None, 0, self._given()):
            yield (f"num_partitions = {self.num_partitions} is set aside, as in T5X: "
                   f"model_parallel_submesh = {tuple(self.model_parallel_submesh)}")

    def _rules(self) -> tuple[Rule, ...]:
        rules = self.logical_axis_rules
        return standard_logical_axis_rules() if rules is None else tuple(map(tuple, rules))

    def mesh(self) -> MeshConfig:
        """Returns the mesh of ours."""
        split = any("data" in _axes(axes) for name, axes in self._rules() if name != "batch")
        if self.ici_mesh_shape is None:
            return MeshConfig(**{"fsdp" if split else "data": FILL}, tensor=self._given() or 1)
        across = tuple(self.dcn_mesh_shape or (1, 1, 1))
        replica, data, model = (inner * outer for inner, outer in
                                zip(self.ici_mesh_shape, across, strict=True))
        return MeshConfig(replica=replica, tensor=model, num_slices=math.prod(across),
                          **({"fsdp": data, "data": 1} if split else {"data": data}))

    def rules(self) -> LogicalAxisRules:
        """Returns the rules of ours; what T5X's do not name is as ours have it.

        Raises:
            UserError: a rule names an axis that there is not, or splits batches otherwise.
        """
        found: list[tuple[str, MeshAxes]] = []
        for name, axes in self._rules():
            if name == "batch":
                if _axes(axes) not in (("data",), ("replica", "data")):
                    raise UserError("rows of a batch lie over all axes but 'model'",
                                    got=f"logical_axis_rules have {(name, axes)!r}",
                                    fix="('batch', 'data') or ('batch', ('replica', 'data'))")
                found.append((name, _BATCH))
                continue
            found.append((name, tuple(sum((_AXES[axis] for axis in _axes(axes)), ())) or None))
            # Of an activation the batch has 'data': only 'model' is left for its features.
            found.append((f"activation_{name}", "tensor" if "model" in _axes(axes) else None))
        return our_rules(additional_rules=found)


class ModelBasedPjitPartitioner(PjitPartitioner):
    """The older name of `PjitPartitioner`."""


@functools.cache  # once: the mesh is asked for more than once
def _say_once(line: str) -> None:
    logging.warning("PjitPartitioner: %s", line)


def _axes(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    for name in names:
        one_of(name, _AXES, "mesh axis of T5X's")
    return names
