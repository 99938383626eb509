"""Whether the examples of a task fit in a row: asked before training, and answered with the fix."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from vishwam_t5x.core import storage
from vishwam_t5x.core.batch import BatchSpec, ModalityLengths
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.feature_info import is_history, modality_of
from vishwam_t5x.data.records import TaskRecords

_TEXT = ("text", "inputs", "targets")  # beginnings of names; the last two are T5's tasks'
_logger = logging.getLogger(__name__)


def check_longest(tasks: Sequence[TaskRecords], objective: Any, spec: BatchSpec,
                  max_examples: int | None = None) -> None:
    """Finds out from the table of lengths what would otherwise end a run in its middle.

    Looks at each task's longest records, by every feature and in all, under every denoiser that
    may be drawn. Does nothing for an objective without `possible_lengths`.

    Args:
        tasks: with their lengths.
        objective: what corrupts their examples.
        spec: shapes of the batches.
        max_examples: only the first so many of each task will be read; None: all.

    Raises:
        UserError: an example would fit in no row, or needs more sentinels than there are.
    """
    if not hasattr(objective, "possible_lengths"):
        return
    for task in tasks:
        names, table = task.length_table
        table = table[:max_examples]
        if not table.size:
            continue
        longest = {int(table[:, column].argmax()) for column in range(len(names))}
        for record in sorted(longest | {int(table.sum(axis=1).argmax())}):
            with naming_the_task(task.name, record):
                possible = objective.possible_lengths(
                    dict(zip(names, table[record].tolist(), strict=True)))
            for lengths in possible:
                if why := misfit(spec, lengths, task.name, f"record {record}"):
                    raise why


def check_model(tasks: Sequence[TaskRecords], config: Any, layout: Any = None) -> None:
    """Refuses ids and pictures that a model would take for others, in silence.

    Looks at what the caches' manifests say: ids beyond the tables (a look-up clips them), and grids
    whose width is not the model's (their patches would get other places). What a cache does not say
    is not looked at.

    Args:
        tasks: the tasks.
        config: of the model: `inputs` and `targets`.
        layout: the objective's `VocabularyLayout`, if it has one.

    Raises:
        UserError: the first thing that does not go together.
    """
    table = min((module.vocab_size for module in (*config.inputs, *config.targets)
                 if module.modality == "text" and hasattr(module, "vocab_size")), default=None)
    codes = {module.modality: module for module in (*config.inputs, *config.targets)
             if getattr(module, "token_range", None)}
    grids = {module.modality: module.grid for module in config.inputs
             if hasattr(module, "grid") and module.patch_dim is not None}
    for task in tasks:
        manifest = getattr(task, "manifest", None)
        for name, largest in (manifest.largest_ids if manifest else {}).items():
            modality = modality_of(name)
            if modality == "text" and layout is not None and largest >= layout.size:
                raise UserError(
                    f"task '{task.name}' has text of another vocabulary than the objective's",
                    got=f"id {largest} in '{name}', the layout has {layout.size} ids",
                    fix="set VocabularyLayout.base_size to the pieces of the task's tokenizer, and "
                        "vocab_size of TextInput and TextOutput to the layout's table_size")
            if table is not None and largest >= table and modality in _TEXT:
                raise UserError(
                    f"task '{task.name}' has text of another vocabulary than the model's",
                    got=f"id {largest} in '{name}', the text table has {table} rows",
                    fix=f"vocab_size = {largest + 1} or more, or cache the task with the "
                        "vocabulary that the model was trained with")
            if modality in codes and name.endswith("_codes"):
                first, end = codes[modality].token_range
                if largest >= end - first:
                    raise UserError(
                        f"task '{task.name}' has codes of another codebook than the model's",
                        got=f"code {largest} in '{name}', the model has {end - first} codes",
                        fix=f"set num_codes of modality '{modality}' to the codec's")
        for name, (rows, columns) in getattr(task, "patch_grids", ()):
            modality = modality_of(name)
            if is_history(name) and grids.get(modality, (rows, columns)) != (rows, columns):
                raise UserError(
                    f"frames of task '{task.name}' are not of the model's size",
                    got=f"'{name}' of {rows} x {columns} patches, HistoryInput.grid "
                        f"{grids[modality]}",
                    fix="resize them in the task's preprocessors, or set the grids of modality "
                        f"'{modality}'")
            if modality in grids and columns != grids[modality][1] and _is_read(name):
                raise UserError(
                    f"pictures of task '{task.name}' are not as wide as the model's",
                    got=f"'{name}' of {rows} x {columns} patches, PatchInput.grid "
                        f"{grids[modality]}",
                    fix=f"resize them in the task's preprocessors, or set PatchInput.grid of "
                        f"modality '{modality}'")


def check_vocabularies(tasks: Sequence[TaskRecords], objective: Any) -> None:
    """Refuses tasks whose caches name another vocabulary than the objective does.

    By content, or by name where a file is not on this machine: then that is said. Looks at nothing
    where either names none.

    Args:
        tasks: the tasks.
        objective: its `vocabulary_files` are the model's SentencePiece models, if it has any.

    Raises:
        UserError: a task has another.
    """
    wanted = {file: _digest(file) for file in getattr(objective, "vocabulary_files", ())}
    for task in tasks:
        mine = getattr(task, "metadata", {}).get("vocabulary")
        if not isinstance(mine, dict) or not mine.get("path"):
            continue
        for file, digest in wanted.items():
            known = mine.get("sha256")
            if digest and known:
                same, how = digest == known, "by content"
            else:
                same, how = _base(file) == _base(mine["path"]), "by name alone"
                _logger.info("the vocabulary of task '%s', %s, is held against %s by name alone: "
                             "it is not on this machine", task.name, mine["path"], file)
            if not same:
                raise UserError(
                    f"the vocabulary of task '{task.name}' is not the model's",
                    got=f"{mine['path']}; sentencepiece_model_file = {file}: compared {how}",
                    fix="sentencepiece_model_file = the file that the task was cached with, or "
                        "cache the task with the model's")


def _digest(file: str) -> str | None:
    """sha256 of a file of this machine; None if it is elsewhere."""
    if storage.is_remote(file) or not storage.is_file(file):
        return None
    return hashlib.sha256(storage.read_bytes(file)).hexdigest()


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _is_read(feature: str) -> bool:
    """Whether the encoder may be given a feature; targets' pixels are there to be looked at."""
    return not feature.endswith("_targets")


