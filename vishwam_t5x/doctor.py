"""Check this machine and this installation, and say what to mend.

usage: vishwam doctor [--json] [--bucket=gs://BUCKET] [--region=REGION]

Reports versions, devices, paths and settings; a line that begins with `!` is a problem and carries
its fix, `~` is advice. Exit code 0 when there is no problem, 2 otherwise. Nothing is changed.
--json prints the same as one JSON object.
--bucket=B    also ask whether B, e.g. the MODEL_DIR of a run, exists, may be written, and lies in
              the accelerator's region. A cache in a bucket is always asked about
--region=R    region or zone of the accelerator; default: that of this machine, in Google Cloud
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vishwam_t5x import gin_files
from vishwam_t5x.command_line import CommandLine
from vishwam_t5x.core import buckets
from vishwam_t5x.core.errors import EXIT_OK, EXIT_USER_ERROR, UserError

OK, ADVICE, PROBLEM = "ok", "advice", "problem"
_MARKS = {OK: " ", ADVICE: "~", PROBLEM: "!"}
_NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore",
           "array-record", "gin-config", "numpy", "jmp", "msgpack", "tensorboardX",
           "safetensors", "sentencepiece", "Pillow", "psutil", "tqdm", "jaxtyping", "typeguard",
           "fsspec")
_OPTIONAL = {"seqio": "seqio", "tensorflow": "seqio", "tensorflow-text": "seqio",
             "scikit-learn": "seqio", "gcsfs": "gcs", "google-cloud-storage": "gcs"}
_START_SECONDS = 180  # A TPU host can take minutes to hand over its chips.
_LOW_DISK_GIB = 10  # Checkpoints of the base model with Adam are 3 GiB each.
# XLA ends the process at a flag it does not know, and a GPU can hang: both are asked elsewhere.
_PROBE = """
import json, sys
import gin
result = {"gin": hasattr(gin, "parse_config"), "gin_path": list(gin.__path__)[0]}
import jax
result["backend"] = jax.default_backend()
result["devices"] = [
    [d.device_kind, (d.memory_stats() or {}).get("bytes_limit", 0)] for d in jax.local_devices()]
result["tensorflow_imported"] = "tensorflow" in sys.modules
print("PROBE" + json.dumps(result))
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        status: "ok", "advice" or "problem".
        fix: what to do, for advice and problems.
    """

    name: str
    value: str
    status: str = OK
    fix: str = ""


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam doctor ARGV` and returns the exit code."""
    line = CommandLine.split(argv, "doctor", ("json", "bucket", "region"))
    found = examine(line.flags.get("bucket"), line.flags.get("region"))
    healthy = all(finding.status != PROBLEM for finding in found)
    if "json" in line.flags:
        print(json.dumps({"healthy": healthy,
                          "findings": [dataclasses.asdict(finding) for finding in found]},
                         indent=1))
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            print(f"{_MARKS[finding.status]} {finding.name:<{width}}  {finding.value}")
            if finding.fix:
                print(f"  {'':<{width}}  fix: {finding.fix}")
        print("healthy" if healthy else "not healthy: mend the lines that begin with !")
    return EXIT_OK if healthy else EXIT_USER_ERROR


def examine(bucket: str | None = None, region: str | None = None) -> list[Finding]:
    """Returns every finding, in the order they are reported.

    Args:
        bucket: gs:// path to ask about, besides that of the cache.
        region: of the accelerator; None: that of this machine, if it is in Google Cloud.
    """
    sections: list[Callable[[], Iterable[Finding]]] = [
        _python, _machine, _versions, _environment, _devices, _paths]
    found = [finding for section in sections for finding in section()]
    paths = [("bucket", bucket), ("cache's bucket", os.environ.get("VISHWAM_CACHE_DIR"))]
    return found + [finding for name, path in paths if path and (
        name == "bucket" or path.startswith("gs://")) for finding in look_at_bucket(
            name, path, region)]


def look_at_bucket(name: str, path: str, region: str | None = None, client: Any = None
                   ) -> list[Finding]:
    """Returns what `core.buckets.check_bucket` finds.

    Args:
        name: of the finding.
        path: gs://BUCKET/…
        region: of the accelerator; None: that of this machine.
        client: as `check_bucket` takes it.
    """
    region = region or buckets.own_region()
    try:
        report = buckets.check_bucket(path, region, client)
    except UserError as error:
        return [Finding(name, f"{path}: {error.problem}", PROBLEM, error.fix or "")]
    place = f"gs://{report.bucket}" + (f" in {report.location}" if report.location else "")
    found = [Finding(name, f"{place}: {what}", PROBLEM, fix) for what, fix in report.problems]
    found += [Finding(name, f"{place}: {what}", ADVICE, fix) for what, fix in report.advice]
    beside = f", accelerator in {buckets.region_of(region)}" if region else \
        ", the accelerator's region is not known (--region)"
    return found or [Finding(name, place + beside)]


