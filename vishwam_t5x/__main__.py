"""vishwam: train a multimodal encoder-decoder from one gin line.

usage: vishwam VERB --gin_file=FILE [--gin.NAME=VALUE ...]

  train      train, resume or fine-tune
  evaluate   metrics and predictions of a checkpoint, by task
  infer      predictions for a split of a task or a file of inputs
  forward    logits and loss of a checkpoint on one batch (for porting)
  convert    a checkpoint of T5X, Hugging Face or ours into another layout
  cache      prepare a task's examples once, for fast reading
  plan       compile for absent hardware: does it fit, how long is a step at best
  inspect    show a mixture: rates, lengths, packing, decoded examples
  config     show a configuration, or the difference of two
  doctor     check this machine: versions, devices, paths
  launch     start a run on GPUs, Slurm, TPUs, Kubernetes, SkyPilot, Docker

vishwam VERB --help tells more. Exit codes: 0 done, 2 your mistake (problem, got, fix), 75 stopped
on request and resumable by the same command, 76 ended by what passes (a lost process, a hung step,
a storage that does not answer) and resumable from the last checkpoint, 1 anything else.
"""

from __future__ import annotations

import ast
import atexit
import importlib
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Sequence

from vishwam_t5x.core.errors import (
    BACKGROUND,
    EXIT_ABORTED,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    Preempted,
    Resumable,
    UserError,
    did_you_mean,
)

VERBS = ("train", "evaluate", "infer", "forward", "convert", "cache", "plan", "inspect", "config",
         "doctor", "launch")
# The verbs that read no gin files: their help has no word about them.
_WITHOUT_GIN = ("doctor", "launch")
# The verbs that give XLA something to compile.
_COMPILING = ("train", "evaluate", "infer", "forward", "plan")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; only that verb's module is imported.

    Args:
        argv: the arguments after `vishwam`; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # etils would take TensorFlow for gs:// paths as soon as it is installed (12 s and 650 MB).
    os.environ.setdefault("EPATH_USE_TF", "false")
    code = EXIT_FAILURE
    try:
        code = _run(arguments)
        return code
    finally:
        if argv is None:
            _leave(code)


def _leave(code: int) -> None:
    """Ends the process without waiting for a thread that compiles, perhaps for minutes, for the
    other processes of a run, or for TensorFlow.

    Does nothing if there are none of these: then Python ends as it should.
    """
    distributed = sys.modules.get("vishwam_t5x.core.distributed")
    several = distributed is not None and distributed.is_joined()
    compiling = code != EXIT_OK and any(
        thread.name.startswith(BACKGROUND) for thread in threading.enumerate())
    # With other libraries' threads beside it, one in ten ends of TensorFlow never ended.
    tensorflow = "tensorflow" in sys.modules
    if several or compiling or tensorflow:
        if (error := sys.exc_info()[1]) is not None:
            traceback.print_exception(error)
        if distributed is not None and several:
            distributed.leave(code)
        elif tensorflow:
            atexit._run_exitfuncs()  # temporary folders, logs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except Resumable as error:  # before UserError: a storage that does not answer is both
        text = UserError(error.problem, error.got, error.fix) if isinstance(
            error, UserError) else f"{error}; run the same command to resume"
        print(f"vishwam: {text}", file=sys.stderr)
        return EXIT_ABORTED
    except UserError as error:
        # Built anew: gin hides the parts of an error raised while it calls something.
        print(f"vishwam: {UserError(error.problem, error.got, _advised(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as stop:
        print(f"vishwam: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("vishwam: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell reports it.
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _advised(error: UserError) -> str | None:
    """The fix, with the model file that a checkpoint which does not fit the model would fit."""
    leaves = getattr(error, "checkpoint_leaves", None)
    if not leaves:
        return error.fix
    from vishwam_t5x import presets

    return "\n       ".join(part for part in (presets.advice(leaves), error.fix) if part)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_screen(pathlib.Path(__file__)))
        return EXIT_OK
    if arguments[0] == "--version":
        from vishwam_t5x import __version__
        print(__version__)
        return EXIT_OK
    verb, *rest = arguments
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb!r}", fix=did_you_mean(verb, VERBS)
                        or f"one of: {', '.join(VERBS)}")
    if "-h" in rest or "--help" in rest:
        # The help is the docstring of the verb's file, read without importing it.
        print(_screen(pathlib.Path(__file__).with_name(f"{verb}.py")))
        if verb not in _WITHOUT_GIN:
            from vishwam_t5x.command_line import HELP
            print(f"\n{HELP}")
        return EXIT_OK
    if verb in _COMPILING and "XLA_FLAGS" in os.environ:
        from vishwam_t5x.parallelism import xla_flags
        xla_flags.mend_environment()
    return importlib.import_module(f"vishwam_t5x.{verb}").main(rest)


def _screen(source: pathlib.Path) -> str:
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    sys.exit(main())
