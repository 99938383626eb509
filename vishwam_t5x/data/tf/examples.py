"""From what a SeqIO Task yields to a clean example: which features to keep, and what is wrong.

Also finds the Tasks: imports the modules that register them and looks names up with a did-you-mean.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import logging
import pathlib
import pkgutil
import shutil
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data import records

BUILT_IN_TASKS = "vishwam_t5x_tasks"
REFUSED = "refused"
"""Feature with which preprocessors leave an example out: why, a string; empty: it can be used."""

_logger = logging.getLogger(__name__)
# SeqIO counts the seeds of random preprocessors in a global: one dataset is built at a time.
_building = threading.Lock()


# -- tasks -------------------------------------------------------------------------------------


def import_task_modules(names: Sequence[str]) -> list[types.ModuleType]:
    """Imports modules that register Tasks.

    Args:
        names: importable names or paths of .py files, which may be in an object store; none:
            all that come with vishwam_t5x.

    Raises:
        UserError: there is no such module or file.
    """
    if not names:
        package = importlib.import_module(BUILT_IN_TASKS)
        names = sorted(f"{BUILT_IN_TASKS}.{info.name}"
                       for info in pkgutil.iter_modules(package.__path__))
    try:
        return [_import_file(name) if name.endswith(".py") else _import_name(name)
                for name in names]
    except ValueError as error:
        if "different output features" not in str(error):
            raise
        raise UserError(
            "a seqio.Mixture wants the same features of every Task", got=error,
            fix="seqio.MixtureRegistry.add(name, tasks, mixture_cls=MultimodalMixture), from "
                "vishwam_t5x.data.tf.multimodal_mixture") from error


def _import_name(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise UserError("there is no such module of tasks", got=name,
                        fix="give an importable name or the path of a .py file") from error


def _import_file(path: str) -> types.ModuleType:
    file = _copy(path) if storage.is_remote(path) else pathlib.Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError("there is no such file of tasks", got=path)
    loaded = sys.modules.get(file.stem)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(file):
            return loaded
        raise UserError("the file of tasks has the name of a module in use", got=path,
                        fix=f"rename {file.name}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]  # half of it must not be found by the next import
        raise
    return module


@functools.cache
def _copy(url: str) -> pathlib.Path:
    """Copies a file of tasks from an object store, once a process."""
    folder = tempfile.mkdtemp(prefix="vishwam-tasks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    place = pathlib.Path(folder) / url.rsplit("/", 1)[-1]
    with contextlib.suppress(FileNotFoundError):
        storage.download(url, place)
    return place


def task_rates(name: str, cache_dir: str) -> dict[str, float]:
    """Returns {task: rate} of a registered Mixture, or {name: 1.0} of a Task.

    Raises:
        UserError: neither is registered.
    """
    if name in seqio.MixtureRegistry.names():
        mixture = seqio.MixtureRegistry.get(name)
        return {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}
    if name in seqio.TaskRegistry.names():
        return {name: 1.0}
    registered = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    known = sorted({*registered, *cache_directory.cached_names(cache_dir)})
    hint = did_you_mean(name, known)
    raise UserError("unknown task or mixture", got=repr(name),
                    fix=(hint + " " if hint else "") + "registered: "
                        + (", ".join(registered) or "none; does --module name your module?"))


def task_metadata(modules: Sequence[types.ModuleType], task: str) -> dict[str, Any]:
    """Returns what the module that registers a Task wants remembered with its cache.

    A module may define `task_metadata(name) -> dict of JSON values`, raising UserError for Tasks
    that are not its own.
    """
    refusal = None
    for module in modules:
        describe = getattr(module, "task_metadata", None)
        if describe is None or describe.__module__ != module.__name__:
            continue
        try:
            return dict(describe(task))
        except UserError as error:
            refusal = error
    if refusal is not None:
        _logger.info("no metadata of task %s: %s", task, refusal)
    return {}


class _SeedlessSource:
    """A Task's source, read in its own order, to which no seed is passed.

    SeqIO hands one seed to the preprocessors, which need it, and to the source, whose function may
    take none (`FunctionDataSource` then refuses).
    """

    def __init__(self, source: seqio.DataSource) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def get_dataset(self, split: str, shuffle: bool = False, seed: int | None = None,
                    shard_info: seqio.ShardInfo | None = None) -> tf.data.Dataset:
        del seed
        return self._source.get_dataset(split=split, shuffle=shuffle, shard_info=shard_info)


class WantsLengths(UserError):
    """A preprocessor of a Task asks for the lengths of a row."""


def read_task(task: seqio.Task, split: str, seed: int, shard_info: seqio.ShardInfo | None = None,
              num_epochs: int | None = 1, sequence_length: Mapping[str, int] | None = None
              ) -> tf.data.Dataset:
    """Returns a Task's preprocessed examples in the order of its source, nothing trimmed.

    Args:
        task: the Task.
        split: one of its splits.
        seed: of random preprocessors: the same examples whenever they are read.
        shard_info: a part of the source.
        num_epochs: None: endless.
        sequence_length: what preprocessors are told of the lengths of a row; None: nothing.

    Raises:
        WantsLengths: a preprocessor must be told.
        UserError: there is no such split, or the Task does not yield what it declares.
    """
    if split not in task.splits:
        raise UserError(f"task '{task.name}' has no split '{split}'", got=split,
                        fix="its splits: " + ", ".join(task.splits))
    try:
        with _building:
            return task.replace(source=_SeedlessSource(task.source)).get_dataset(
                sequence_length=dict(sequence_length) if sequence_length else None, split=split,
                use_cached=False, shuffle=False, seed=seed, shard_info=shard_info,
                num_epochs=num_epochs, trim_output_features=False, try_in_mem_cache=False)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        problem = f"the dataset of task '{task.name}' cannot be made"
        if sequence_length is None and isinstance(error, TypeError) and "NoneType" in str(error):
            raise WantsLengths(
                problem, got=error,
                fix="a preprocessor wants the lengths of a row (T5's span_corruption does): give "
                    "DatasetConfig.sequence_length, or leave it out of the task and let an "
                    "objective of gin/objectives/ corrupt clean examples on read") from error
        raise UserError(problem, got=error,
                        fix="mend the task's source, preprocessors or output_features") from error


# -- examples ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CleanFeatures:
    """Which features of a Task's examples are kept, and how they are checked.

    Attributes:
        features: kept: the Task's output features and `meta_*`.
        dropped: not kept.
        num_ids: one more than the largest id, of features with a vocabulary.
    """

    features: dict[str, records.FeatureInfo]
    dropped: tuple[str, ...]
    num_ids: dict[str, int]

    @classmethod
    def of_task(cls, task: seqio.Task, dataset: tf.data.Dataset) -> CleanFeatures:
        """Sorts what the Task's dataset yields.

        Raises:
            UserError: a feature has a type or rank that no part of the trainer understands.
        """
        spec = dataset.element_spec
        features: dict[str, records.FeatureInfo] = {}
        num_ids: dict[str, int] = {}
        for name in spec:
            meta = name.startswith(records.META_PREFIX)
            if name not in task.output_features and not meta:
                continue
            features[name] = _feature_info(task.name, name, spec[name], meta)
            if not meta and features[name].dtype == "int32":
                num_ids[name] = int(task.output_features[name].vocabulary.vocab_size or 0)
        dropped = tuple(sorted(spec.keys() - features.keys() - {REFUSED}))
        return cls(features, dropped, {name: size for name, size in num_ids.items() if size})

    def convert(self, element: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Returns the clean example of a dataset's NumPy element, and what is wrong with it."""
        example: dict[str, Any] = {}
        if why := element.get(REFUSED):
            return example, bytes(why).decode("utf-8", "replace")
        for name, info in self.features.items():
            value = element[name]
            example[name] = bytes(value) if info.dtype == "bytes" else np.asarray(value)
        why = records.explain_mismatch(example, self.features)
        return example, why or self._unusable(example)

    def _unusable(self, example: Mapping[str, Any]) -> str | None:
        lengths = []
        for name, info in self.features.items():
            if name.startswith(records.META_PREFIX):
                continue
            value = example[name]
            if info.dtype == "float32" and not np.isfinite(value).all():
                return f"{name} has values that are not finite"
            limit = self.num_ids.get(name, 2**31)
            if info.dtype == "int32" and value.size and not (
                    value.min() >= 0 and value.max() < limit):
                return (f"{name} has ids from {value.min()} to {value.max()}, not in the "
                        f"vocabulary of {limit}")
            frames = records.is_history(name)
            if value.size == 0 and (name.endswith("_codes") or (value.ndim > 1 and not frames)):
                return f"{name} is empty"
            if len(info.shape) == 3 + frames and info.dtype == "float32" and (
                    value.min() < -1e-3 or value.max() > 1.001):
                return f"{name} has pixels from {value.min()} to {value.max()}, not in [0, 1]"
            lengths.append(value.size)
        return None if any(lengths) else "every feature is empty"


