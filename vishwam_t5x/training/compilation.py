"""Compiling the step once, ahead of the first batch, and remembering it across processes."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.parallelism import xla_flags
from vishwam_t5x.parallelism.sharding import current_platform
from vishwam_t5x.training.state import StateFactory

DEFAULT_CACHE = "~/.cache/vishwam_t5x/compilation"


def enable_compilation_cache(directory: str | None = None) -> str | None:
    """Turns jax's persistent compilation cache on and returns its folder.

    Args:
        directory: where; None: JAX_COMPILATION_CACHE_DIR or `DEFAULT_CACHE`; '' turns it off.
    """
    if directory is None:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT_CACHE)
    if not directory:
        return None
    path = pathlib.Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("no compilation cache: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs too: a debugging run is all small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return str(path)


def abstract_batch(spec: BatchSpec, shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `ShapeDtypeStruct` with its sharding for every array of a batch."""
    return {name: jax.ShapeDtypeStruct(feature.shape, feature.dtype, sharding=shardings[name])
            for name, feature in spec.arrays().items()}


def lower_step(step: Callable[..., Any], factory: StateFactory, batch: Mapping[str, Any]
               ) -> jax.stages.Lowered:
    """Traces (state, batch) -> (state, metrics), with the state donated and its layout pinned.

    Unpinned, the second step would see a state laid out as the compiler liked and compile again.
    The devices of the factory's mesh may be those of an ahead-of-time topology.
    """
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(factory.shardings, None))
    with factory.context():
        traced = jitted.trace(factory.abstract.on_device(), dict(batch))
        # The devices of a CUDA topology say 'gpu', and jax knows no lowering of that name.
        is_cuda = current_platform() == "gpu" and jax.default_backend() != "gpu"
        return traced.lower(lowering_platforms=("cuda",) if is_cuda else None)


def lower_with_options(step: Callable[..., Any], factory: StateFactory, batch: Mapping[str, Any]
                       ) -> tuple[jax.stages.Lowered, dict[str, bool | str]]:
    """Returns what `lower_step` does, and the options of `parallelism.xla_flags` to compile with.

    Training and planning both start here, so that they compile the same program the same way.
    """
    # First: some are read while the step is traced and lowered.
    options = xla_flags.compiler_options(list(factory.mesh.devices.flat))
    return lower_step(step, factory, batch), options


def compile_step(step: Callable[..., Any], factory: StateFactory, batch: Mapping[str, Any]) -> Any:
    """Compiles what `lower_with_options` returns."""
    lowered, options = lower_with_options(step, factory, batch)
    compiled = lowered.compile(compiler_options=options or None)
    return_freed_memory()
    return compiled


def return_freed_memory() -> None:
    """Hands memory that was freed, but kept for later, back to the operating system.

    Compiling leaves hundreds of MB of it that training will not use again: 611 MB became 388 for a
    model of a million parameters, in 0.05 s. Does nothing where the C library cannot (it is glibc's
    malloc_trim).
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
