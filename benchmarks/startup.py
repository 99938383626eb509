"""What a start costs: import of the trainer, time to the first step, peak memory of a training run.

usage: python benchmarks/startup.py [--repeats=3]

Real processes, one after the other. The time to the first step runs from before the process is
started to the moment its first metrics reach us, so it includes the interpreter, all imports, the
gin files, the cache on disk, the first batch, compilation, and the step itself. 'Cold' has an empty
compilation cache, 'warm' the one that the cold run left.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import psutil
from common import ROOT, T5X, Figures, environment, gin_arguments, run, write_text_cache

_IMPORT = ("import resource; base = resource.getrusage(resource.RUSAGE_SELF); "
           "import vishwam_t5x.train; used = resource.getrusage(resource.RUSAGE_SELF); "
           "print(used.ru_utime + used.ru_stime - base.ru_utime - base.ru_stime, "
           "used.ru_maxrss / 1024)")


def measure_import(figures: Figures, repeats: int) -> None:
    """Imports `vishwam_t5x.train` in fresh processes."""
    cpu, peak = [], []
    for _ in range(repeats):
        seconds, megabytes = run(["-c", _IMPORT]).output.split()
        cpu.append(float(seconds))
        peak.append(float(megabytes))
    figures.add("import_cpu", cpu, "s", bar=2.5, t5x=T5X["import_cpu_seconds"])
    figures.add("import_peak", peak, "MB", bar=350, t5x=T5X["import_peak_mb"])


def first_step(cache_dir: str, model_dir: str, compiled: str, steps: int
               ) -> tuple[float, float, float, float]:
    """Trains a little.

    Returns:
        Seconds to the first step by the clock and of CPU, CPU seconds of the process, peak MB.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "vishwam_t5x", "train",
         *gin_arguments(cache_dir, model_dir, {"LOG_PERIOD": 1, "TRAIN_STEPS": steps})],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment(JAX_COMPILATION_CACHE_DIR=compiled))
    assert process.stderr is not None
    seconds, cpu_then, said = None, 0.0, ""
    for line in process.stderr:
        said += line
        if seconds is None and line.startswith(f"step 1/{steps}"):
            seconds = time.monotonic() - start
            times = psutil.Process(process.pid).cpu_times()
            cpu_then = times.user + times.system
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or seconds is None:
        raise RuntimeError(f"vishwam train ended with {process.returncode}:\n{said}")
    return seconds, cpu_then, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    figures = Figures("startup")
    measure_import(figures, options.repeats + 2)
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        write_text_cache(place / "cache")
        for number in range(options.repeats):
            compiled = str(place / f"compiled_{number}")
            for kind, found in (("cold", cold), ("warm", warm)):
                found.append(first_step(str(place / "cache"), str(place / f"{kind}_{number}"),
                                        compiled, options.steps))
    t5x = T5X["first_step_seconds"]
    for kind, found, share in (("cold", cold, 0.5), ("warm", warm, 0.25)):
        seconds, cpu_then, cpu, peak = zip(*found, strict=True)
        figures.add(f"first_step_{kind}", seconds, "s", bar=share * t5x, t5x=t5x)
        figures.add(f"first_step_cpu_{kind}", cpu_then, "s")
        figures.add(f"train_{options.steps}_steps_cpu_{kind}", cpu, "s")
        figures.add(f"train_peak_{kind}", peak, "MB", bar=0.5 * T5X["peak_mb"], t5x=T5X["peak_mb"])
    figures.write()


if __name__ == "__main__":
    main()
