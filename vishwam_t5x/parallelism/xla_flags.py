"""What XLA is told beyond its defaults, by kind of device, and only what this version knows.

Two ways in. Our own settings go with the compilation of the step, where an unknown one is an error
that can be caught: it is dropped with a warning. What the user has in XLA_FLAGS is read once, by
the C++ of jaxlib, which ends the process at a flag it does not know; old guides recommend some that
are gone. So it is tried in another process first, once for each version and text.

The user wins: a setting of ours that is named in XLA_FLAGS or LIBTPU_INIT_ARGS is left to them,
jax_optimization_level to JAX_OPTIMIZATION_LEVEL, and VISHWAM_XLA=off takes all of ours away.
LIBTPU_INIT_ARGS itself is not tried: a second process cannot have the TPU.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from vishwam_t5x.core.errors import UserError

OPTIMIZATION_LEVEL = "jax_optimization_level"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One thing that XLA is told.

    Attributes:
        name: of a compiler option, or `OPTIMIZATION_LEVEL`, which jax has a setting for.
        value: of the type that the option has: XLA does not take 'true' for a truth value.
        reason: why it is not left to the default.
        unasked: kinds of devices, as jax names them, for which the compiler does so by default.
    """

    name: str
    value: bool | str
    reason: str
    unasked: tuple[str, ...] = ()


_FUSION = "xla_tpu_enable_async_collective_fusion"
# Found by compiling with libtpu 0.0.42 for slices of eight devices that are not there: two layers
# with parameters gathered along fsdp come out for a v5e as with all of these, and otherwise without
# any one of them. A v2 or v3 has no asynchronous collective without them; programs for v4, v5p and
# v6e change with each.
_V5E = ("TPU v5 lite", "TPU v5e")
# For several devices only: all of it hides communication behind computation. What one device gains
# from flags is a matter of the model, and XLA's defaults are not second-guessed here. GPUs of all
# generations are told the same.
SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "cpu": (),
    "gpu": (
        Setting(OPTIMIZATION_LEVEL, "O1",
                "turns on the latency-hiding scheduler, pipelined collectives and double-buffered "
                "loops together; their single flags come and go between versions"),
    ),
    "tpu": (
        Setting(_FUSION, True, "runs collectives beside the matmuls they are fused with", _V5E),
        Setting(f"{_FUSION}_fuse_all_gather", True,
                "the same for the gathers of parameters along fsdp", _V5E),
        Setting(f"{_FUSION}_multiple_steps", True, "lets one collective stretch over several "
                "fusions, when one is too short for it", _V5E),
        Setting("xla_tpu_overlap_compute_collective_tc", True,
                "lets the TensorCore compute while a collective is on its way", _V5E),
        Setting("xla_enable_async_all_gather", True,
                "parameters of the next layer are gathered while this one computes", _V5E),
        Setting("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000",
                "gathers a kernel at once, not piece by piece in a loop whose every turn reads and "
                "writes the sum so far: `large` on 64 v4 chips, parameters along fsdp 32, moves "
                "513 GB a step instead of 1,569 and sends 10.2 instead of 13.2, on 16 v5e chips "
                "its step by roofline is 0.56 s instead of 1.28 (compiled, none measured; matmuls "
                "along tensor are no longer taken apart either)"),
        # These two changed neither that program nor one that is parallel over data alone.
        Setting("xla_tpu_enable_data_parallel_all_reduce_opt", True,
                "sums gradients along data while the backward pass goes on"),
        Setting("xla_tpu_data_parallel_opt_different_sized_ops", True,
                "the same where gradients differ in size, as embeddings and kernels do"),
    ),
}
# Read by every version: no need to ask.
_KNOWN = re.compile(r"--xla_(force_host_platform_device_count|backend_optimization_level)=\d+"
                    r"|--xla_dump_to=.+")
_PROBE = "import jax; jax.devices('cpu')"
_PROBE_SECONDS = 120
_UNKNOWN = re.compile(r"Unknown flags? in XLA_FLAGS: *(.+)")
_BAD_VALUE = re.compile(r"Couldn't interpret value .+ for flag [\w-]+")


def settings(platform: str, devices: int, environment: Mapping[str, str] | None = None,
             kind: str = "") -> tuple[Setting, ...]:
    """Returns our settings for a program on so many devices, less those that the user set.

    Args:
        platform: 'cpu', 'gpu' or 'tpu'.
        devices: devices of the program's mesh.
        environment: variables; None: of this process.
        kind: of the devices, as jax names it; "": one that is told everything.
    """
    variables = os.environ if environment is None else environment
    if devices < 2 or variables.get("VISHWAM_XLA", "").lower() == "off":
        return ()
    theirs = {name_of(flag) for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
              for flag in split(variables.get(variable, ""))}
    if "JAX_OPTIMIZATION_LEVEL" in variables:
        theirs.add(OPTIMIZATION_LEVEL)
    return tuple(setting for setting in SETTINGS.get(platform, ())
                 if setting.name not in theirs and kind not in setting.unasked)


