"""From a dataset's configuration to its batches.

Nothing here imports TensorFlow: see `preparing`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import NamedSharding

from vishwam_t5x.core.batch import MODALITIES, BatchSpec, DataPosition, HistorySpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import copies, fit, preparing, records, task_code
from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import Objective, PackedBatches
from vishwam_t5x.data.packing_plan import ExampleStream
from vishwam_t5x.data.prefetch import Prefetcher
from vishwam_t5x.data.preparing import ensure_cached as ensure_cached
from vishwam_t5x.data.preparing import missing_tasks as missing_tasks
from vishwam_t5x.objectives.masking import FrameSpec, PatchSpec

CACHE_DIR_VARIABLE = "VISHWAM_CACHE_DIR"
LENGTHS_KEY = "sequence_length"
"""Of a manifest's metadata: the lengths of a row that a task's preprocessors were told."""

TaskFeatures = Mapping[str, Mapping[str, records.FeatureInfo]]
"""Features of each task, by its name."""

_logger = logging.getLogger(__name__)


def default_cache_dir() -> str:
    """Returns $VISHWAM_CACHE_DIR, or ~/.cache/vishwam_t5x."""
    return os.environ.get(CACHE_DIR_VARIABLE) or str(copies.default_base())


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Which examples, in which shapes and order: T5X's `DatasetConfig`, and where caches live.

    Attributes:
        mixture_or_task_name: a SeqIO Task or Mixture.
        task_feature_lengths: slots of a row: {'inputs': encoder columns, 'targets': decoder
            columns}, and slots of one modality, e.g. 'inputs/image', where fewer than the row.
        split: split of the tasks.
        batch_size: rows of the global batch.
        shuffle: a new random order each epoch.
        seed: of order and corruption.
        use_cached: read the cache, writing it first if missing (exact resume). False: a live
            tf.data stream, whose resume is approximate.
        pack: many examples a row; False: one.
        sequence_length: what SeqIO preprocessors that ask for the lengths of a row are told (T5's
            span_corruption does), {'inputs': …, 'targets': …}; None: such tasks are refused. Their
            cache is made for these lengths, and what they draw at random is the same each epoch.
        module: importable module or .py file, or several, that register the tasks with SeqIO; None:
            the tasks that come with vishwam_t5x.
        cache_dir: directory of the caches, which may be gs:// or s3://; None: $VISHWAM_CACHE_DIR
            or ~/.cache/vishwam_t5x.
        prefetch: batches made ahead.
        read_threads: records read at a time by this host; more than 1 pays on network file systems.
        keep_in_memory_mib: MiB of decoded records that each host may keep, so that small tasks are
            read from disk once; whole tasks only, the smallest first.
        max_bad_fraction: share of damaged records (0 to 1) beyond which to stop.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    batch_size: int
    split: str = "train"
    shuffle: bool = True
    seed: int = 0
    use_cached: bool = True
    pack: bool = True
    sequence_length: Mapping[str, int] | None = None
    module: str | Sequence[str] | None = None
    cache_dir: str | None = None
    prefetch: int = 2
    read_threads: int = 1
    keep_in_memory_mib: int = 64
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if not self.mixture_or_task_name or not isinstance(self.mixture_or_task_name, str):
            raise UserError("mixture_or_task_name must name a SeqIO Task or Mixture",
                            got=repr(self.mixture_or_task_name),
                            fix="set MIXTURE_OR_TASK_NAME = 'quickstart', for example")
        for name in ("batch_size", "prefetch", "read_threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive whole number", got=repr(value),
                                fix="set BATCH_SIZE" if name == "batch_size" else
                                f"set DatasetConfig.{name}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UserError("the data's seed must be a whole number, 0 or more",
                            got=repr(self.seed), fix="set RANDOM_SEED")
        if self.keep_in_memory_mib < 0:
            raise UserError("keep_in_memory_mib must be 0 MiB or more", got=self.keep_in_memory_mib)
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError("max_bad_fraction is a share between 0 and 1",
                            got=self.max_bad_fraction)
        if isinstance(self.module, Sequence) and not isinstance(self.module, str):
            object.__setattr__(self, "module", tuple(self.module))

    @property
    def directory(self) -> str:
        """Where the caches are read: of a directory in an object store, its copy; see `copies`."""
        return copies.folder_of(self.place)

    @property
    def place(self) -> str:
        """The cache directory itself: a folder, or one in an object store."""
        return self.cache_dir or default_cache_dir()

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that register the tasks; () for those that come with the package."""
        if self.module is None:
            return ()
        return (self.module,) if isinstance(self.module, str) else tuple(self.module)


