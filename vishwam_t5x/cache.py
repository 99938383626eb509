"""Prepare the examples of a task or mixture once, for fast reading and exact resume.

usage: vishwam cache --task_or_mixture=NAME [--module=MODULE] [--cache_dir=DIR]
       vishwam cache --gin_file=FILE [--gin.NAME=VALUE ...]

--task_or_mixture=NAME   a SeqIO Task or Mixture
--module=A,B             modules or .py files that register it; default: the tasks that come along
--cache_dir=DIR          default: $VISHWAM_CACHE_DIR, or ~/.cache/vishwam_t5x. May be gs://… or s3://…:
                         written here first, below copies/, then copied there
--splits=A,B             default: every split the task has
--sequence_length=inputs:512,targets:114
                         for tasks whose preprocessors ask for the lengths of a row
--overwrite              write again what is there already (after the task has changed)
--json                   print the result, or the mistake, as one JSON object

A cache that was being written when the process was killed is continued. train, evaluate and
inspect run this by themselves when a cache is missing.
"""

from __future__ import annotations

import json
import logging
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from vishwam_t5x import screen
from vishwam_t5x.command_line import CommandLine
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import EXIT_OK, EXIT_USER_ERROR, Resumable, UserError
from vishwam_t5x.data import copies
from vishwam_t5x.data.source import DatasetConfig, default_cache_dir

FLAGS = ("task_or_mixture", "module", "cache_dir", "splits", "sequence_length", "overwrite", "json")


def cache(dataset: DatasetConfig, splits: Sequence[str] = (), overwrite: bool = False) -> dict:
    """Writes the caches of a dataset's tasks; the function that gin files bind.

    Args:
        dataset: names the task or mixture, its module and the directory.
        splits: which splits; none named: every one.
        overwrite: write again what is there already.

    Returns:
        {task: {split: {'num_records': …, 'num_bad': …, 'written': …}}}.

    Raises:
        UserError: an unknown name, module or split, or examples that cannot be cached.
    """
    return _write(dataset.mixture_or_task_name, dataset.modules, dataset.directory, tuple(splits),
                  overwrite, dataset.sequence_length)


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam cache ARGV` and returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    line = CommandLine.split(argv, "cache", FLAGS)
    as_json = "json" in line.flags
    try:
        result = _run(line, argv)
    except UserError as error:
        if not as_json or isinstance(error, Resumable):
            raise
        got = None if error.got is None else str(error.got)
        print(json.dumps({"problem": error.problem, "got": got, "fix": error.fix}))
        return EXIT_USER_ERROR
    print(json.dumps(result) if as_json else _table(result))
    return EXIT_OK


def _run(line: CommandLine, argv: Sequence[str]) -> dict:
    flags = line.flags
    splits = tuple(filter(None, flags.get("splits", "").split(",")))
    if line.files:
        from vishwam_t5x import gin_config

        if clash := {"task_or_mixture", "module", "cache_dir", "sequence_length"} & flags.keys():
            raise UserError(f"--{min(clash)} and --gin_file do not go together",
                            fix="bind MIXTURE_OR_TASK_NAME or DatasetConfig with --gin.NAME=VALUE")
        config = gin_config.parse(argv, "cache", flags=FLAGS)
        given: dict[str, Any] = {"splits": splits} if splits else {}
        given |= {"overwrite": True} if "overwrite" in flags else {}
        return config.call(cache, **given)
    if not flags.get("task_or_mixture"):
        raise UserError("cache which task or mixture?",
                        fix="vishwam cache --task_or_mixture=NAME, or --gin_file=FILE")
    modules = tuple(filter(None, flags.get("module", "").split(",")))
    return _write(flags["task_or_mixture"], modules, flags.get("cache_dir") or default_cache_dir(),
                  splits, "overwrite" in flags, _lengths(flags.get("sequence_length", "")))


def _lengths(text: str) -> dict[str, int] | None:
    """Returns {'inputs': 512, …} of 'inputs:512,…'; None of ''."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, length = part.partition(":")
        if not name or not length.isdigit() or not int(length):
            raise UserError("--sequence_length must give a number of tokens for each feature",
                            got=text, fix="--sequence_length=inputs:512,targets:114")
        found[name] = int(length)
    return found or None


def _write(name: str, modules: Sequence[str], cache_dir: str, splits: Sequence[str],
           overwrite: bool, sequence_length: Mapping[str, int] | None = None) -> dict:
    place, cache_dir = cache_dir, copies.folder_of(cache_dir)
    try:
        pathlib.Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except OSError as error:
        raise UserError("the cache cannot be written", got=f"{cache_dir}: {error.strerror}",
                        fix="CACHE_DIR, --cache_dir or $VISHWAM_CACHE_DIR = a folder that can be "
                            "written") from error
    screen.quiet_tensorflow()
    try:
        # TensorFlow and SeqIO come in here and nowhere else: 15 s.
        from vishwam_t5x.data.tf import cache as tf_cache
    except ModuleNotFoundError as error:
        if error.name not in ("seqio", "tensorflow", "tensorflow_text"):
            raise
        raise UserError(f"writing a cache needs the package {error.name}",
                        fix="pip install 'vishwam_t5x[seqio]'") from error
    if storage.is_remote(place) and not overwrite:  # what is there need not be written again
        for split in splits or copies.SPLITS:
            copies.pull(place, name, split)
    result = tf_cache.cache_task_or_mixture(name, modules, cache_dir, splits, overwrite,
                                            sequence_length)
    if storage.is_remote(place):
        copies.push(place, name, result)
    return result


def _table(result: dict) -> str:
    lines = []
    for task, splits in result.items():
        for split, facts in splits.items():
            bad = f", {facts['num_bad']} left out" if facts["num_bad"] else ""
            done = "written" if facts["written"] else "already there"
            lines.append(f"{task} {split}: {facts['num_records']} records{bad}, {done}")
    return "\n".join(lines)
