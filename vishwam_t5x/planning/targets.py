"""Names of hardware, and the devices jax compiles for under each of them.

Google names a slice of TPU v2, v3, v4, v5p or 7x by its TensorCores (two a chip), and one of v5e
or v6e by its chips; libtpu wants the shape of the torus, which may be given too: `tpu-v4:4x4x8`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import psutil

from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.core.hardware import HARDWARE, Hardware
from vishwam_t5x.planning import gpu_description

INSTALL = "pip install 'vishwam_t5x[plan]'"

# Chips of a slice -> its shape.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
         256: (16, 16), 512: (16, 32), 1024: (32, 32)}
_CUBE = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
         256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16)}


_POD_SIDE = {"v2": 16, "v3": 32, "v5e": 16, "v6e": 16}


@dataclasses.dataclass(frozen=True)
class _Generation:
    """One generation of TPUs: what counts in its slices' names, devices of a chip, and chips that
    a slice of one host can have."""

    hardware: str
    shapes: Mapping[int, tuple[int, ...]]
    name_counts_cores: bool
    devices_per_chip: int
    whole_host: int = 4


_TPUS = {
    "v2": _Generation("TPU v2", {n: _FLAT[n] for n in (4, 16, 64, 128, 256)}, True, 2),
    "v3": _Generation("TPU v3", {n: _FLAT[n] for n in (4, 16, 32, 64, 128, 256, 512, 1024)},
                      True, 2),
    "v4": _Generation("TPU v4", _CUBE, True, 1),  # a chip's two cores work as one: "megacore"
    "v5e": _Generation("TPU v5e", {n: s for n, s in _FLAT.items() if n <= 256}, False, 1, 8),
    "v5p": _Generation("TPU v5p", _CUBE, True, 1),
    "v6e": _Generation("TPU v6e", {n: s for n, s in _FLAT.items() if n <= 256}, False, 1, 8),
    "tpu7x": _Generation("TPU 7x", _CUBE, True, 2),
}

EXAMPLES = ("tpu-v3-8", "tpu-v3-32", "tpu-v4-8", "tpu-v4-32", "tpu-v4-128", "tpu-v4-512",
            "tpu-v5e-16", "tpu-v5p-8", "tpu-v6e-8", "tpu7x-8", "gtx1650", "t4", "h200", "h200x2",
            "cpu:8")
MAX_GPUS = 8  # of one node; the network between nodes is not modelled


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to plan for.

    Attributes:
        name: as the user wrote it, in its canonical spelling.
        platform: 'tpu', 'gpu' or 'cpu', as jax calls it.
        num_devices: jax devices.
        hardware: figures of one device; None for a CPU, whose are measured.
        topology: what the compiler calls it: 'v4:2x2x4', '1x1x2', ''.
        hosts: machines that the devices hang on.
    """

    name: str
    platform: str
    num_devices: int
    hardware: Hardware | None
    topology: str
    hosts: int = 1

    @property
    def compute_capability(self) -> str | None:
        """Of an NVIDIA GPU, spelt as jax's devices spell it; with `platform`, all that 'auto'
        precision asks of a device.
        """
        return None if self.hardware is None else self.hardware.compute_capability

    @property
    def preset(self) -> str:
        """The gin file that a run there would take, whether there is one or not."""
        name = re.sub(r"[-:]", "_", self.name)
        if self.platform == "gpu":
            name = "gpu_pair" if self.num_devices == 2 else f"gpu_{self.num_devices}"
        return f"gin/hardware/{name}.gin"

    @property
    def torus(self) -> tuple[int, ...]:
        """Chips along each dimension of a TPU slice; () of anything else."""
        shape = self.topology.partition(":")[2]
        return tuple(int(part) for part in shape.split("x")) if shape else ()

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions of the torus are closed to rings.

        Slices made of whole cubes of 4 x 4 x 4 are; of flat slices, sides as long as the pod's.
        """
        sides = self.torus
        if len(sides) == 3:
            return (all(side % 4 == 0 for side in sides),) * 3
        pod = _POD_SIDE.get(self.topology.partition(":")[0])
        return tuple(side == pod for side in sides)

    @property
    def limit_bytes(self) -> int:
        """Bytes a program may use on one device."""
        if self.hardware is None:
            return psutil.virtual_memory().total // self.num_devices
        if self.platform == "gpu":
            return self.hardware.usable_bytes - gpu_description.CONTEXT_BYTES
        return self.hardware.usable_bytes


def resolve(name: str) -> Target:
    """Returns the target of a name such as 'tpu-v4-32', 'tpu-v4:2x2x4', 'h200x2' or 'cpu:8'.

    Raises:
        UserError: there is none such; the message names the nearest.
    """
    word = name.strip().lower().replace("_", "-").replace("v5litepod", "v5e")  # the cloud's name
    if match := re.fullmatch(r"cpu(?::(\d+))?", word):
        count = int(match[1] or 1)
        if count:
            return Target(f"cpu:{count}", "cpu", count, None, "")
    if match := re.fullmatch(r"(?:tpu-)?(v\d+[ep]?|tpu7x)(?:-(\d+)|:(\d+(?:x\d+)*))", word):
        return _tpu(name, match[1], match[2], match[3])
    kind, count = word, 1
    if (match := re.fullmatch(r"(.+)x(\d+)", kind)) and _gpu(kind) is None:
        kind, count = match[1], int(match[2])
    sizes = [gpu for gpu in gpu_description.GPUS if gpu.startswith(f"{kind}-")]
    if sizes:
        raise UserError(f"there are several kinds of {kind}, of different memory", got=name,
                        fix=f"--target={' or --target='.join(sizes)}")
    if (known := _gpu(kind)) is not None:
        kind = known
        if 1 <= count <= MAX_GPUS:
            hardware = HARDWARE[gpu_description.GPUS[kind].hardware]
            return Target(kind + (f"x{count}" if count > 1 else ""), "gpu", count, hardware,
                          f"1x1x{count}")
        raise UserError(f"a GPU target is one node of 1 to {MAX_GPUS} GPUs", got=name,
                        fix=f"--target={kind}x{MAX_GPUS}")
    gpus = ", ".join(sorted(gpu_description.GPUS))
    raise UserError(
        "unknown target", got=name, fix=(did_you_mean(word, EXAMPLES) + " " if
                                         did_you_mean(word, EXAMPLES) else "")
        + f"e.g. {', '.join(EXAMPLES)}; TPUs {', '.join(_TPUS)}; GPUs {gpus}, with x2 to "
        f"x{MAX_GPUS} for several")


def _gpu(word: str) -> str | None:
    """The GPU that is meant; dashes make no difference."""
    return {gpu.replace("-", ""): gpu for gpu in gpu_description.GPUS}.get(word.replace("-", ""))


def _tpu(name: str, generation: str, size: str | None, shape: str | None) -> Target:
    if generation not in _TPUS:
        raise UserError("unknown generation of TPUs", got=name,
                        fix=f"one of: {', '.join(_TPUS)}, e.g. --target=tpu-v4-32")
    known = _TPUS[generation]
    prefix = "" if generation == "tpu7x" else "tpu-"
    if size is not None:
        per_chip = 2 if known.name_counts_cores else 1
        chips = int(size) // per_chip
        if int(size) % per_chip or chips not in known.shapes:
            names = ", ".join(f"{prefix}{generation}-{n * per_chip}" for n in known.shapes)
            raise UserError(f"there is no slice {generation}-{size}", got=name,
                            fix=f"one of: {names}; or a shape, e.g. {prefix}{generation}:"
                            + "x".join(map(str, known.shapes[16])))
        dims = known.shapes[chips]
        canonical = f"{prefix}{generation}-{size}"
    else:
        assert shape is not None
        dims = tuple(int(part) for part in shape.split("x"))
        rank = len(next(iter(known.shapes.values())))
        if len(dims) != rank or 0 in dims:
            raise UserError(f"the torus of a TPU {generation} has {rank} dimensions", got=name,
                            fix=f"e.g. {prefix}{generation}:"
                            + "x".join(map(str, known.shapes[16])))
        canonical = f"{prefix}{generation}:{shape}"
    chips = math.prod(dims)
    per_host = chips if chips <= known.whole_host else math.prod(_host_bounds(dims))
    return Target(canonical, "tpu", chips * known.devices_per_chip, HARDWARE[known.hardware],
                  f"{generation}:{'x'.join(map(str, dims))}", max(1, chips // per_host))


def _host_bounds(dims: Sequence[int]) -> list[int]:
    """Chips of one host along each dimension: 2 x 2, or the single chip."""
    bounds = [min(2, size) for size in dims[:2]]
    return [*bounds, 1]


def devices(target: Target) -> list[Any]:
    """Returns the target's devices: those of a topology, or forced CPU devices.

    Call in a process with `environment(target)`.

    Raises:
        UserError: the compiler for it is not installed, or does not know the topology.
    """
    if target.platform == "cpu":
        return list(jax.devices("cpu"))
    check_installed(target)
    from jax.experimental import topologies

    try:
        if target.platform == "gpu":
            found = topologies.get_topology_desc(
                platform="cuda", topology=target.topology,
                target_config=gpu_description.target_config(target.name))
        else:
            found = topologies.get_topology_desc(target.topology, "tpu", **_options(target))
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"the compiler refuses the topology of {target.name}",
                        got=str(error).splitlines()[0],
                        fix="try another slice, or a newer compiler: " + INSTALL) from error
    return list(found.devices)


def _options(target: Target) -> dict[str, Any]:
    dims = target.torus
    if len(dims) == 2:
        return {"chips_per_host_bounds": _host_bounds(dims), "num_slices": 1} if 1 in dims else {}
    options = {"chips_per_host_bounds": _host_bounds(dims), "num_slices": 1,
               "wrap": list(target.wraps)}
    return options | ({"chip_config_name": "megacore"} if target.topology.startswith("v4:")
                      else {})


def description(target: Target) -> str:
    """Returns all that the compiler is told of the target."""
    if target.platform == "gpu":
        return target.topology + gpu_description.target_config(target.name)
    return f"{target.topology} {_options(target)}" if target.platform == "tpu" else target.name


def check_installed(target: Target) -> None:
    """Raises `UserError`, with the fix, unless the target's compiler is installed."""
    def absent(*modules: str) -> bool:
        return all(importlib.util.find_spec(module) is None for module in modules)

    if target.platform == "tpu" and absent("libtpu"):
        raise UserError("planning for TPUs needs their compiler, libtpu (Linux on x86)",
                        got="it is not installed", fix=INSTALL)
    if target.platform == "gpu" and absent("jax_cuda12_plugin", "jax_cuda13_plugin"):
        raise UserError("planning for GPUs needs jax's CUDA plugin",
                        got="it is not installed", fix=INSTALL)


def _xla_flags() -> str:
    """XLA_FLAGS, or what is in the file that it may also name."""
    text = os.environ.get("XLA_FLAGS", "").strip()
    if not text or text.startswith("-"):
        return text
    try:
        return pathlib.Path(text).read_text()
    except OSError as error:
        raise UserError("XLA_FLAGS names a file that cannot be read", got=str(error),
                        fix="correct XLA_FLAGS, or unset it") from error


def environment(target: Target) -> dict[str, str]:
    """Returns the environment of a process that compiles for the target; no accelerator is used."""
    flags = [flag for flag in _xla_flags().split()
             if "xla_force_host_platform_device_count" not in flag]
    if target.platform == "cpu":
        flags.append(f"--xla_force_host_platform_device_count={target.num_devices}")
    if target.platform == "gpu":
        flags.append("--xla_gpu_autotune_level=0")  # which would time kernels on the absent GPU
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags),
            "TPU_SKIP_MDS_QUERY": "1",  # else libtpu waits for a cloud's metadata server
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another plan, or a run on this machine's TPU
            "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
