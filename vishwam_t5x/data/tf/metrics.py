"""A SeqIO Task's postprocessor and metrics, handed out as plain callables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import seqio

from vishwam_t5x.core.errors import UserError, did_you_mean

_KINDS = {seqio.metrics.ModelOutputType.PREDICTION: "predict",
          seqio.metrics.ModelOutputType.SCORE: "score",
          seqio.metrics.ModelOutputType.PREDICTION_WITH_AUX: "predict_with_aux"}


class SeqioMetrics(NamedTuple):
    """What a Task was registered with.

    Attributes:
        metric_fns: its functions, whatever arguments they take.
        postprocess_fn: its postprocessor, or None.
        metric_objs: its SeqIO `Metric` classes.
    """

    metric_fns: tuple[Callable[..., Mapping[str, Any]], ...]
    postprocess_fn: Callable[..., Any] | None
    metric_objs: tuple[SeqioMetricObject, ...]


class SeqioMetricObject:
    """Calls a SeqIO `Metric` class with outputs of this project's models.

    Attributes:
        name: of the class.
        kind: 'predict', 'score' or 'predict_with_aux': which outputs it looks at.
    """

    def __init__(self, task: seqio.Task, metric: Any) -> None:
        """Raises `UserError` if the metric wants an output that is not made here."""
        self.name = getattr(metric, "__name__", type(metric).__name__)
        if metric.model_output_type not in _KINDS:
            raise UserError(
                f"metric '{self.name}' of task '{task.name}' wants a model output that is not "
                "made here", got=str(metric.model_output_type),
                fix="one of " + ", ".join(kind.name for kind in _KINDS))
        self.kind = _KINDS[metric.model_output_type]
        self._metric, self._features = metric, task.output_features

    def __call__(self, examples: Sequence[Mapping[str, Any]], target_feature: str,
                 outputs: Any) -> Mapping[str, Any]:
        """Returns {name: value}.

        Args:
            examples: the clean examples.
            target_feature: the output feature that is predicted.
            outputs: has `tokens`, `prediction_scores` and `target_scores`, in their order.
        """
        if self.kind == "score":
            given: Any = np.asarray(outputs.target_scores)
        else:
            given = _padded(outputs.tokens)
            if self.kind == "predict_with_aux":
                given = given, {"scores": np.asarray(outputs.prediction_scores)}
        made = self._metric.from_model_output(list(examples), given, self._features,
                                              target_feature)
        if isinstance(made, seqio.metrics.CollectingMetric):
            return made.actual_compute(list(examples), self._features, target_feature)[0]
        return made.compute()


def seqio_metrics(name: str) -> SeqioMetrics:
    """Returns the metrics of a registered Task; import the module that registers it first.

    Raises:
        UserError: there is no such Task, or its metrics have arguments SeqIO does not know.
    """
    try:
        task = seqio.TaskRegistry.get(name)
    except ValueError as error:
        hint = did_you_mean(name, seqio.TaskRegistry.names())
        raise UserError("no SeqIO Task has this name", got=repr(name),
                        fix=hint or "import the module that registers it") from error
    try:
        functions = tuple(task.metric_fns)
        objects = tuple(task.metric_objs)
    except ValueError as error:
        raise UserError(f"a metric function of task '{name}' has unknown arguments",
                        got=str(error)) from error
    # SeqIO wraps the functions into objects too and lists those behind the Task's own.
    own = objects[:len(objects) - len(functions)]
    return SeqioMetrics(functions, task.postprocessor,
                        tuple(SeqioMetricObject(task, metric) for metric in own))


def _padded(tokens: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(tokens), max((len(row) for row in tokens), default=0)), np.int32)
    for index, row in enumerate(tokens):
        out[index, :len(row)] = row
    return out


def text_vocabulary(name: str) -> seqio.Vocabulary:
    """Returns the vocabulary of a registered Task's text.

    Raises:
        UserError: there is no such Task, or none of its features is text.
    """
    if name not in seqio.TaskRegistry.names():
        raise UserError("no SeqIO Task has this name", got=repr(name),
                        fix=did_you_mean(name, seqio.TaskRegistry.names())
                        or "import the module that registers it")
    features = seqio.TaskRegistry.get(name).output_features
    for feature in ("text_targets", "text_inputs", "text", "targets", "inputs"):
        if feature in features:
            return features[feature].vocabulary
    raise UserError(f"task '{name}' has no text", got=", ".join(features))
