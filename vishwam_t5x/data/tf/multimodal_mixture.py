"""A SeqIO Mixture of Tasks with different features: text here, images and captions there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from vishwam_t5x.core.errors import UserError


class MultimodalMixture(seqio.Mixture):
    """A Mixture whose Tasks declare only the features they have.

    `seqio.Mixture` wants the same features of every Task. Here a feature that some Tasks lack is
    optional; a feature that two Tasks share must be the same in both. Register one with
    `seqio.MixtureRegistry.add(name, tasks, mixture_cls=MultimodalMixture)`; rates, sub-mixtures and
    sampling are SeqIO's. In a stream of the whole mixture, a feature an example lacks is there with
    size 0.

    Raises:
        UserError: two Tasks declare one feature with different vocabularies, dtypes or ranks.
    """

    _constructed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._constructed = True
        self._check_compatible_features()

    @property
    def tasks(self) -> list[seqio.Task]:
        """All Tasks, those of sub-mixtures too, by name."""
        tasks = super().tasks
        # SeqIO's constructor compares the features of all Tasks; it gets to see one.
        return tasks if self._constructed else tasks[:1]

    @property
    def output_features(self) -> Mapping[str, seqio.Feature]:
        """Every feature of any Task; `required` only where every Task has it."""
        tasks = self.tasks
        out: dict[str, seqio.Feature] = {}
        for name in sorted({name for task in tasks for name in task.output_features}):
            declared = [t.output_features[name] for t in tasks if name in t.output_features]
            required = len(declared) == len(tasks) and all(f.required for f in declared)
            out[name] = dataclasses.replace(declared[0], required=required)
        return out

    def _check_compatible_features(self) -> None:
        first: dict[str, tuple[str, seqio.Feature]] = {}
        for task in self.tasks:
            for name, feature in task.output_features.items():
                owner, known = first.setdefault(name, (task.name, feature))
                for field in ("vocabulary", "dtype", "rank"):
                    if getattr(feature, field) != getattr(known, field):
                        raise UserError(
                            f"Tasks of mixture '{self.name}' disagree about feature '{name}'",
                            got=f"{field} {getattr(known, field)} in '{owner}', "
                                f"{getattr(feature, field)} in '{task.name}'",
                            fix="give one of them another name, or the same feature")

    def get_task_dataset(self, task: seqio.Task, output_feature_keys: set[str], *args: Any,
                         **kwargs: Any) -> tf.data.Dataset:
        """One Task's examples, the features it lacks added with size 0 (arguments as SeqIO's)."""
        dataset = super().get_task_dataset(task, output_feature_keys, *args, **kwargs)
        features = self.output_features
        absent = sorted(set(features) & set(output_feature_keys) - set(dataset.element_spec))

        def add(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            empty = {name: tf.zeros((0,) * features[name].rank, features[name].dtype)
                     for name in absent}
            return {**example, **empty}

        return dataset.map(add) if absent else dataset