@dataclasses.dataclass
class Dataset:
    """An open dataset.

    Attributes:
        config: what was asked for.
        examples: the numbered examples: a `Mixture`, or a live stream.
        objective: what corrupts them.
        spec: the shapes of its batches.
        batches: builds any batch from its position.
    """

    config: DatasetConfig
    examples: ExampleStream
    objective: Objective
    spec: BatchSpec
    batches: PackedBatches

    def prefetch(self, shardings: NamedSharding | Mapping[str, NamedSharding],
                 start: DataPosition | None = None) -> Prefetcher:
        """Returns batches on the devices, from `start` on; see `Prefetcher`."""
        return Prefetcher(self.batches, shardings, start, self.config.prefetch)


def patch_specs(objective: object) -> dict[str, PatchSpec]:
    """Returns how an objective cuts each continuous modality: its `PatchSpec` attributes, and those
    of its `histories`."""
    found = dict(getattr(objective, "patch_specs", None) or {})
    found |= {modality: spec.patch for modality, spec in _histories(objective).items()}
    for modality in MODALITIES:
        if isinstance(spec := getattr(objective, modality, None), PatchSpec):
            found[modality] = spec
    return found


def _histories(objective: object) -> Mapping[str, FrameSpec]:
    return getattr(objective, "histories", None) or {}


def batch_spec(config: DatasetConfig, objective: Objective,
               features: TaskFeatures | None = None, model: Any = None) -> BatchSpec:
    """Returns the shapes of the batches of an objective's modalities.

    Args:
        config: lengths of rows and how many there are.
        objective: its modalities and their patches.
        features: of every task to be read, if they are known. Where all that the encoder reads of a
            modality are uint8, its patches are uint8 in the batch too, a quarter of the bytes;
            otherwise float32. Each modality is by itself, and targets have no say in it.
        model: config of the model that is to read the batches: rows hold no more images or
            spectrograms than it says that it takes (`most_a_row`). None: as many as fit.

    Raises:
        UserError: see `BatchSpec.from_feature_lengths`.
    """
    codes = getattr(objective, "code_inputs", ())
    specs = {modality: spec for modality, spec in patch_specs(objective).items()
             if modality not in codes}
    inputs, histories = tuple(objective.input_modalities), _histories(objective)
    read = _dtypes_read(objective, features or {})
    return BatchSpec.from_feature_lengths(
        config.batch_size, config.task_feature_lengths, inputs,
        tuple(objective.target_modalities),
        {modality: specs[modality].patch_dim for modality in inputs if modality in specs},
        packed=config.pack, task_masks=tuple(
            modality for modality in objective.target_modalities
            if modality != "text" and getattr(objective, "task_masks", False)),
        histories={modality: HistorySpec(spec.places, spec.latents, spec.budget, spec.budget_rows)
                   for modality, spec in histories.items()},
        byte_patches=tuple(modality for modality in inputs if modality in specs
                           and read.get(modality, {}).keys() == {"uint8"}),
        signals=getattr(objective, "signals", None),
        most_a_row={modality: most for modality, most in
                    getattr(model, "most_a_row", {}).items()
                    if modality in inputs and modality in specs})


def _dtypes_read(objective: Any, features: TaskFeatures) -> dict[str, dict[str, list[str]]]:
    """Modality -> dtype -> tasks and their features that the encoder is given as they are."""
    found: dict[str, dict[str, list[str]]] = {}
    if not hasattr(objective, "input_features"):  # it may make floats of pixels
        return found
    for task, infos in features.items():
        # Of what cannot be used whoever measures an example says more.
        with contextlib.suppress(UserError):
            for modality, name in objective.input_features(infos).items():
                dtypes = found.setdefault(modality, {})
                dtypes.setdefault(infos[name].dtype, []).append(f"{task} ({name})")
    return found


