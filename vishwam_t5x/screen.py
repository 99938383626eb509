"""What a verb writes to the screen while it works: our messages, and little of anybody else's."""

from __future__ import annotations

import logging
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
