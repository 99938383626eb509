"""Who runs gin files of T5X's where T5X itself is installed: we, or it."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from absl import logging

from vishwam_t5x.compat.names import CHOICES
from vishwam_t5x.core.errors import UserError, one_of

VARIABLE = "VISHWAM_T5X"
"""Environment variable that chooses where --t5x does not: 'compat' or 'installed'."""

_SCRIPTS = {"train": "t5x.train", "evaluate": "t5x.eval", "infer": "t5x.infer"}


def choose(line: Any, verb: str, theirs: bool) -> None:
    """Says who runs the files; if T5X shall, it does, in the place of this process.

    Args:
        line: the `CommandLine`.
        verb: of the command line.
        theirs: whether any of the files is T5X's; others are always run by us.

    Raises:
        UserError: T5X is wanted and not installed, or has no such verb; or --t5x chooses where
            there is nothing to choose.
    """
    if not theirs:
        if line.t5x:
            raise UserError("none of these gin files is T5X's: there is nothing to choose",
                            got=f"--t5x={line.t5x}, and no import of t5x or __main__ in "
                                f"{', '.join(line.files) or 'no file'} or what they include",
                            fix="leave --t5x out")
        return
    choice = line.t5x or one_of(os.environ.get(VARIABLE) or "compat", CHOICES,
                                f"value of ${VARIABLE}")
    spec = importlib.util.find_spec("t5x")
    if choice == "compat":
        if spec is not None:
            logging.info("T5X is installed (%s): its gin files are run by vishwam_t5x all the "
                         "same; --t5x=installed lets T5X run them", spec.origin)
        return
    how = "--t5x=installed" if line.t5x else f"${VARIABLE}=installed"
    if spec is None:
        raise UserError("T5X is not installed", got=how,
                        fix="leave it out: vishwam_t5x runs T5X's gin files itself")
    if verb not in _SCRIPTS:
        raise UserError(f"T5X has no script for vishwam {verb}", got=how,
                        fix="train, evaluate or infer")
    command = _command(line, verb)
    logging.info("T5X itself (%s) runs its gin files: %s", spec.origin, " ".join(command))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def _command(line: Any, verb: str) -> list[str]:
    if line.flags or line.positional:
        given = [f"--{name}" for name in line.flags] + line.positional
        raise UserError(f"T5X's script has no place for flags of vishwam {verb}",
                        got=", ".join(given), fix="leave them out, or --t5x=compat")
    command = [sys.executable, "-m", _SCRIPTS[verb]]
    command += [f"--gin_file={name}" for name in line.files]
    command += [f"--gin.{left.strip()}={right.strip()}" for left, _, right in
                (statement.partition("=") for _, statement in line.bindings)]
    if line.search_paths:
        command.append(f"--gin_search_paths={','.join(line.search_paths)}")
    return command
