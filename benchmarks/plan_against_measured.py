"""What `vishwam plan` predicts against what a step takes: results/plan_against_measured.jsonl.

usage: python benchmarks/plan_against_measured.py

On a CPU: arguments and temporaries of the planned program against the growth of resident memory,
from before the state exists to the peak of the third step; at most 25 % apart. Where jax has a GPU
that `vishwam plan` knows: the planned bytes against the allocator's peak; at most 10 % apart.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from common import GIN_FILE, ROOT, Figures, environment

SETTINGS = (
    {"BATCH_SIZE": 256, "REMAT": "none", "NUM_MICROBATCHES": 1},
    {"BATCH_SIZE": 256, "REMAT": "full", "NUM_MICROBATCHES": 1},
    {"BATCH_SIZE": 256, "REMAT": "none", "NUM_MICROBATCHES": 4},
    {"BATCH_SIZE": 1024, "REMAT": "minimal", "NUM_MICROBATCHES": 1},
)
ON_CPU, ON_GPU = 0.25, 0.10


def arguments(setting: dict[str, Any]) -> list[str]:
    """Returns the flags of the recipe."""
    return [f"--gin_file={GIN_FILE}", "--gin_bindings=MESH = None",
            *(f"--gin.{name}={value!r}" for name, value in setting.items())]


def planned(setting: dict[str, Any], target: str) -> dict[str, Any]:
    """Returns what `vishwam plan` says."""
    done = subprocess.run([sys.executable, "-m", "vishwam_t5x", "plan", *arguments(setting),
                           f"--target={target}", "--json"], env=environment(), cwd=ROOT,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def _resident(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(setting: dict[str, Any]) -> int:
    """Returns the bytes that three steps take, in this process."""
    import jax
    import numpy as np

    from vishwam_t5x import plan_worker
    from vishwam_t5x.training import compilation

    _, recipe = plan_worker.read(arguments(setting))
    device = jax.devices()[0]
    parts = recipe.parts([device])
    factory = parts.factory()
    shardings = parts.batch_shardings()
    step = parts.compile(factory, shardings)
    compilation.return_freed_memory()
    before = _resident("VmRSS")

    def filled(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError("a state holds no keys")
        return jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding)

    state = jax.tree.map(filled, factory.abstract.on_device())
    batch = jax.tree.map(filled, compilation.abstract_batch(recipe.spec, shardings))
    compilation.return_freed_memory()
    if device.platform == "cpu":
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    if device.platform == "cpu":
        return _resident("VmHWM") - before
    return int(device.memory_stats()["peak_bytes_in_use"])


def _target() -> tuple[str, float]:
    """The target that is this machine's first device, and how far off a plan may be."""
    import jax

    from vishwam_t5x.core import hardware
    from vishwam_t5x.planning.gpu_description import GPUS

    device = jax.devices()[0]
    entry = hardware.lookup(device.device_kind) if device.platform == "gpu" else None
    for name, gpu in GPUS.items():
        if entry is not None and gpu.hardware == entry.name:
            return name, ON_GPU
    os.environ["JAX_PLATFORMS"] = "cpu"
    return "cpu:1", ON_CPU


def main(argv: list[str]) -> None:
    if argv:
        print("BYTES", measure(json.loads(argv[0])))
        return
    target, bar = _target()
    figures = Figures("plan_against_measured")
    for setting in SETTINGS:
        said = planned(setting, target)["bytes"]["total"]
        own = {} if target != "cpu:1" else {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, __file__, json.dumps(setting)], cwd=ROOT, text=True,
                              env={**environment(), **own} if own else {
                                  **environment(), "JAX_PLATFORMS": ""},
                              capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        took = int(done.stdout.split("BYTES")[1])
        name = "_".join(f"{key}_{value}" for key, value in setting.items()).lower()
        figures.add(f"apart_{name}", [abs(said / took - 1)], "share", bar,
                    planned_mb=round(said / 2**20), measured_mb=round(took / 2**20), target=target)
    figures.write()


if __name__ == "__main__":
    main(sys.argv[1:])