def _tell_of_floats(objective: Objective, spec: BatchSpec, features: TaskFeatures) -> None:
    for modality, dtypes in _dtypes_read(objective, features).items():
        if modality in spec.patch_dims and "uint8" in dtypes and len(dtypes) > 1:
            _logger.warning(
                "all patches of modality '%s' are float32 in the batch, four times the bytes, for "
                "its tasks differ: float32 are %s; uint8 are %s. To have all uint8 let the former "
                "give pixels as uint8 (decode_picture of vishwam_t5x.data.tf.image does)", modality,
                ", ".join(task for dtype, tasks in dtypes.items() if dtype != "uint8"
                          for task in tasks), ", ".join(dtypes["uint8"]))


def features_of(tasks: Iterable[records.TaskRecords]) -> TaskFeatures:
    """Returns the features of each task by its name."""
    return {task.name: task.features for task in tasks}


def cached_features(config: DatasetConfig) -> TaskFeatures:
    """Returns the features of each task, by the caches on this machine; {} if one is missing."""
    return cache_directory.read_features(config.directory, config.mixture_or_task_name,
                                         config.split) if config.use_cached else {}


def open_dataset(config: DatasetConfig, objective: Objective, repeat: bool = True,
                 model: Any = None) -> Dataset:
    """Opens the caches of a mixture, writing those that are missing first.

    Args:
        config: which examples and shapes.
        objective: corrupts examples on read.
        repeat: an endless stream; False: every record once (evaluation).
        model: config of the model, as for `batch_spec`.

    Raises:
        UserError: unknown task or split, a broken cache, settings that do not fit, or an example
            that would fit in no row (see `fit.check_longest`).
    """
    assert config.use_cached, "a live stream is opened by data/tf/live.py"
    mixture = open_mixture(config, patch_specs(objective), repeat)
    dataset = assemble(config, objective, mixture, model)
    fit.check_longest(mixture.tasks, objective, dataset.spec)
    fit.check_vocabularies(mixture.tasks, objective)
    return dataset


def assemble(config: DatasetConfig, objective: Objective, examples: ExampleStream,
             model: Any = None) -> Dataset:
    """Returns the dataset of numbered examples from anywhere; `model` as for `batch_spec`."""
    features = features_of(examples.tasks)
    spec = batch_spec(config, objective, features, model)
    _tell_of_floats(objective, spec, features)
    batches = PackedBatches(examples, objective, spec, config.seed, config.max_bad_fraction,
                            config.read_threads)
    return Dataset(config, examples, objective, spec, batches)


def open_mixture(config: DatasetConfig, specs: Mapping[str, PatchSpec], repeat: bool = True
                 ) -> Mixture:
    """Opens the cached tasks of a mixture, writing those that are missing first.

    Args:
        config: which examples.
        specs: patches of each continuous modality.
        repeat: as in `open_dataset`.

    Raises:
        UserError: as `open_dataset`.
    """
    ensure_cached(config)
    rates = cache_directory.read_rates(config.directory, config.mixture_or_task_name)
    assert rates is not None
    tasks = [records.TaskCache.open(
        cache_directory.task_directory(config.directory, task, config.split), specs)
        for task in rates]
    for task in tasks:
        _check_lengths(task, config)
    task_code.warn_of_changes(config.mixture_or_task_name, [task.metadata for task in tasks])
    preparing.check_conversions(config, [task.metadata for task in tasks])
    _logger.info("rates of %s: %s", config.mixture_or_task_name,
                 ", ".join(f"{task} {rate:g}" for task, rate in rates.items()))
    budget = config.keep_in_memory_mib * 2**20
    for task in sorted(tasks, key=lambda task: task.decoded_bytes):
        budget -= task.decoded_bytes
        if budget < 0:
            break
        task.keep_in_memory()
    return Mixture(tasks, list(rates.values()), config.seed, config.shuffle, repeat)


def _check_lengths(task: records.TaskCache, config: DatasetConfig) -> None:
    made_for = task.metadata.get(LENGTHS_KEY)
    if made_for is not None and made_for != dict(config.sequence_length or {}):
        raise UserError(
            f"the cache of task '{task.name}' was made for rows of other lengths",
            got=f"{made_for}, now {dict(config.sequence_length or {})}",
            fix="another CACHE_DIR; or write it again: vishwam cache --overwrite")
