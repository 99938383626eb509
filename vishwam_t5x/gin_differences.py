"""What changed between two configurations, and whether it changes what a resumed run learns."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Collection, Iterator
from typing import Any

from vishwam_t5x import gin_config
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.gin_graph import Graph, Key, Macro, Reach, macros_in, name_of, parameters_of

# Parameters that may change on resume without changing the mathematics, as patterns over
# "module.Class.parameter", each with the reason. What only they refer to may change too.
# TRAIN_STEPS is not here by name: as the length of the loop it is free, as the length of a cosine
# schedule it changes every later step.
NOT_MATHEMATICAL = {
    "*.model_dir": "where files are written",
    "*.compilation_cache_dir": "where compiled programs are kept",
    "*.checkpoint_cfg": "when checkpoints are written and which are kept",
    "*.initial_checkpoint_path": "read only where there is no checkpoint yet",
    "*.train.total_steps": "how long the loop runs",
    "*.early_stop": "how long the loop runs",
    "*.stats_period": "when metrics are written",
    "*.watchdog": "when to give up",
    "*.use_tensorboard": "who hears of the metrics",
    "*.eval_period": "evaluation does not touch the state",
    "*.eval_examples": "evaluation does not touch the state",
    "*.train_eval_dataset_cfg": "evaluation does not touch the state",
    "*.infer_eval": "evaluation does not touch the state",
    "*.profile_steps": "what is profiled",
    "*.profile_start": "what is profiled",
    "*.mesh": "where arrays lie",
    "*.logical_axis_rules": "where arrays lie",
    "*.num_microbatches": "sums are normalised by the whole batch: the same result to rounding",
    "*.max_rows_per_device": "as num_microbatches",
    "*.EncoderDecoderConfig.remat_policy": "recomputation: the same numbers",
    "*.DatasetConfig.cache_dir": "where examples lie; data.json says whether they are the same",
    "*.DatasetConfig.keep_in_memory_mib": "where examples lie",
    "*.DatasetConfig.max_bad_fraction": "when to give up",
    "*.DatasetConfig.prefetch": "how far ahead batches are made",
    "*.DatasetConfig.read_threads": "how many threads read; the order is fixed",
    "*.partitioner": "where arrays lie",
    "*.infer_eval_dataset_cfg": "evaluation does not touch the state",
    "*.eval_steps": "evaluation does not touch the state",
    "*.inference_evaluator_cls": "evaluation does not touch the state",
    "t5x.evaluate.*": "another verb",
    "t5x.infer.*": "another verb",
    "vishwam_t5x.evaluate.*": "another verb",
    "vishwam_t5x.infer.*": "another verb",
    "vishwam_t5x.forward.*": "another verb",
    "vishwam_t5x.inspect.*": "another verb",
    "vishwam_t5x.cache.*": "another verb",
}
# Each microbatch draws its own dropout masks: with dropout, another number of them is another run.
_MASKS = ("*.num_microbatches", "*.max_rows_per_device")
_ONLY_THROUGH = "only such settings refer to it"
_ABSENT = "(default)"
_SHOWN = 3  # parameters that a changed macro reaches, in a message


@dataclasses.dataclass(frozen=True)
class Difference:
    """One change between two configurations.

    Attributes:
        name: the macro that changed, or the parameter when no macro explains it.
        old: the value before, as gin writes it; "(default)" if it was not bound.
        new: the value now.
        parameters: the parameters it reaches; those alone that count, if any does.
        reason: why it does not change the mathematics; "" if it does.
    """

    name: str
    old: str
    new: str
    parameters: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.old} -> {self.new}"


def differences(old: Graph, new: Graph) -> list[Difference]:
    """Returns what changed from `old` to `new`, by resolved value.

    A literal that became a macro of the same value is no change, nor is a default bound explicitly.
    Several parameters that one changed macro explains are one difference.
    """
    found: dict[str, Difference] = {}
    for name in {name: None for graph in (old, new) for name in graph.roots()[1]}:
        before, after = (repr(graph.resolve(Macro(name))) for graph in (old, new))
        if before != after:  # Not behind a parameter: the MODEL of a bare model file.
            found[name] = Difference(name, before, after, (), "")
    dropout = _has_dropout(old) or _has_dropout(new)
    mathematical = {key for graph in (old, new) for key in Reach(
        graph, *graph.roots(), skip=lambda key: bool(_reason(key, dropout))).bindings}
    for key in sorted({*old.bindings, *new.bindings}, key=str):
        before, after = _value(old, key), _value(new, key)
        if before == after:
            continue
        reason = _reason(key, dropout) or ("" if key in mathematical else _ONLY_THROUGH)
        for name, left, right in _causes(old, new, key) or [(str(key), before, after)]:
            earlier = found.get(name)
            if earlier is None or (earlier.reason and not reason):
                found[name] = Difference(name, left, right, (str(key),), reason)
            elif bool(earlier.reason) == bool(reason):
                found[name] = dataclasses.replace(
                    earlier, parameters=(*earlier.parameters, str(key)))
    return list(found.values())


def math_differences(old_text: str, new_text: str, allowed: Collection[str] = ()
                     ) -> list[Difference]:
    """Compares the configuration a run was started with to the one it is resumed with.

    Args:
        old_text: `ParsedConfig.text()` of the run so far (MODEL_DIR/config.gin).
        new_text: `ParsedConfig.text()` of now.
        allowed: names of changes that are meant (--allow_config_change); a macro, a parameter, the
            last part of a parameter's name, or "all".

    Returns:
        Every difference, for the log.

    Raises:
        UserError: a difference changes the mathematics and is not allowed by name; or the old
            configuration names something that does not exist any more.
    """
    try:
        old = gin_config.read_text(old_text, "config.gin of the run")
    except UserError as error:
        if "all" in allowed:
            return []  # Not comparable, and the user has said that no change matters.
        raise UserError(
            "the configuration this run was started with cannot be compared", got=error,
            fix="start a new MODEL_DIR, or pass --allow_config_change=all") from None
    every = differences(old, gin_config.read_text(new_text, "the configuration now"))
    refused = [change for change in every if not change.reason and not _allowed(change, allowed)]
    if refused:
        free = [change for change in every if change.reason]
        lines = "\n       ".join(map(_with_parameters, refused))
        if free:
            lines += "\n       (harmless: " + "; ".join(map(str, free)) + ")"
        names = ",".join(change.name for change in refused)
        raise UserError("the configuration changed in what the run computes", got=lines,
                        fix="put the old values back, or say that the change is meant with "
                        f"--allow_config_change={names}")
    return every


def _with_parameters(change: Difference) -> str:
    if any(fnmatch.fnmatchcase(name, pattern) for name in change.parameters for pattern in _MASKS):
        return f"{change}   (changes the dropout masks)"
    if change.parameters in ((), (change.name,)):
        return str(change)
    more = len(change.parameters) - _SHOWN
    return f"{change}   in {', '.join(change.parameters[:_SHOWN])}" + (
        f" and {more} more" if more > 0 else "")


def _value(graph: Graph, key: Key) -> str:
    """Returns the resolved value of `key`, its default if it is not bound."""
    bound = graph.bindings.get(key)
    if bound is not None:
        return repr(graph.resolve(bound.value))
    parameter = parameters_of(key.target).get(key.parameter)
    if parameter is None or parameter.default is inspect.Parameter.empty or key.scope:
        return _ABSENT
    return repr(parameter.default)


def _causes(old: Graph, new: Graph, key: Key) -> list[tuple[str, str, str]]:
    """Returns (macro, old, new) of the changed macros behind a binding written the same way."""
    before, after = old.bindings.get(key), new.bindings.get(key)
    if before is None or after is None or repr(before.value) != repr(after.value):
        return []
    return [(name, *values) for name, values in dict(_changed(old, new, before.value)).items()]


def _changed(old: Graph, new: Graph, value: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields the innermost macros in `value` whose definitions differ, with both values."""
    for name in macros_in(value):
        left, right = old.macro(name), new.macro(name)
        if left is None or right is None:
            continue
        if repr(left.value) == repr(right.value):
            yield from _changed(old, new, left.value)
        elif repr(old.resolve(left.value)) != repr(new.resolve(right.value)):
            yield name, (repr(old.resolve(left.value)), repr(new.resolve(right.value)))


def _has_dropout(graph: Graph) -> bool:
    """Whether any part of the configuration drops anything; unbound, dropout is 0."""
    return any(key.parameter.endswith("dropout_rate")
               and repr(graph.resolve(binding.value)) not in ("0", "0.0")
               for key, binding in graph.bindings.items())


def _reason(key: Key, dropout: bool) -> str:
    name = f"{name_of(key.target)}.{key.parameter}"
    if dropout and any(fnmatch.fnmatchcase(name, pattern) for pattern in _MASKS):
        return ""
    return next((reason for pattern, reason in NOT_MATHEMATICAL.items()
                 if fnmatch.fnmatchcase(name, pattern)), "")


def _allowed(change: Difference, allowed: Collection[str]) -> bool:
    names = {change.name, change.name.rpartition(".")[2]}
    return "all" in allowed or bool(names & set(allowed))
