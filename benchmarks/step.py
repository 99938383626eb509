"""CPU and wall time of a training step, and of making its batch.

usage: python benchmarks/step.py [--windows=8] [--calls=20]

The compiled step of `vishwam train`, called on its own batches, which are packed and copied before
the clock starts; then the making of batches alone: planning, reading, corrupting and laying out.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

from common import T5X, Figures, write_text_cache
from workload import Workload, milliseconds

from vishwam_t5x.core.batch import DataPosition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calls", type=int, default=20)
    options = parser.parse_args()
    figures = Figures("step")
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder) / "cache"
        write_text_cache(cache)
        # T5 1.1, which T5X was measured with, has no norm of queries and keys; our default has.
        arms = {name: Workload.create(cache, {"config.EncoderDecoderConfig.qk_norm": norm})
                for name, norm in (("", False), ("_qk_norm", True))}
        work = arms[""]
        position, hosts = DataPosition(), []

        def make_batch() -> None:
            nonlocal position
            host = work.batches.batch(position, range(work.batches.spec.batch_size))
            assert host is not None
            position = host.plan.end
            hosts.append(host)

        loading = [milliseconds(make_batch, options.calls) for _ in range(options.windows)]
        batches = [work.on_device(host.arrays) for host in hosts[:options.calls]]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for window in range(options.windows + 1):
            for name, arm in arms.items():
                turn = iter(batches)
                taken = milliseconds(lambda arm=arm, turn=turn: arm.step(next(turn)), len(batches))
                if window:  # the first one warms up
                    found[name].append(taken)
        tokens = sum(host.plan.target_slots for host in hosts) / len(hosts)
    for name, taken in found.items():
        cpu, wall = zip(*taken, strict=True)
        same = not name
        figures.add(f"step_cpu{name}", cpu, "ms", bar=0.6 * T5X["step_cpu_ms"] if same else None,
                    calls=options.calls, **({"t5x": T5X["step_cpu_ms"]} if same else {}))
        figures.add(f"step_wall{name}", wall, "ms", calls=options.calls,
                    **({"t5x": T5X["step_wall_ms"]} if same else {}))
    cpu, _ = zip(*loading, strict=True)
    figures.add("batch_cpu", cpu, "ms", calls=options.calls)
    figures.add("target_tokens_per_step", [tokens], "tokens")
    figures.write()


if __name__ == "__main__":
    main()