def compiler_options(devices: Sequence[Any]) -> dict[str, bool | str]:
    """Returns the options to compile a program for `devices` with, and sets jax's own.

    Each is tried on a program of one addition; what this compiler does not know is left out, with
    a warning.

    Args:
        devices: of the mesh, all of one kind; may be those of an ahead-of-time topology.
    """
    platform = devices[0].platform
    wanted: dict[str, bool | str] = {}
    for setting in settings("gpu" if platform in ("cuda", "rocm") else platform, len(devices),
                            kind=str(getattr(devices[0], "device_kind", ""))):
        if setting.name == OPTIMIZATION_LEVEL:
            _set_optimization_level(str(setting.value))
        else:
            wanted[setting.name] = setting.value
    if not wanted:
        return {}
    import jax

    # A process compiles for its own devices; those of a topology without hardware are nobody's.
    mine = [device for device in devices if device.process_index == jax.process_index()]
    return accepted(wanted, (mine or devices)[0])


def _set_optimization_level(level: str) -> None:
    import jax
    from absl import logging

    try:
        jax.config.update(OPTIMIZATION_LEVEL, level)
    except (AttributeError, ValueError) as error:
        logging.warning("%s=%s is left out: %s", OPTIMIZATION_LEVEL, level, error)


def accepted(options: Mapping[str, bool | str], device: Any) -> dict[str, bool | str]:
    """Returns those of `options` that the compiler for `device` knows; warns of the others."""
    import jax
    import jax.numpy as jnp
    from absl import logging

    where = jax.sharding.SingleDeviceSharding(device)
    lowered = jax.jit(lambda x: x + 1).lower(
        jax.ShapeDtypeStruct((8,), jnp.float32, sharding=where))

    def problem_with(part: Mapping[str, bool | str]) -> str:
        try:
            lowered.compile(compiler_options=dict(part))
        except jax.errors.JaxRuntimeError as error:
            return str(error).splitlines()[0]
        return ""

    if not problem_with(options):
        return dict(options)
    known: dict[str, bool | str] = {}
    for name, value in options.items():
        if problem := problem_with({name: value}):
            logging.warning("%s=%s is left out: %s", name, value, problem)
        else:
            known[name] = value
    return known


def split(flags: str) -> list[str]:
    """Returns the single flags of a variable; none if it names a file, which XLA also allows."""
    try:
        words = shlex.split(flags)
    except ValueError:
        return []
    return words if words and words[0].startswith("--") else []


def name_of(flag: str) -> str:
    """Returns the name of a flag, without dashes and value."""
    return flag.lstrip("-").partition("=")[0]


def mend_environment() -> list[str]:
    """Takes out of XLA_FLAGS what this jaxlib does not know, says so, and returns it.

    To be called before jax is used for anything. Costs nothing where XLA_FLAGS is not set, or holds
    but what every version knows; else a second, once for each version and text.

    Raises:
        UserError: a flag has a value that XLA cannot read.
    """
    flags = split(os.environ.get("XLA_FLAGS", ""))
    if all(map(_KNOWN.fullmatch, flags)):
        return []
    unknown = _remembered(flags)
    if unknown is None:
        unknown = unknown_flags(flags)
        _remember(flags, unknown)
    if unknown:
        kept = [flag for flag in flags if flag not in unknown]
        os.environ["XLA_FLAGS"] = " ".join(kept)
        print(f"vishwam: XLA of jaxlib {_version()} does not know {' '.join(unknown)}, and would "
              "end the process: left out. Take it out of XLA_FLAGS.", file=sys.stderr)
    return unknown


def unknown_flags(flags: Sequence[str]) -> list[str]:
    """Returns those of `flags` that this jaxlib does not know, by trying them elsewhere.

    Raises:
        UserError: one has a value that XLA cannot read.
    """
    unknown: list[str] = []
    while left := [flag for flag in flags if flag not in unknown]:
        environment = {**os.environ, "XLA_FLAGS": " ".join(left), "JAX_PLATFORMS": "cpu"}
        try:
            done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, check=False,
                                  capture_output=True, text=True, timeout=_PROBE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return unknown  # No verdict: as if we had not asked.
        if done.returncode == 0:
            return unknown
        if found := _BAD_VALUE.search(done.stderr):
            raise UserError("XLA_FLAGS has a value that XLA cannot read", got=found[0],
                            fix="correct XLA_FLAGS, or take that flag out")
        named = _UNKNOWN.search(done.stderr)
        # XLA's message shows a flag without the quotes of its value.
        more = [flag for flag in left if named and flag in named[1].split()]
        if not more:
            return unknown  # It fails for another reason, which the run itself will tell.
        unknown += more
    return unknown


def _version() -> str:
    try:
        return importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return "?"


def _verdicts() -> pathlib.Path:
    folder = os.environ.get("VISHWAM_CACHE_DIR", "")
    if not folder or "://" in folder:
        folder = "~/.cache/vishwam_t5x"
    return pathlib.Path(folder).expanduser() / "xla_flags.json"


def _key(flags: Sequence[str]) -> str:
    return f"{_version()} {' '.join(flags)}"


def _read_verdicts() -> dict[str, list[str]]:
    try:
        found = json.loads(_verdicts().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remembered(flags: Sequence[str]) -> list[str] | None:
    found = _read_verdicts().get(_key(flags))
    return found if isinstance(found, list) else None


def _remember(flags: Sequence[str], unknown: list[str]) -> None:
    path = _verdicts()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False,
                                         encoding="utf-8") as file:
            json.dump({**_read_verdicts(), _key(flags): unknown}, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass  # Asked again next time.
