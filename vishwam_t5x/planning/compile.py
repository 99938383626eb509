"""Compiles a recipe's train step for a target and reads off what it needs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.planning import activations, collectives, hlo, targets, traffic
from vishwam_t5x.planning.figures import Bytes, Cache, Figures
from vishwam_t5x.planning.program import Recipe
from vishwam_t5x.training.setup import Parts

LEAST_EFFORT: dict[str, Any] = {"exec_time_optimization_effort": -1.0}
"""Compiler options that halve a TPU's compile time; bytes stay within a few percent."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_recipe(recipe: Recipe, target: targets.Target, cache: Cache | None = None,
                   quick: bool = False) -> Figures:
    """Returns the figures of the recipe's step on the target, from the cache where it has them.

    Call in a process with `targets.environment(target)`. No parameter is ever allocated.

    Args:
        recipe: what is trained, choices applied.
        target: what for.
        cache: where figures are remembered; None: nowhere.
        quick: compile with `LEAST_EFFORT` besides the options that training uses.

    Raises:
        UserError: recipe and target do not go together, or the compiler refuses the program.
    """
    start = time.monotonic()
    parts = recipe.parts(targets.devices(target))
    factory = parts.factory()
    shardings = parts.batch_shardings()
    lowered, options = parts.lower(factory, shardings)
    if quick and target.platform != "cpu":
        options = {**options, **LEAST_EFFORT}
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    traced = time.monotonic() - start
    devices = parts.mesh.devices
    key = Cache.key(program, targets.description(target), devices.shape,
                    [device.id for device in devices.flat], *_settings(options), *_versions())
    if cache is not None and (found := cache.get(key)) is not None:
        return dataclasses.replace(found, target=target.name, flops=recipe.flops()).judged(target)
    logging.info("traced in %.0f s, compiling for %s", traced, target.name)
    start = time.monotonic()
    try:
        compiled, needed = _compile(lowered, options, target), None
    except jax.errors.JaxRuntimeError as error:
        compiled = None
        needed = out_of_memory_bytes(str(error), sum(state_bytes(parts, factory)))
        if needed is None:
            raise UserError(f"the compiler refuses the program for {target.name}",
                            got=str(error).splitlines()[0][:300],
                            fix="see the message; the recipe may use what this hardware lacks"
                            ) from error
    seconds = time.monotonic() - start
    figures = _figures(parts, factory, target, compiled, needed, program,
                       recipe.flops(), (traced, seconds))
    if cache is not None:
        cache.put(key, figures)
    return figures


def _compile(lowered: Any, options: Mapping[str, Any], target: targets.Target) -> Any:
    """Compiles; a second time without Triton's matmuls where no tiles are found for one.

    A GPU at hand tries tiles out; without it the compiler takes the first guess, and may find that
    impossible (jax issue 34010).
    """
    try:
        return lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        if target.platform != "gpu" or "find output tile sizes" not in str(error):
            raise
        logging.warning("compiling for %s once more, with cuBLAS for every matmul: the compiler "
                        "found no tiles for one", target.name)
        return lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False})


def out_of_memory_bytes(message: str, arguments: int) -> int | None:
    """Returns what a program needs whose compiler ran out of memory, in bytes; None: it did not.

    Args:
        message: of the compiler.
        arguments: bytes of the program's arguments, which some messages leave out. Where the
            message has no figure at all, these are what is returned.
    """
    for pattern, alone in ((r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", True),
                           (r"for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", False)):
        if match := re.search(pattern, message):
            return int(float(match[1]) * _UNITS[match[2]]) + (0 if alone else arguments)
    return arguments if "RESOURCE_EXHAUSTED" in message else None


def shard_bytes(tree: Any) -> int:
    """Returns the bytes of one device's shards of `ShapeDtypeStruct`s that have shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree) if getattr(leaf, "sharding", None) is not None)


def state_bytes(parts: Parts, factory: Any) -> tuple[int, int, int]:
    """Returns one device's bytes of (parameters, the rest of the train state, batch)."""
    state = factory.abstract.on_device()
    parameters = shard_bytes(state.params)
    sharding = next(iter(parts.batch_shardings().values()))
    batch = sum(math.prod(sharding.shard_shape(feature.shape)) * np.dtype(feature.dtype).itemsize
                for feature in parts.spec.arrays().values())
    return parameters, shard_bytes(state) - parameters, batch


def _figures(parts: Parts, factory: Any, target: targets.Target, compiled: Any,
             needed: int | None, program: str, flops: float, seconds: tuple[float, float]
             ) -> Figures:
    parameters, optimizer, batch = state_bytes(parts, factory)
    arguments = parameters + optimizer + batch
    found: tuple[collectives.Collective, ...] = ()
    moved, known = None, True
    if compiled is not None:
        temporary, total = _held(compiled.memory_analysis(), target.platform, arguments)
        module = hlo.parse(compiled.as_text())
        found = tuple(collectives.find(module, dict(parts.mesh.shape),
                                       list(parts.mesh.devices.flat)))
        moved, known = traffic.memory_bytes(module), module.loops_known
    else:
        total = max(needed or 0, arguments)
        temporary = max(0, total - arguments)
    kept = min(activations.kept_bytes(parts, factory), temporary)
    config = parts.model.config
    return Figures(
        target.name, program, compiled is not None, False, 0,
        Bytes(parameters, optimizer, batch, kept, temporary - kept, temporary, total),
        flops, moved, known, found, dict(parts.mesh.shape), config.remat_policy,
        parts.step.num_microbatches, config.policy.name, parts.spec.batch_size, *seconds
    ).judged(target)


def _held(memory: Any, platform: str, arguments: int) -> tuple[int, int]:
    """Bytes that a compiled program asks for besides its arguments, and all it asks for.

    A TPU's compiler adds up temporaries that are never there together: of `large` on a v3-8 they
    were 17 GiB, on a device of 15.5 that holds it, and the peak 14.1 GiB.
    """
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if platform == "tpu" and peak > arguments:
        return peak - arguments, peak
    temporary = memory.temp_size_in_bytes
    return temporary, memory.argument_size_in_bytes + temporary + max(
        0, memory.output_size_in_bytes - memory.alias_size_in_bytes)


def _settings(options: Mapping[str, Any]) -> list[str]:
    """All that the compiler is told besides the program."""
    ours = ("jax_optimization_level", "jax_exec_time_optimization_effort",
            "jax_memory_fitting_effort")
    return [str(sorted(options.items())), os.environ.get("XLA_FLAGS", ""),
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            *(f"{name}={getattr(jax.config, name, '')}" for name in ours)]


def _versions() -> list[str]:
    names = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
