"""The device mesh: axes `replica`, `data`, `fsdp`, `tensor`, from a config that fits any machine.

`replica` is the outermost axis and the one that crosses slices (or nodes); `tensor` is the
innermost, between the devices with the fastest links.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.parallelism.axis_rules import MESH_AXES

_logger = logging.getLogger(__name__)

FILL = -1

AnyMesh = Mesh | AbstractMesh  # placement needs the sizes only; a computation needs the devices


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1 on one axis takes all the devices that are left.

    A batch is split over replica x data x fsdp. Parameters and optimizer state are split over
    fsdp x tensor, and whole copies of them are kept along replica and data.

    Attributes:
        replica: copies of the whole arrangement, in devices; the outer axis, across slices.
        data: data-parallel copies within a slice, in devices; None is -1, or 1 where another axis
            fills.
        fsdp: devices that share one copy of the parameters and each work on their own rows.
        tensor: devices that share the heads, hidden units and vocabulary of the same rows.
        num_slices: groups of devices with a slow network between them (TPU slices, GPU nodes); 0
            reads it off the devices. They are laid along replica, then data, then fsdp.
        split_physical_axes: let one mesh axis take part of a physical axis of a TPU's torus, where
            whole ones do not fit.

    Raises:
        UserError: a size that is neither -1 nor positive, or more than one -1.
    """

    replica: int = 1
    data: int | None = None
    fsdp: int = 1
    tensor: int = 1
    num_slices: int = 0
    split_physical_axes: bool = True

    def __post_init__(self) -> None:
        if self.data is None:
            others = (self.replica, self.fsdp, self.tensor)
            object.__setattr__(self, "data", 1 if FILL in others else FILL)
        for axis, size in zip(MESH_AXES, self.sizes, strict=True):
            if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != FILL):
                raise UserError(f"MeshConfig.{axis} is a number of devices, or -1 to fill",
                                got=repr(size), fix=f"MeshConfig.{axis} = 1 leaves the axis out")
        filled = [axis for axis, size in zip(MESH_AXES, self.sizes, strict=True) if size == FILL]
        if len(filled) > 1:
            raise UserError("only one mesh axis can fill the devices that are left (-1)",
                            got=", ".join(f"{axis} = -1" for axis in filled),
                            fix=f"keep {filled[0]} = -1 and give {' and '.join(filled[1:])} a "
                                "number (1 leaves an axis out)")
        if self.num_slices < 0:
            raise UserError("MeshConfig.num_slices counts slices; 0 reads it off the devices",
                            got=self.num_slices, fix="MeshConfig.num_slices = 0")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes as given, in the order of `MESH_AXES`."""
        assert self.data is not None  # filled in by __post_init__
        return self.replica, self.data, self.fsdp, self.tensor

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """Returns the size of each axis for so many devices, their product being `num_devices`.

        Raises:
            UserError: the sizes do not multiply to it; the message names the nearest that do.
        """
        fixed = math.prod(size for size in self.sizes if size != FILL)
        if FILL in self.sizes:
            if num_devices % fixed:
                raise self._does_not_fit(num_devices)
            filled = [num_devices // fixed if size == FILL else size for size in self.sizes]
            return filled[0], filled[1], filled[2], filled[3]
        if fixed != num_devices:
            raise self._does_not_fit(num_devices)
        return self.sizes

    def _does_not_fit(self, num_devices: int) -> UserError:
        wording = " x ".join(f"{axis} {size}" for axis, size in
                             zip(MESH_AXES, self.sizes, strict=True) if size != 1)
        fixes = []
        for shape in _nearest_shapes(self.sizes, num_devices)[:2]:
            changed = [f"{axis} = {new}" for axis, old, new in
                       zip(MESH_AXES, self.sizes, shape, strict=True) if old not in (new, FILL)]
            fixes.append("MeshConfig." + ", ".join(changed))
        return UserError(
            f"the mesh does not fit {num_devices} device{'s' if num_devices != 1 else ''}",
            got=wording or "every axis 1", fix="set " + "; or ".join(fixes))


def _nearest_shapes(sizes: Sequence[int], num_devices: int) -> list[tuple[int, ...]]:
    """Returns the shapes of `num_devices` devices, the one nearest to `sizes` first.

    Distance is the sum of |log(new / old)| over the axes that do not fill; between equals, the one
    that changes fewer axes, then the one that keeps `tensor` small.
    """
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    shapes = [
        (replica, data, fsdp, num_devices // (replica * data * fsdp))
        for replica in divisors for data in divisors for fsdp in divisors
        if num_devices % (replica * data * fsdp) == 0]

    def distance(shape: tuple[int, ...]) -> tuple[float, int, int]:
        pairs = [(new, old) for new, old in zip(shape, sizes, strict=True) if old != FILL]
        logs = sum(abs(math.log(new / old)) for new, old in pairs)
        return round(logs, 6), sum(new != old for new, old in pairs), shape[3]

    return sorted(shapes, key=distance)


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """Returns the divisors of `number` next to `wanted`: the largest below, the smallest above."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    if wanted in divisors:
        return [wanted]
    below = [d for d in divisors if d < wanted][-1:]
    return below + [d for d in divisors if d > wanted][:1]


