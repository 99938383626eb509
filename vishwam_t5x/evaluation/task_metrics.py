"""A task's postprocessor and metric functions, called as SeqIO calls them, without SeqIO."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from vishwam_t5x.core.errors import UserError

PREDICT, SCORE, PREDICT_WITH_AUX = "predict", "score", "predict_with_aux"
_ARGUMENTS = {PREDICT: ("targets", "predictions"), SCORE: ("targets", "scores"),
              PREDICT_WITH_AUX: ("targets", "predictions", "aux_values")}


class MetricObject(Protocol):
    """A metric that decodes and postprocesses for itself, as SeqIO's `metric_objs` do."""

    name: str
    kind: str

    def __call__(self, examples: Sequence[Mapping[str, Any]], target_feature: str,
                 outputs: ModelOutputs) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """What a model made of some examples, in their order.

    Attributes:
        tokens: written ids of each example, int32 [n], as the vocabulary knows them; None if no
            metric looks at what is written.
        prediction_scores: log-probability of what was written, in nats; None as above.
        target_scores: log-probability of the targets, in nats; None if no metric needs it.
    """

    tokens: Sequence[np.ndarray] | None = None
    prediction_scores: Sequence[float] | None = None
    target_scores: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class TaskMetrics:
    """What one task does with model outputs.

    Attributes:
        task: the task's name.
        metric_fns: functions (targets, predictions), (targets, scores) or (targets, predictions,
            aux_values) -> {name: value}; the names of the arguments say which.
        postprocess_fn: (output, example=…, is_target=…) -> what the metric functions get; None:
            the output itself.
        metric_objs: further metrics, which get the raw outputs.

    Raises:
        UserError: a function has other arguments.
    """

    task: str
    metric_fns: tuple[Callable[..., Mapping[str, Any]], ...] = ()
    postprocess_fn: Callable[..., Any] | None = None
    metric_objs: tuple[MetricObject, ...] = ()

    def __post_init__(self) -> None:
        for function in self.metric_fns:
            self._kind(function)

    @classmethod
    def from_metadata(cls, task: str, metadata: Mapping[str, Any]) -> TaskMetrics | None:
        """Returns the metrics that a cache's manifest names by their addresses.

        Args:
            task: the task's name.
            metadata: the manifest's; 'metric_fns' is a list of 'module:name' and 'postprocess_fn'
                one or None.

        Returns:
            None if the manifest names none, or one that has no address (a lambda, a partial): then
            the SeqIO Task itself must be asked.

        Raises:
            UserError: an address leads nowhere.
        """
        if "metric_fns" not in metadata:
            return None
        names = [*metadata["metric_fns"], *filter(None, [metadata.get("postprocess_fn")])]
        if any("<" in name or ":" not in name for name in names):
            return None
        postprocess = metadata.get("postprocess_fn")
        return cls(task, tuple(_find(task, name) for name in metadata["metric_fns"]),
                   _find(task, postprocess) if postprocess else None)

    @property
    def has_metrics(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.metric_fns or self.metric_objs)

    @property
    def needs_predictions(self) -> bool:
        """Whether a metric looks at what the model writes."""
        return bool(self._kinds() & {PREDICT, PREDICT_WITH_AUX})

    @property
    def needs_scores(self) -> bool:
        """Whether a metric looks at the log-probability of the targets."""
        return SCORE in self._kinds()

    def postprocess(self, output: Any, example: Mapping[str, Any], is_target: bool) -> Any:
        """Returns what the metric functions get for a decoded output or target.

        Raises:
            UserError: the task's postprocess_fn failed.
        """
        postprocess = self.postprocess_fn
        if postprocess is None:
            return output
        return self._call("postprocess_fn", lambda: postprocess(
            output, example=example, is_target=is_target))

    def compute(self, targets: Sequence[Any], predictions: Sequence[Any] | None,
                outputs: ModelOutputs, examples: Sequence[Mapping[str, Any]] = (),
                target_feature: str = "") -> dict[str, float | str]:
        """Calls every metric.

        Args:
            targets: postprocessed targets.
            predictions: postprocessed predictions; None if no metric needs them.
            outputs: of the model, in the same order.
            examples: the clean examples; `metric_objs` need them.
            target_feature: name of the feature that is predicted, e.g. 'text_targets'.

        Returns:
            {metric: number or text}. A value that is neither is left out, and the log says so.

        Raises:
            UserError: two metrics have one name, or a function of the task failed.
        """
        arguments: dict[str, Any] = {
            "targets": targets, "predictions": predictions, "scores": outputs.target_scores,
            "aux_values": {"scores": outputs.prediction_scores}}
        results: dict[str, float | str] = {}
        for function in self.metric_fns:
            names = _ARGUMENTS[self._kind(function)]
            self._add(results, self._call(
                _name(function), functools.partial(function, **{k: arguments[k] for k in names})))
        for metric in self.metric_objs:
            self._add(results, self._call(
                metric.name, functools.partial(metric, examples, target_feature, outputs)))
        return results

    def _kinds(self) -> set[str]:
        return {*map(self._kind, self.metric_fns), *(metric.kind for metric in self.metric_objs)}

    def _kind(self, function: Callable[..., Any]) -> str:
        positional = tuple(
            key for key, parameter in inspect.signature(function).parameters.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for kind, names in _ARGUMENTS.items():
            if positional == names:
                return kind
        raise UserError(f"metric '{_name(function)}' of task '{self.task}' has unknown arguments",
                        got=f"({', '.join(positional)})",
                        fix="(" + "), (".join(map(", ".join, _ARGUMENTS.values())) + ")")

    def _call(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # a task's own code may raise anything
            raise UserError(f"'{name}' of task '{self.task}' failed",
                            got=f"{type(error).__name__}: {error}") from error

    def _add(self, results: dict[str, float | str], values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if key in results:
                raise UserError(f"two metrics of task '{self.task}' are called '{key}'",
                                fix="rename one in its metric function")
            plain = _plain(value)
            if plain is None:
                logging.info("metric '%s' of task '%s' is a %s: left out of metrics.jsonl", key,
                             self.task, type(value).__name__)
            else:
                results[key] = plain


def _find(task: str, address: str) -> Callable[..., Any]:
    module, _, path = address.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the cache of task '{task}' names a function that does not exist",
                        got=f"{address}: {error}",
                        fix="install what it needs, or cache the task again: vishwam cache "
                            f"--task_or_mixture={task} --overwrite") from error
    return found


def _name(metric: Any) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


def _plain(value: Any) -> float | str | None:
    # SeqIO wraps values: Scalar has .value, Text has .textdata.
    value = getattr(value, "textdata", getattr(value, "value", value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value
    if np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.number):
        return float(value)
    return None
