"""What tests share: code run in a process with its own devices and environment."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
_DEVICE_FLAG = "--xla_force_host_platform_device_count"


def environment(devices: int = 1, env: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Returns a copy of this process's environment for a subprocess of a test.

    Args:
        devices: how many CPU devices JAX shall see.
        env: variables to set on top, or to remove where the value is None.
    """
    result = dict(os.environ)
    flags = [flag for flag in result.get("XLA_FLAGS", "").split() if _DEVICE_FLAG not in flag]
    result["XLA_FLAGS"] = " ".join([*flags, f"{_DEVICE_FLAG}={devices}"])
    result["JAX_PLATFORMS"] = "cpu"
    result["TF_CPP_MIN_LOG_LEVEL"] = "2"
    paths = [str(ROOT), *filter(None, result.get("PYTHONPATH", "").split(os.pathsep))]
    result["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    for name, value in (env or {}).items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = value
    return result


def run(arguments: Sequence[str], *, devices: int = 1, env: Mapping[str, str | None] | None = None,
        cwd: str | os.PathLike | None = None, timeout: float = 600
        ) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` and returns the finished process, whatever its exit code."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment(devices, env), cwd=cwd or ROOT,
        capture_output=True, text=True, timeout=timeout, check=False)


def run_python(code: str, devices: int = 1, env: Mapping[str, str | None] | None = None,
               cwd: str | os.PathLike | None = None, timeout: float = 600) -> str:
    """Runs `code` in a new Python with `devices` CPU devices and returns its standard output.

    Raises:
        AssertionError: the code failed; the message holds what it printed.
    """
    code = textwrap.dedent(code) + textwrap.dedent("""
        import os, sys
        if "tensorflow" in sys.modules:  # whose end hangs, one time in ten
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        """)
    done = run(["-c", code], devices=devices, env=env, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, (
        f"exit code {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}")
    return done.stdout


def vishwam(*arguments: str, devices: int = 1, env: Mapping[str, str | None] | None = None,
            cwd: str | os.PathLike | None = None, timeout: float = 600
            ) -> subprocess.CompletedProcess[str]:
    """Runs `vishwam ARGUMENTS` as a user would and returns the finished process."""
    return run(["-m", "vishwam_t5x", *arguments], devices=devices, env=env, cwd=cwd,
               timeout=timeout)