def default_mesh_config(devices: Sequence[jax.Device] | None = None) -> MeshConfig:
    """Returns the mesh used when none is asked for.

    One device: every axis 1. Several accelerators: all on `fsdp`, which trains the largest model
    and is plain data parallelism in what it computes. Several CPU devices: all on `data`, as they
    share one memory and splitting parameters would only cost copies.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) == 1 or devices[0].platform == "cpu":
        return MeshConfig()
    return MeshConfig(fsdp=FILL)


def make_mesh(config: MeshConfig | None = None,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh (axes `MESH_AXES`, all of type Auto) of the config on the devices.

    On TPUs the axes are laid along the physical torus; elsewhere devices keep jax's order, in which
    those of one process follow each other.

    Args:
        config: sizes; `default_mesh_config` when None.
        devices: devices to use, those of an ahead-of-time topology too; all by default.

    Raises:
        UserError: the sizes do not fit the number of devices or slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    config = default_mesh_config(devices) if config is None else config
    shape = config.shape(len(devices))
    slices = _slices(devices, config.num_slices)
    if len(slices) > 1:
        across, within = _split_over_slices(shape, len(slices))
        arrays = [_arrange(one, within, config.split_physical_axes) for one in slices]
        # A slice is one cell of the outer grid `across`, and a block `within` of the inner one.
        blocks = np.array(arrays, dtype=object).reshape(*across, *within)
        order = [axis for pair in zip(range(4), range(4, 8), strict=True) for axis in pair]
        array = blocks.transpose(order).reshape(shape)
    else:
        array = _arrange(devices, shape, config.split_physical_axes)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def describe_mesh(mesh: AnyMesh) -> str:
    """Returns one line, e.g. "8 x TPU v4: data 2 x fsdp 4"."""
    sizes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    kind = f"x {mesh.devices.flat[0].device_kind}" if isinstance(mesh, Mesh) else "devices"
    return f"{mesh.size} {kind}: {' x '.join(sizes) or 'not split'}"


def _slices(devices: list[jax.Device], num_slices: int) -> list[list[jax.Device]]:
    """Groups devices by slice; with `num_slices` given where they name none, by their order."""
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        index = getattr(device, "slice_index", None)
        groups.setdefault(0 if index is None else index, []).append(device)
    if num_slices and len(groups) == 1 and num_slices > 1:
        if len(devices) % num_slices:
            raise UserError(
                f"{len(devices)} devices cannot form {num_slices} equal slices", got=num_slices,
                fix="MeshConfig.num_slices = "
                    + " or ".join(map(str, nearest_divisors(len(devices), num_slices))))
        size = len(devices) // num_slices
        return [devices[start:start + size] for start in range(0, len(devices), size)]
    if num_slices and num_slices != len(groups):
        raise UserError("MeshConfig.num_slices contradicts the devices", got=num_slices,
                        fix=f"the devices form {len(groups)}: set that, or 0 to read it off")
    sizes = {len(group) for group in groups.values()}
    if len(sizes) > 1:
        raise UserError("slices of different sizes cannot form a mesh",
                        got={index: len(group) for index, group in groups.items()},
                        fix="use slices of one size")
    return [groups[index] for index in sorted(groups)]


def _split_over_slices(shape: tuple[int, ...], num_slices: int
                       ) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Splits each axis size into (parts across slices, part within one); tensor never crosses."""
    across, left = [], num_slices
    for axis, size in zip(MESH_AXES, shape, strict=True):
        part = 1 if axis == "tensor" else math.gcd(size, left)
        across.append(part)
        left //= part
    if left > 1:
        raise UserError(
            f"{num_slices} slices cannot be laid along replica, data and fsdp", got=shape,
            fix=f"MeshConfig.replica = {num_slices}, with the other axes filling one slice")
    return tuple(across), tuple(s // a for s, a in zip(shape, across, strict=True))


def _arrange(devices: list[jax.Device], shape: tuple[int, ...], split_physical_axes: bool
             ) -> np.ndarray:
    """Returns the devices of one slice as an array of `shape`."""
    if devices[0].platform == "tpu" and len(devices) > 1:
        from jax.experimental import mesh_utils

        try:
            return mesh_utils.create_device_mesh(
                shape, devices, allow_split_physical_axes=split_physical_axes)
        except (NotImplementedError, AssertionError, ValueError) as error:
            # Part of a slice has no torus to follow. Slower links, the same numbers.
            _logger.warning("no torus-aware layout for mesh %s, keeping jax's device order: %s",
                            shape, error)
    return np.array(devices, dtype=object).reshape(shape)