def misfit(spec: BatchSpec, lengths: ModalityLengths, task: str, what: str) -> UserError | None:
    """Returns why an example fits in no row, or None if it does.

    Args:
        spec: shapes of the batches.
        lengths: slots it takes.
        task: name of its task.
        what: which example, in words.
    """
    for side, sizes, capacities, limit in (
            ("inputs", lengths.inputs, spec.input_capacities, spec.input_length),
            ("targets", lengths.targets, spec.target_capacities, spec.target_length)):
        if unknown := {name for name, size in sizes.items() if size} - capacities.keys():
            modality = min(unknown)
            return UserError(
                f"task '{task}' has {side} of a modality the model does not have",
                got=f"{modality} ({sizes[modality]} slots, {what})",
                fix=f"the model's {side}: {', '.join(capacities)}; choose another model, or "
                    "leave the task out of the mixture")
        needs = [(side, sum(sizes.values()), limit)]
        needs += [(f"{side}/{modality}", sizes.get(modality, 0), capacity)
                  for modality, capacity in capacities.items()]
        for key, need, most in needs:
            if need > most:
                return UserError(
                    f"an example of task '{task}' does not fit in an empty row",
                    got=f"{what} needs {need} of {most} slots of '{key}'; its lengths: inputs "
                        f"{lengths.inputs}, targets {lengths.targets}",
                    fix=f"TASK_FEATURE_LENGTHS['{key}'] = {need} or more, or cut long examples "
                        "into chunks in the task's preprocessors")
    for modality, (most_frames, rows) in spec.frame_limits().items():
        frames = lengths.inputs.get(modality, 0) // spec.histories[modality].latents
        if frames > most_frames:
            return UserError(
                f"an example of task '{task}' has more frames than {rows} rows may have",
                got=f"{what} has {frames} of '{modality}', at most {most_frames}",
                fix="raise the frame budget, or the rows that share it")
    return None


@contextlib.contextmanager
def naming_the_task(task: str, record: int) -> Iterator[None]:
    """Adds the task to what an objective refuses: it knows features only."""
    try:
        yield
    except UserError as error:
        raise UserError(f"task '{task}', record {record}: {error.problem}", error.got,
                        error.fix) from error
