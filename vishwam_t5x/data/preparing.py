"""What `vishwam cache` does for a run, in a process of its own: it alone imports TensorFlow."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import EXIT_ABORTED, EXIT_OK, EXIT_USER_ERROR, Resumable, UserError
from vishwam_t5x.data import conversions, copies, task_code
from vishwam_t5x.data import directory as cache_directory

if TYPE_CHECKING:
    from vishwam_t5x.data.source import DatasetConfig

_logger = logging.getLogger(__name__)


def missing_tasks(config: DatasetConfig) -> list[str]:
    """Returns what of a mixture is not cached: names of tasks, or its own if nothing is known."""
    copies.pull(config.place, config.mixture_or_task_name, config.split)
    rates = cache_directory.read_rates(config.directory, config.mixture_or_task_name)
    if rates is None:
        return [config.mixture_or_task_name]
    return [task for task in rates
            if config.split not in cache_directory.available_splits(config.directory, task)]


def ensure_cached(config: DatasetConfig) -> None:
    """Runs `vishwam cache` in a subprocess for what is missing; does nothing if nothing is.

    Several processes may call it together: `vishwam cache` locks each task.

    Raises:
        UserError: what the subprocess says: an unknown name, a task without this split, ….
        RuntimeError: the subprocess failed otherwise; its own messages are on standard error.
    """
    missing = missing_tasks(config)
    if not missing:
        return
    if storage.is_remote(config.place) and jax.process_count() > 1:
        # Each host would write it in a folder of its own, and they would meet in the bucket.
        raise UserError("the cache in the object store is not complete",
                        got=f"{config.place}: no split '{config.split}' of {', '.join(missing)}",
                        fix="write it first, on one host: vishwam cache --task_or_mixture="
                            f"{config.mixture_or_task_name} --cache_dir={config.place}")
    _logger.info("no cache yet of %s, split %s: writing it to %s", ", ".join(missing),
                 config.split, config.place)
    # Who trains will evaluate: one start of TensorFlow for all splits. The others are smaller.
    command = _command(config, config.place, () if config.split == "train" else (config.split,))
    done = _run(command)
    if done.returncode == EXIT_USER_ERROR:
        raise _mistake(done)
    if done.returncode == EXIT_ABORTED:
        raise Resumable("vishwam cache could not go on: see above")
    if done.returncode != EXIT_OK:
        raise RuntimeError(f"vishwam cache ended with exit code {done.returncode}: see above; the "
                           f"command was {' '.join(command)}")
    if still := missing_tasks(config):
        raise UserError(f"no split '{config.split}' in {', '.join(still)}",
                        got=config.mixture_or_task_name, fix="choose another split")


def check_conversions(config: DatasetConfig, metadatas: Iterable[Mapping[str, Any]]) -> None:
    """Asks whether caches were written with the settings that their tasks have now.

    Only where files of tasks have changed since, and SeqIO is installed: that takes 20 s. Settings
    that come from elsewhere than these files are found out by `vishwam cache` alone.

    Args:
        config: the mixture; all of the split is cached.
        metadatas: of its tasks' manifests.

    Raises:
        UserError: they were not; in other pixels, say, a model would not see what the task shows.
    """
    if any(conversions.METADATA_KEY in metadata and task_code.changed(metadata)
           for metadata in metadatas) and importlib.util.find_spec("seqio") is not None:
        _ask(tuple(_command(config, config.directory, (config.split,))))


@functools.cache
def _ask(command: tuple[str, ...]) -> None:
    _logger.info("asking the changed tasks whether they read files as they did")
    done = _run(command)
    why = "see above"
    if done.returncode == EXIT_USER_ERROR:
        mistake = _mistake(done)
        if conversions.DIFFERS in mistake.problem:
            raise mistake
        why = mistake.problem if mistake.got is None else f"{mistake.problem} ({mistake.got})"
    if done.returncode != EXIT_OK:
        _logger.warning("the changed tasks could not be asked how they read files: %s", why)


def _mistake(done: subprocess.CompletedProcess[str]) -> UserError:
    """What `vishwam cache --json` says that the user did wrong: its last line."""
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return UserError(said["problem"], said["got"], said["fix"])


def _command(config: DatasetConfig, place: str, splits: tuple[str, ...]) -> list[str]:
    command = [sys.executable, "-m", "vishwam_t5x", "cache", "--json",
               f"--task_or_mixture={config.mixture_or_task_name}", f"--cache_dir={place}"]
    command += [f"--splits={','.join(splits)}"] if splits else []
    command += [f"--module={','.join(config.modules)}"] if config.modules else []
    if config.sequence_length:
        command.append("--sequence_length=" + ",".join(
            f"{name}:{length}" for name, length in config.sequence_length.items()))
    return command


def _run(command: Iterable[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(command), stdout=subprocess.PIPE, text=True, check=False,
                          env=_environment())


def _environment() -> dict[str, str]:
    """The subprocess must not take the accelerator, and finds the modules that we find."""
    paths = [path for path in sys.path if path]
    # TensorFlow's XLA ends the process at a flag that only jax's knows.
    kept = {name: value for name, value in os.environ.items()
            if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {**kept, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(paths)}
