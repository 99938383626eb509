"""Compiles in a process of its own: compilers of absent hardware may end the process they run in.
"""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vishwam_t5x.core.errors import UserError

Watch = Callable[[float], None]


def run(module: str, request: Mapping[str, Any], environment: Mapping[str, str],
        watch: Watch | None = None) -> dict[str, Any]:
    """Runs `python -m MODULE REQUEST RESULT`, two JSON files, and returns the result.

    Args:
        module: what to run. It writes {'result': ...}, or {'error': {problem, got, fix}} for a
            mistake of the user.
        request: what to ask of it.
        environment: of the process.
        watch: called about once a second with the seconds since the start.

    Raises:
        UserError: the mistake it reports; or that the compiler broke down, with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="vishwam-plan-") as folder:
        asked, answer = pathlib.Path(folder, "request.json"), pathlib.Path(folder, "result.json")
        said = pathlib.Path(folder, "stderr.txt")
        asked.write_text(json.dumps(request))
        start = time.monotonic()
        with said.open("wb") as errors:
            process = subprocess.Popen([sys.executable, "-m", module, str(asked), str(answer)],
                                       env=dict(environment), stdout=errors, stderr=errors)
            try:
                while True:
                    try:
                        process.wait(1.0 if watch else None)
                        break
                    except subprocess.TimeoutExpired:
                        assert watch is not None
                        watch(time.monotonic() - start)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if answer.exists():
            found = json.loads(answer.read_text())
            if "error" in found:
                raise UserError(**found["error"])
            return found["result"]
        raise broken(process.returncode, said.read_text(errors="replace"))


def broken(code: int, text: str) -> UserError:
    """Returns what to say of a process that ended without an answer."""
    lines = _last_words(text.splitlines())
    if code == -signal.SIGKILL:
        return UserError("the compiler was killed, most likely because this machine ran out of "
                         "memory", got="\n".join(lines) or None,
                         fix="compile a smaller program: "
                             "--gin.config.EncoderDecoderConfig.scan_layers=True, or use a machine "
                             "with more memory")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return UserError(f"the compiler broke down ({how}); this says nothing about whether the run "
                     "would fit", got="\n       ".join(lines) or "it said nothing",
                     fix="try another --target of the same memory, or other compiler versions")


def _last_words(lines: Sequence[str]) -> list[str]:
    """The lines that say why: those of a failed check, or the last ones."""
    wanted = [line for line in lines if "Check failed" in line or line.startswith("F0")]
    return [line.strip()[:300] for line in (wanted[-2:] or [x for x in lines if x.strip()][-4:])]
