"""What a verb writes to the screen while it works: our messages, and little of anybody else's."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys

from absl import logging as absl_logging


def show_messages() -> None:
    """Shows messages from INFO on, one line each with the time, on standard error.

    Of jax warnings only: it says at INFO which accelerators it did not find. Not absl's own
    handler: its first line complains of a flag parser that nobody here runs.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s",
                        datefmt="%H:%M:%S", stream=sys.stderr)
    absl_logging.set_verbosity(absl_logging.INFO)
    for library in ("jax", "jaxlib", "tensorstore", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)


# What TensorFlow 2.21 says on being imported, whatever TF_CPP_MIN_LOG_LEVEL is.
_CHATTER = r"WARNING: All log messages before absl::InitializeLog|[IWE]\d{4} \d\d:\d\d:\d{10}\.\d+ "
_FILTER = """
import re, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
chatter = re.compile(sys.argv[1].encode())
for line in sys.stdin.buffer:
    if not chatter.match(line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


@functools.cache
def quiet_tensorflow() -> None:
    """Keeps TensorFlow's greetings about CUDA and oneDNN off the screen; call before importing it.

    They come from C++, so what this process writes to its file descriptor 2 goes through a filter,
    in a process of its own: a fatal message of C++, which is the last thing that a process says,
    still arrives. Python's own messages take the old way.
    """
    sys.stderr.flush()
    python = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    reader = subprocess.Popen([sys.executable, "-I", "-S", "-c", _FILTER, _CHATTER],
                              stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=python)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    reader.returncode = 0  # It ends with this process, which must not warn that it has not.
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setStream(python)
    sys.stderr = python
