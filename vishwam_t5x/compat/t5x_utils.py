"""T5X's `utils`: which data, which checkpoints, which learning rate."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from absl import logging

from vishwam_t5x.checkpointing.policy import CheckpointConfig as OurCheckpointConfig
from vishwam_t5x.compat import checkpoints, refused
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.data import source
from vishwam_t5x.objectives.text_to_text import TextToText
from vishwam_t5x.training.schedules import (
    create_learning_rate_scheduler as create_learning_rate_scheduler,
)

STANDS_FOR = "t5x.utils"
SIDES = ("inputs", "targets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which data.

    Attributes:
        mixture_or_task_name: a SeqIO Task or Mixture.
        task_feature_lengths: tokens of a row; None: the longest there are.
        split: of the tasks.
        batch_size: rows of the global batch.
        shuffle: a new order each epoch.
        seed: of the order; None: that of the run.
        use_cached: tasks are always cached, when first read, by vishwam itself; a warning says what
            False would mean.
        pack: many examples a row.
        use_custom_packing_ops: False.
        module: registers the tasks.
        use_memory_cache: keep small tasks in memory.
        trim_output_features: True: longer examples are cut.
        runtime_preprocessors: None.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int] | None
    split: str
    batch_size: int
    shuffle: bool
    seed: int | None
    use_cached: bool = False
    pack: bool = False
    use_custom_packing_ops: bool = False
    module: str | None = None
    use_memory_cache: bool = True
    trim_output_features: bool = True
    runtime_preprocessors: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.DatasetConfig", vars(self))
        lengths = self.task_feature_lengths
        if lengths is not None and set(lengths) != set(SIDES):
            raise UserError("task_feature_lengths name the inputs and the targets of a task",
                            got=repr(dict(lengths)), fix="{'inputs': 512, 'targets': 114}")

    def ours(self, modules: Sequence[str] = (), seed: int = 0) -> source.DatasetConfig:
        """Returns the dataset of ours.

        Args:
            modules: that register the tasks, beside `module`.
            seed: of the order where `seed` is None.
        """
        if not self.use_cached:
            _say_what_is_cached()
        config = source.DatasetConfig(
            mixture_or_task_name=self.mixture_or_task_name,
            task_feature_lengths=dict(self.task_feature_lengths or dict.fromkeys(SIDES, 1)),
            batch_size=self.batch_size, split=self.split, shuffle=self.shuffle, pack=self.pack,
            seed=seed if self.seed is None else self.seed,
            sequence_length=dict(self.task_feature_lengths) if self.task_feature_lengths else None,
            module=tuple(dict.fromkeys([*([self.module] if self.module else []), *modules]))
            or None, **({} if self.use_memory_cache else {"keep_in_memory_mib": 0}))
        if self.task_feature_lengths is None:
            return dataclasses.replace(config, task_feature_lengths=longest(config))
        return config


@functools.cache  # once
def _say_what_is_cached() -> None:
    logging.warning("use_cached = False: examples are cached all the same; what preprocessors draw "
                    "at random is the same in every epoch")


def longest(config: source.DatasetConfig) -> dict[str, int]:
    """Returns the lengths of the longest inputs and targets of a split, writing its cache first if
    it is missing."""
    found = dict.fromkeys(SIDES, 1)
    for task in source.open_mixture(config, {}, repeat=False).tasks:
        names, table = task.length_table
        for side in SIDES:
            for name in (side, f"text_{side}"):
                if name in names and len(table):
                    found[side] = max(found[side], int(table[:, names.index(name)].max()))
    logging.info("%s, split %s: inputs of up to %d tokens, targets of up to %d",
                 config.mixture_or_task_name, config.split, *found.values())
    return found


def objective(config: source.DatasetConfig, vocabulary_files: Sequence[str] = ()) -> TextToText:
    """Returns what turns the examples of a text-to-text task into rows.

    Args:
        config: how long they are.
        vocabulary_files: of the model.
    """
    return TextToText(*(config.task_feature_lengths[side] for side in SIDES),
                      vocabulary_files=tuple(vocabulary_files))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveCheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
        dtype: 'float32'.
        period: steps between saves; None: only at the end.
        checkpoint_steps: further steps to save at.
        keep: how many of the newest; None: all.
        keep_dataset_checkpoints: None.
        save_dataset: the data's position is saved, whatever this says.
        checkpointer_cls: keeps the best too, if it is `checkpoints.SaveBestCheckpointer`.
        state_transformation_fns: none.
        checkpoint_manager_cls: None.
        use_gda: True.
    """

    dtype: str | None = "float32"
    period: int | None = None
    checkpoint_steps: Sequence[int] | None = None
    keep: int | None = None
    keep_dataset_checkpoints: int | None = None
    save_dataset: bool = False
    checkpointer_cls: type[checkpoints.Checkpointer] = checkpoints.Checkpointer
    state_transformation_fns: Sequence[Any] = ()
    checkpoint_manager_cls: Any = None
    use_gda: bool = True

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.SaveCheckpointConfig", vars(self))

    def ours(self) -> OurCheckpointConfig:
        """Returns the settings of ours."""
        retention = self.checkpointer_cls().retention()
        if "keep_best_metric" in retention and self.keep:
            retention["keep_best"] = self.keep  # T5X's `keep` counts the best then
        return OurCheckpointConfig(period=self.period, keep=self.keep,
                                   steps=tuple(self.checkpoint_steps or ()), **retention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreCheckpointConfig:
    """What is restored.

    Attributes:
        path: a checkpoint, or a folder of some; [] or None: none.
        mode: 'specific', 'latest' or 'all'.
        assignment_map: (pattern, name in the checkpoint) pairs; None for the name leaves out.
        strict: changes nothing, as in T5X.
        fallback_to_scratch: parameters that the checkpoint lacks start afresh; else an error.
        dtype: of restored parameters, 'float32' or 'bfloat16'; None: as they are used.
        restore_dataset: False.
        checkpointer_cls: any.
        state_transformation_fns: none.
        checkpoint_manager_cls: None.
        use_gda: True.
        is_tensorflow: False.
    """

    path: str | Sequence[str] | None
    mode: Literal["specific", "latest", "all"] = "latest"
    assignment_map: Sequence[tuple[str, str | None]] | None = None
    strict: bool = True
    fallback_to_scratch: bool = False
    dtype: str | None = None
    restore_dataset: bool = False
    checkpointer_cls: type[checkpoints.Checkpointer] = checkpoints.Checkpointer
    state_transformation_fns: Sequence[Any] = ()
    checkpoint_manager_cls: Any = None
    use_gda: bool = True
    is_tensorflow: bool = False

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.RestoreCheckpointConfig", vars(self))
        if self.dtype is not None:
            one_of(self.dtype, ("float32", "bfloat16"), "RestoreCheckpointConfig.dtype")

    def place(self) -> str | None:
        """Returns the one path, or None.

        A path as T5X writes it, MODEL_DIR/checkpoint_STEP, is also found where a run of ours has
        it: MODEL_DIR/checkpoints/STEP.

        Raises:
            UserError: there are several.
        """
        paths = [self.path] if isinstance(self.path, str) else list(self.path or ())
        if not paths or not paths[0]:
            return None
        if len(paths) > 1:
            raise UserError("one checkpoint can be restored at a time", got=", ".join(paths),
                            fix="RestoreCheckpointConfig.path = one of them")
        path = paths[0].rstrip("/")
        folder, _, name = path.rpartition("/")
        found = re.fullmatch(r"checkpoint_(\d+)", name)
        if found and not storage.exists(storage.place(path)):
            ours = storage.join(folder or ".", "checkpoints", found[1])
            if storage.exists(storage.place(ours)):
                return str(ours)
        return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved and restored.

    Attributes:
        save: None: only at the end.
        restore: None: nothing but the run's own.
    """

    save: SaveCheckpointConfig | None = None
    restore: RestoreCheckpointConfig | None = None
