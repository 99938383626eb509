"""What the model writes, judged by the tasks' own metrics, while it is being trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vishwam_t5x import task_lookup
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import fit, source
from vishwam_t5x.data.records import TaskCache
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation.evaluator import Evaluator
from vishwam_t5x.evaluation.generator import DecodingConfig, Generator
from vishwam_t5x.evaluation.options import OptionScoring
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.training import hooks, setup

PREFIX = "infer_eval/"


@dataclasses.dataclass(frozen=True)
class InferEval:
    """When and on what to let a model answer during training: T5X's infer-eval.

    What is logged as 'infer_eval/TASK/METRIC' are the numbers that the metric functions of the
    tasks give, on the answers to the first examples of their splits. It is compiled once, and
    training goes on as if it had not been.

    Attributes:
        dataset_cfg: mixture, split, and the longest inputs and targets.
        period: steps between two evaluations; there is one at the end, too.
        max_examples: of each task; None: all.
        tasks: only these; (): all that have metrics.
        decoding: how each modality is written; greedily those not named.
        decode_batch_size: examples written together.
        options: how the best of an example's options is found.
    """

    dataset_cfg: DatasetConfig
    period: int = 1000
    max_examples: int | None = 256
    tasks: Sequence[str] = ()
    decoding: Mapping[str, DecodingConfig] = dataclasses.field(default_factory=dict)
    decode_batch_size: int = 64
    options: OptionScoring = OptionScoring()

    def __post_init__(self) -> None:
        if self.period < 1:
            raise UserError("INFER_EVAL_PERIOD must be at least 1 step", got=self.period)
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError("InferEval.max_examples must be at least 1", got=self.max_examples,
                            fix="leave INFER_EVAL out to evaluate nothing")

    def hook(self, parts: setup.Parts, objective: Any) -> hooks.EvaluateHook:
        """Returns what is called after each step of training.

        Raises:
            UserError: no task has metrics, or the parts do not fit together.
        """
        config = dataclasses.replace(self.dataset_cfg, shuffle=False)
        spec = source.batch_spec(config, objective)
        caches = task_lookup.open_tasks(config, objective, self.tasks)
        judged = [(task, judge) for task in caches
                  if (judge := task_lookup.metrics_of(task, config)).has_metrics]
        if not judged:
            raise UserError("no task has metric functions to evaluate by",
                            got=", ".join(task.name for task in caches),
                            fix="add metric_fns to the SeqIO Task, or leave INFER_EVAL out: "
                                "EVAL_PERIOD evaluates the loss")
        fit.check_model(caches, parts.model.config, getattr(objective, "vocabulary", None))
        codec = task_lookup.text_codec(caches, config, getattr(objective, "vocabulary", None))
        generator = Generator(parts.model, parts.mesh, parts.rules, self.decode_batch_size,
                              self.decoding, spec.target_capacities.get("text", spec.target_length),
                              spec.input_capacities, encode=codec.encode,
                              without_text=getattr(objective, "without_text", None),
                              option_scoring=self.options)
        evaluator = Evaluator(generator, objective, codec.decode, config.seed,
                              read_options=task_lookup.option_reader(
                                  codec, caches, objective, self.options))
        return hooks.EvaluateHook(_Judged(evaluator, judged, self.max_examples), self.period,
                                  prefix=PREFIX)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Parameters -> the numbers of every task's metrics; `training.hooks.Evaluator`."""

    evaluator: Evaluator
    judged: Sequence[tuple[TaskCache, TaskMetrics]]
    max_examples: int | None

    def __call__(self, params: Any) -> dict[str, float]:
        found = {}
        for task, judge in self.judged:
            metrics = self.evaluator.evaluate(params, task, judge, self.max_examples).metrics
            found.update({f"{task.name}/{name}": float(value) for name, value in metrics.items()
                          if isinstance(value, int | float | np.number)
                          and not math.isnan(value)})
        return found