def _python() -> Iterable[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding("python", f"{platform.python_version()} at {sys.executable}",
                  PROBLEM if old else OK, "use Python 3.11 or newer" if old else "")


def _machine() -> Iterable[Finding]:
    yield Finding("cpu", f"{_cpu_model()}, {os.cpu_count()} cores")
    if importlib.util.find_spec("psutil") is not None:
        import psutil
        memory = psutil.virtual_memory()
        yield Finding("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} "
                      "GiB free")


def _cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _versions() -> Iterable[Finding]:
    from vishwam_t5x import __version__
    yield Finding("vishwam_t5x", f"{__version__} in {gin_files.PACKAGE}")
    for name in _NEEDED:
        version = _version(name)
        yield Finding(name, version or "not installed", OK if version else PROBLEM,
                      "" if version else f"pip install {name}")
    for name, extra in _OPTIONAL.items():
        version = _version(name)
        yield Finding(name, version or f"not installed (only for the extra {extra})")
    # Looked for, not imported: TensorFlow takes 12 s.
    if importlib.util.find_spec("seqio") and not importlib.util.find_spec("tensorflow_text"):
        yield Finding("seqio without tensorflow-text", "cannot be imported", PROBLEM,
                      "pip install 'vishwam_t5x[seqio]'")
    shadow = pathlib.Path.cwd() / "gin" / "__init__.py"
    if shadow.exists():
        yield Finding("gin/__init__.py", "hides the gin-config package", PROBLEM, f"rm {shadow}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _environment() -> Iterable[Finding]:
    value = os.environ.get("EPATH_USE_TF")
    guarded = value is not None and value.lower() in ("false", "0")
    if importlib.util.find_spec("tensorflow") is None:
        yield Finding("EPATH_USE_TF", f"{value} (no TensorFlow here: no matter)")
    else:
        yield Finding("EPATH_USE_TF", str(value), OK if guarded else ADVICE,
                      "" if guarded else "export EPATH_USE_TF=false, or TensorFlow is loaded for "
                      "every gs:// path")
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "LIBTPU_INIT_ARGS",
                 "VISHWAM_CACHE_DIR"):
        if name in os.environ:
            yield Finding(name, os.environ[name])


def _devices() -> Iterable[Finding]:
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True,
                              timeout=_START_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("devices", f"jax did not start within {_START_SECONDS} s", PROBLEM,
                      "is another process holding the accelerator? JAX_PLATFORMS=cpu tells")
        return
    answer = re.search(r"^PROBE(.+)$", done.stdout, re.MULTILINE)
    if answer is None:
        yield _no_start(done.stderr)
        return
    probe = json.loads(answer[1])
    yield Finding("gin-config", probe["gin_path"], OK if probe["gin"] else PROBLEM,
                  "" if probe["gin"] else "another `gin` hides gin-config; remove it or leave that "
                  "folder")
    kinds: dict[str, int] = {}
    for kind, limit in probe["devices"]:
        label = f"{kind}, {limit / 2**30:.0f} GiB" if limit else kind
        kinds[label] = kinds.get(label, 0) + 1
    yield Finding("devices", f"{probe['backend']}: "
                  + "; ".join(f"{count} x {label}" for label, count in kinds.items()))
    if probe["backend"] == "cpu" and shutil.which("nvidia-smi"):
        yield Finding("gpu", "there is one, and jax does not see it", ADVICE,
                      "pip install 'vishwam_t5x[cuda13]' (or cuda12 for older drivers)")


def _no_start(stderr: str) -> Finding:
    unknown = re.search(r"Unknown flags? in XLA_FLAGS: *(.+)", stderr)
    if unknown:
        return Finding("XLA_FLAGS", f"XLA does not know {unknown[1].strip()}", PROBLEM,
                       "take it out of XLA_FLAGS: XLA ends the process at an unknown flag")
    last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
    return Finding("jax", f"does not start: {last}", PROBLEM,
                   "JAX_PLATFORMS=cpu vishwam doctor tells whether the accelerator is at fault")


def _paths() -> Iterable[Finding]:
    folders = gin_files.search_paths()
    files = gin_files.available(folders)
    yield Finding("gin files", f"{len(files)} in {', '.join(map(str, folders))}",
                  OK if files else PROBLEM, "" if files else "reinstall vishwam_t5x")
    cache = os.environ.get("VISHWAM_CACHE_DIR") or "~/.cache/vishwam_t5x"
    if "://" in cache:
        yield Finding("cache", cache)
        return
    yield _writable(pathlib.Path(cache).expanduser())


def _writable(folder: pathlib.Path) -> Finding:
    # The nearest folder that exists: looking must not create anything.
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding("cache", f"{folder}: {error}", PROBLEM,
                       "export VISHWAM_CACHE_DIR=FOLDER with a folder you can write to")
    free = shutil.disk_usage(existing).free / 2**30
    low = free < _LOW_DISK_GIB
    return Finding("cache", f"{folder}, {free:.0f} GiB free", ADVICE if low else OK,
                   "free some space: checkpoints of the base model are about 3 GiB each"
                   if low else "")