def _feature_info(task: str, name: str, spec: Any, meta: bool) -> records.FeatureInfo:
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
        raise UserError(f"feature '{name}' of task '{task}' is no array of known rank", got=spec)
    shape, dtype = tuple(spec.shape.as_list()), spec.dtype
    if dtype == tf.string:
        if shape or not meta:
            raise UserError(
                f"feature '{name}' of task '{task}' cannot be cached", got=f"strings of {shape}",
                fix="tokenize it; strings are kept for metrics only, one an example, under a name "
                    "that begins with meta_")
        return records.FeatureInfo((), "bytes")
    info = records.FeatureInfo(shape, dtype.as_numpy_dtype(0).dtype.name)
    rank = len(shape) - (not meta and records.is_history(name) and len(shape) > 1)
    allowed = {1: ("int32",), 2: ("float32", "uint8"), 3: ("float32", "uint8")}
    if rank < len(shape) and None in shape[1:]:
        raise UserError(f"the frames of '{name}' of task '{task}' have no fixed size", got=shape,
                        fix="resize them: vishwam_t5x.data.tf.image.decode_frames does")
    if not meta and info.dtype not in allowed.get(rank, ()):
        raise UserError(
            f"feature '{name}' of task '{task}' has a type that the trainer does not know",
            got=f"{info.dtype} of rank {len(shape)}",
            fix="int32 of rank 1 (tokens, codes), or float32 or uint8 of rank 2 (spectrograms) or "
                "3 (images), one more for histories; or a name that begins with meta_")
    return info
