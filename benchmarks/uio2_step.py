"""Train steps of Unified-IO 2's tiny and base, ViT and AST whole: rows packed and not.

usage: python benchmarks/uio2_step.py [--models=tiny,base] [--windows=3] [--rows=2]

float32, Adafactor, layers scanned; rows of 864 / 1,280 tokens of the mixture `text_60` of
`multimodal`. A step costs the same however its rows are packed; the useful tokens in them (the
mean of 600 rows) say how much of it was of use. Tiny is a debug size, but for its ViT and AST,
which are those of all sizes. Base takes one row a step and recomputes in the backward pass, to
need less than 8 GiB.
"""

from __future__ import annotations

import argparse
import math
import resource

from common import ROOT, Figures
from multimodal import PACKINGS, Mix, Steps

from vishwam_t5x import gin_config
from vishwam_t5x.train import train

MIXTURE, VOCABULARY, CODES = "text_60", 33_000, 16_000
ROWS = 600


def steps_of(size: str, rows: int) -> Steps:
    """Compiles the step of a size."""
    remat = "full" if size == "base" else "none"
    config = gin_config.parse(
        [f"--gin_file={ROOT / 'benchmarks/plan_recipe.gin'}",
         f"--gin_file={ROOT / 'gin/models/unified_io2' / size}.gin", "--gin.MODEL_DIR='unused'",
         "--gin.MIXTURE_OR_TASK_NAME='unused'", f"--gin.BATCH_SIZE={rows}",
         "--gin.PRECISION='float32'", f"--gin.REMAT='{remat}'"], "train")
    return Steps(config.arguments(train)["model"], rows)


def measure(figures: Figures, size: str, rows: int, windows: int) -> None:
    """Seconds of a step, and useful tokens a second, the ways to pack taking turns."""
    steps, mix = steps_of(size, rows), Mix(MIXTURE, VOCABULARY, CODES)
    every = {name: mix.rows(name, ROWS, rows) for name in PACKINGS}
    useful = {name: sum(mix.tokens(taken)) / ROWS * rows for name, taken in every.items()}
    costs: list[tuple[float, float]] = []
    rates: dict[str, list[float]] = {name: [] for name in PACKINGS}
    for window in range(windows + 1):
        for name in PACKINGS if window else PACKINGS[:1]:
            taken = every[name][window * rows:(window + 1) * rows]
            cpu, wall, loss = steps.take(mix.batch(taken))
            assert math.isfinite(loss), loss
            if window:  # the first one warms up
                costs.append((cpu, wall))
                rates[name].append(useful[name] / cpu)
    more = {"parameters": steps.num_parameters, "rows": rows}
    figures.add(f"{size}_step_cpu", [cpu for cpu, _ in costs], "s", **more)
    figures.add(f"{size}_step_wall", [wall for _, wall in costs], "s", **more)
    for name in PACKINGS:
        figures.add(f"{size}_{name}_tokens_per_cpu_second", rates[name], "tokens/s",
                    tokens_a_step=round(useful[name]), **more)
    for name in PACKINGS[1:]:
        figures.add(f"{size}_packed_to_{name}_cpu", [
            ours / theirs for ours, theirs in zip(rates["packed"], rates[name], strict=True)],
            "times")
    figures.add(f"{size}_temporaries",
                [steps.compiled.memory_analysis().temp_size_in_bytes / 2**30], "GiB")
    figures.add(f"{size}_peak", [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20],
                "GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tiny,base")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2)
    options = parser.parse_args()
    figures = Figures("uio2_step")
    for size in options.models.split(","):
        measure(figures, size, 1 if size == "base" else options.rows, options.windows)
        figures.write(keep_others=True)


if __name__ == "__main__":
    main()
