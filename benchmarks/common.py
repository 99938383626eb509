"""What the benchmarks share: the made-up text, the record of a figure, a measured subprocess."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
GIN_FILE = HERE / "t5x_size.gin"
TASK = "benchmark_text"

# Measured on T5X (github.com/google-research/t5x) on 2 shared x86 cores, the same size of model;
# the middle of the range seen.
T5X = {"import_cpu_seconds": 7.0, "import_peak_mb": 1017.0, "first_step_seconds": 23.6,
       "step_cpu_ms": 275.0, "step_wall_ms": 201.0, "peak_mb": 1700.0}


def machine() -> str:
    """Returns the kind of machine, no more than that."""
    return f"{os.cpu_count()} shared {platform.machine()} cores"


class Figures:
    """Collects figures of one benchmark and writes them as JSON lines, replacing older ones."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self._lines: list[dict[str, Any]] = []

    def add(self, figure: str, values: Sequence[float], unit: str, bar: float | None = None,
            **more: Any) -> float:
        """Notes the median of `values` down, prints it and returns it.

        Args:
            figure: its name.
            values: repeated measurements.
            unit: of the values.
            bar: the most it may be; None: no bar.
            **more: further fields of the line.
        """
        median = statistics.median(values)
        line = {"benchmark": self.benchmark, "figure": figure, "value": _rounded(median),
                "unit": unit, "median_of": len(values), "min": _rounded(min(values)),
                "max": _rounded(max(values)), **({} if bar is None else {"at_most": _rounded(bar)}),
                **more, "date": datetime.date.today().isoformat(), "machine": machine(),
                "load": round(os.getloadavg()[0], 1),
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name)
                   for name in ("jax", "flax", "orbax-checkpoint")}}
        self._lines.append(line)
        verdict = "" if bar is None else f"  ({'within' if median <= bar else 'ABOVE'} {bar:.4g})"
        print(f"{figure:44} {median:10.4g} {unit:8} of {len(values)}: {min(values):.4g} to "
              f"{max(values):.4g}{verdict}", flush=True)
        return median

    def write(self, keep_others: bool = False) -> None:
        """Writes results/BENCHMARK.jsonl.

        Args:
            keep_others: keep figures of an earlier run that this one has not measured.
        """
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.benchmark}.jsonl"
        lines = {}
        if keep_others and path.exists():
            lines = {json.loads(line)["figure"]: line for line in path.read_text().splitlines()}
        lines.update((line["figure"], json.dumps(line)) for line in self._lines)
        path.write_text("".join(f"{line}\n" for line in lines.values()))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class Finished(NamedTuple):
    """A subprocess that is done: seconds by the clock and of CPU, peak RSS in MB, its output."""

    wall: float
    cpu: float
    peak_mb: float
    output: str


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of a subprocess: on the CPU, finding this checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths), **more}


def run(arguments: Sequence[str], **more: str) -> Finished:
    """Runs this Python with `arguments`, and `more` in its environment, and measures the process.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, env=environment(**more))
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{output}")
    return Finished(time.monotonic() - start, usage.ru_utime + usage.ru_stime,
                    usage.ru_maxrss / 1024, output)


def write_text_cache(cache_dir: str | os.PathLike) -> None:
    """Writes 4,096 texts of 20 to 120 random bytes as `vishwam cache` would."""
    from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask, write_cache

    text = SyntheticFeature(20, 120, num_ids=259)
    write_cache(SyntheticTask(TASK, {"text": text}, 4096), cache_dir)


def gin_arguments(cache_dir: str | os.PathLike, model_dir: str | os.PathLike,
                  bindings: Mapping[str, Any] | None = None) -> list[str]:
    """Returns the flags of `vishwam train` for the benchmark's model."""
    values = {"CACHE_DIR": str(cache_dir), "MODEL_DIR": str(model_dir), **(bindings or {})}
    return [f"--gin_file={GIN_FILE}", *(f"--gin.{name}={value!r}"
                                        for name, value in values.items())]
