"""Writes the clean examples of SeqIO Tasks to ArrayRecord: what `vishwam cache` does.

tf.data preprocesses on all cores. A Task whose source lists several shards is written in as many
parts, several at a time; others are one part. What an interrupted run finished is kept.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import inspect
import logging
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import conversions, records, records_writer, task_code
from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data.source import CACHE_DIR_VARIABLE, LENGTHS_KEY
from vishwam_t5x.data.tf import examples

MAX_PARTS = 1024
MAX_BAD_FRACTION = 0.1
"""Share of unusable examples, among those seen and at least 1,000, beyond which to stop."""
MIN_EXAMPLES_FOR_FRACTION = 1000
SECONDS_BETWEEN_LINES = 10.0

_logger = logging.getLogger(__name__)


def cache_task_or_mixture(name: str, modules: Sequence[str], cache_dir: str,
                          splits: Sequence[str] = (), overwrite: bool = False,
                          sequence_length: Mapping[str, int] | None = None
                          ) -> dict[str, dict[str, dict[str, Any]]]:
    """Caches a Task, or every Task of a Mixture and the Mixture's rates.

    Args:
        name: of a SeqIO Task or Mixture.
        modules: that register it; none: those that come with vishwam_t5x.
        cache_dir: where to write.
        splits: which; none: all that each Task has.
        overwrite: write again what is there.
        sequence_length: what preprocessors that ask for the lengths of a row, or would heed them,
            are told; the cache is then good for these lengths alone, and its manifest says so.

    Returns:
        {task: {split: {'num_records', 'num_bad', 'written'}}}.

    Raises:
        UserError: unknown names, examples that cannot be cached, or too many bad ones; or what is
            there was converted with other settings than the Task has now.
    """
    tf.config.set_visible_devices([], "GPU")  # preprocessing must not take the trainer's memory
    # Tasks keep what they fit to their data (vocabularies, codebooks) beside their caches.
    os.environ[CACHE_DIR_VARIABLE] = str(cache_dir)
    loaded = examples.import_task_modules(modules)
    rates = examples.task_rates(name, cache_dir)
    code = {task_code.METADATA_KEY: task_code.digests(loaded)}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for task_name in rates:
        task = seqio.TaskRegistry.get(task_name)
        for split in splits:
            if split not in task.splits:
                raise UserError(f"task '{task_name}' has no split '{split}'", got=split,
                                fix="its splits: " + ", ".join(task.splits))
    for task_name in rates:
        task = seqio.TaskRegistry.get(task_name)
        result[task_name] = {}
        lengths = _lengths_wanted(task, sequence_length)
        for split in splits or task.splits:
            metadata = {**examples.task_metadata(loaded, task_name), **code}
            if lengths is not None:
                metadata[LENGTHS_KEY] = lengths
            result[task_name][split] = _cache_split(task, split, cache_dir, metadata, overwrite)
    if name in seqio.MixtureRegistry.names():
        records_writer.write_mixture(cache_dir, name, rates)
    return result


def _lengths_wanted(task: seqio.Task, given: Mapping[str, int] | None) -> dict[str, int] | None:
    """Returns the lengths that the cache is made for, {} where its preprocessors would heed some
    and are given none; None if they are told of none, so that it serves all lengths."""
    told = _told_of_lengths(task)
    if not told:
        return None
    if given:
        _logger.warning(
            "%s: its preprocessors make examples for rows of %s: the cache serves these lengths "
            "alone, and what they draw at random is the same in every epoch", task.name,
            ", ".join(f"{name} {length}" for name, length in given.items()))
    else:
        _logger.warning(
            "%s: %s may heed the lengths of a row and is given none: DatasetConfig.sequence_length "
            "gives them", task.name, ", ".join(told))
    return dict(given or {})


def _told_of_lengths(task: seqio.Task) -> list[str]:
    """Names the preprocessors that SeqIO tells the lengths of a row, needed or not."""
    names = []
    for step in task.preprocessors:
        inner = step.func if isinstance(step, functools.partial) else step
        bound = isinstance(step, functools.partial) and "sequence_length" in step.keywords
        # Of this one only the cut depends on them, and a row makes the same cut: it keeps the end.
        if bound or inner is seqio.preprocessors.append_eos_after_trim:
            continue
        parameters = ([field.name for field in dataclasses.fields(step)]
                      if dataclasses.is_dataclass(step) else inspect.signature(step).parameters)
        if "sequence_length" in parameters:
            names.append(getattr(inner, "__name__", type(inner).__name__))
    return names


def _cache_split(task: seqio.Task, split: str, cache_dir: str, metadata: Mapping[str, Any],
                 overwrite: bool) -> dict[str, Any]:
    directory = cache_directory.task_directory(cache_dir, task.name, split)
    directory.parent.mkdir(parents=True, exist_ok=True)
    before = _finished_at(directory)
    with _lock(directory.with_name(f"{split}.lock")):
        # Another process may have written it while this one waited.
        if (directory / records.MANIFEST_NAME).is_file() and (
                not overwrite or _finished_at(directory) != before):
            manifest = records.TaskCache.open(directory).manifest
            _check_conversions(task, split, manifest)
            written = False
        else:
            if overwrite:
                shutil.rmtree(records_writer.work_directory(directory), ignore_errors=True)
            manifest, written = _write_split(task, split, directory, metadata), True
    return {"num_records": manifest.num_records, "num_bad": len(manifest.bad_examples),
            "written": written}


def _check_conversions(task: seqio.Task, split: str, manifest: records.Manifest) -> None:
    """Refuses a cache whose files were read with other settings than the Task would now."""
    before = manifest.metadata.get(conversions.METADATA_KEY)
    if before is None:  # nothing was converted, or it is older than the record
        return
    try:
        with conversions.recorded() as now:
            _dataset(task, split, 1, manifest.metadata.get(LENGTHS_KEY) or None, 0)
    # Whatever the task raises, its source perhaps gone by now: the cache is whole all the same.
    except Exception as error:  # noqa: BLE001
        why = error.problem if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        _logger.warning("%s %s: whether its preprocessors have the settings of the cache is not "
                        "known: %s", task.name, split, why)
        return
    if found := conversions.differences(before, now):
        raise UserError(
            f"the cache of task '{task.name}' {conversions.DIFFERS}", got="\n       ".join(found),
            fix="bring the settings back; or write it again, with its --module and --cache_dir: "
                f"vishwam cache --task_or_mixture={task.name} --overwrite")


def _finished_at(directory: pathlib.Path) -> int | None:
    path = directory / records.MANIFEST_NAME
    return path.stat().st_mtime_ns if path.is_file() else None


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however it ends."""
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("another process is writing %s: waiting", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_split(task: seqio.Task, split: str, directory: pathlib.Path,
                 metadata: Mapping[str, Any]) -> records.Manifest:
    num_parts = _num_parts(task, split)
    read = functools.partial(_dataset, task, split, num_parts,
                             metadata.get(LENGTHS_KEY) or None)
    with conversions.recorded() as found:
        kept = examples.CleanFeatures.of_task(task, read(0))
    if found:
        metadata = {**metadata, conversions.METADATA_KEY: found}
    if kept.dropped:
        _logger.info("%s: not cached, being no output features: %s", task.name,
                     ", ".join(kept.dropped))
    writer = records_writer.TaskCacheWriter(directory, task.name, split, kept.features, metadata,
                                            num_parts=num_parts)
    if writer.resumed_pieces:
        _logger.info("%s %s: going on after %d finished shards", task.name, split,
                     writer.resumed_pieces)
    progress = _Progress(task.name, split, task.num_input_examples(split))
    with progress, concurrent.futures.ThreadPoolExecutor(
            min(num_parts, os.cpu_count() or 1), "vishwam-cache") as pool:
        futures = [pool.submit(_write_part, read, task, split, part, writer, kept, progress)
                   for part in range(num_parts)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        finally:
            progress.stopped = True  # after an error the other parts must not go on
    manifest = writer.finish()
    _report_bad(manifest)
    return manifest


def _num_parts(task: seqio.Task, split: str) -> int:
    """Source shards can be read apart; a source of one is read in one go."""
    return max(1, min(MAX_PARTS, len(task.source.list_shards(split))))


def _dataset(task: seqio.Task, split: str, num_parts: int, lengths: Mapping[str, int] | None,
             part: int) -> tf.data.Dataset:
    shard = seqio.ShardInfo(part, num_parts) if num_parts > 1 else None
    return examples.read_task(task, split, seed=part, shard_info=shard, sequence_length=lengths)


def _write_part(read: Callable[[int], tf.data.Dataset], task: seqio.Task, split: str, part: int,
                writer: records_writer.TaskCacheWriter, kept: examples.CleanFeatures,
                progress: _Progress) -> None:
    out = writer.part(part)
    if out is None:
        return
    dataset = read(part)
    if out.num_examples:
        dataset = dataset.skip(out.num_examples)
        progress.add(out.num_examples, None)
    elements = dataset.as_numpy_iterator()
    while not progress.stopped:
        try:
            element = next(elements)
        except StopIteration:
            out.close()
            return
        except tf.errors.OpError as error:
            raise UserError(
                f"task '{task.name}' cannot be preprocessed",
                got=f"split {split}, part {part}, after {out.num_examples} examples: "
                    f"{error.message}",
                fix="mend the task's preprocessors or source; what was finished is kept") from error
        example, why = kept.convert(element)
        if why is None:
            why = out.write(example)
        else:
            out.leave_out(why)
        progress.add(1, why)


def _report_bad(manifest: records.Manifest) -> None:
    reasons = collections.Counter(entry["why"] for entry in manifest.bad_examples)
    for entry in manifest.bad_examples[:10]:
        _logger.warning("%s %s: example %d of part %d left out: %s", manifest.task, manifest.split,
                        entry["example"], entry["part"], entry["why"])
    if len(manifest.bad_examples) > 10:
        _logger.warning("%s %s: %d examples left out, all listed in %s; most often: %s",
                        manifest.task, manifest.split, len(manifest.bad_examples),
                        records.MANIFEST_NAME, reasons.most_common(1)[0][0])


class _Progress:
    """A bar on a terminal, lines elsewhere; stops the run at too many bad examples."""

    def __init__(self, task: str, split: str, total: int | None) -> None:
        self._what, self._total = f"{task} {split}", total
        self.num_examples = self.num_bad = 0
        self.stopped = False
        self._lock = threading.Lock()
        self._begin = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._what, unit=" examples")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
        _logger.info("%s: %d examples%s in %.1f s", self._what, self.num_examples,
                     f" ({self.num_bad} left out)" if self.num_bad else "",
                     time.monotonic() - self._begin)

    def add(self, count: int, why: str | None) -> None:
        """Counts examples; `why` says what is wrong with one that is left out.

        Raises:
            UserError: too many are.
        """
        with self._lock:
            self.num_examples += count
            self.num_bad += why is not None
            if self._bar is not None:
                self._bar.update(count)
            elif time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
                self._last = time.monotonic()
                _logger.info("%s: %d examples%s", self._what, self.num_examples,
                             f" of {self._total}" if self._total else "")
            allowed = MAX_BAD_FRACTION * max(self.num_examples, MIN_EXAMPLES_FOR_FRACTION)
            if why is not None and self.num_bad > allowed:
                raise UserError(
                    f"too many unusable examples in {self._what}",
                    got=f"{self.num_bad} of {self.num_examples}; the last: {why}",
                    fix="mend the task's preprocessors, or filter such examples out there")
