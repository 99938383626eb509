"""What the verbs ask of cached tasks: how their text is written, and what judges them.

A cache's manifest says both where it can; otherwise the SeqIO Task is asked, which imports
TensorFlow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from absl import logging

from vishwam_t5x import screen
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.data import conversions, fit, pictures, source
from vishwam_t5x.data.records import DamagedRecord, TaskCache, TaskRecords
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation.options import OptionReader, OptionScoring
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.objectives.vocabulary import EOS_ID, PAD_ID, VocabularyLayout

_OF_T5 = ("inputs", "targets")  # what T5's own tasks call their text
_CHECKPOINTS = "checkpoints"
_LOOKED_AT = 8  # records of a task, for what all of them have


class TextCodec(Protocol):
    """Text to ids and back; extra tokens by their names."""

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str: ...


class VocabularyCodec:
    """A SeqIO vocabulary that is no SentencePiece model, with a layout's extra tokens."""

    def __init__(self, vocabulary: Any, layout: VocabularyLayout | None) -> None:
        self._vocabulary, self._layout = vocabulary, layout

    def encode(self, text: str) -> np.ndarray:
        """Returns ids, int32 [n], without an end token."""
        return np.asarray(self._vocabulary.encode(text), np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of ids up to the first end token; padding is skipped."""
        parts: list[str] = []
        run: list[int] = []
        for token in [*np.asarray(ids, np.int64).tolist(), EOS_ID]:
            extra = self._layout.name(token) if self._layout is not None else None
            if token == EOS_ID or extra is not None:
                if run:
                    parts.append(self._vocabulary.decode(run))
                    run = []
                if extra is not None:
                    parts.append(extra)
            elif token != PAD_ID:
                run.append(token)
            if token == EOS_ID:
                break
        return " ".join(parts)


def open_tasks(config: DatasetConfig, objective: Any, names: Sequence[str] = ()
               ) -> tuple[TaskCache, ...]:
    """Opens the cached tasks of a mixture, writing what is missing.

    Args:
        config: the mixture and its split.
        objective: gives the patches, and what vocabulary the model has, where it says so.
        names: only these tasks; none: all.

    Raises:
        UserError: an unknown mixture, task or split, or a broken cache.
    """
    if not config.use_cached:
        logging.info("reading the cache: evaluation needs every example once, which a live "
                     "stream cannot promise")
    # Postprocessors look for what tasks fitted to their data beside the caches.
    os.environ[source.CACHE_DIR_VARIABLE] = config.directory
    tasks = source.open_mixture(config, source.patch_specs(objective), repeat=False).tasks
    known = [task.name for task in tasks]
    for name in names:
        if name not in known:
            raise UserError(f"'{config.mixture_or_task_name}' has no task '{name}'", got=name,
                            fix=did_you_mean(name, known) or "its tasks: " + ", ".join(known))
    found = tuple(task for task in tasks if not names or task.name in names)
    fit.check_vocabularies(found, objective)
    return found


def metrics_of(task: TaskCache, config: DatasetConfig) -> TaskMetrics:
    """Returns what judges a task: by its cache's manifest, or else by its SeqIO Task.

    Raises:
        UserError: the manifest or the Task names something that does not exist.
    """
    found = TaskMetrics.from_metadata(task.name, task.metadata)
    if found is not None:
        return found
    _register(config)
    screen.quiet_tensorflow()
    from vishwam_t5x.data.tf import metrics

    given = metrics.seqio_metrics(task.name)
    return TaskMetrics(task.name, given.metric_fns, given.postprocess_fn, given.metric_objs)


def text_codec(tasks: Sequence[TaskCache], config: DatasetConfig,
               layout: VocabularyLayout | None) -> TextCodec:
    """Returns how the tasks' text is written; they share one vocabulary.

    Args:
        tasks: cached tasks.
        config: names the modules that register them.
        layout: the objective's extra tokens; None: those behind the pieces, by default.

    Raises:
        UserError: no task says how, they differ, or the vocabulary is gone.
    """
    described = {task.name: task.metadata["vocabulary"] for task in tasks
                 if isinstance(task.metadata.get("vocabulary"), dict)}
    kinds = {entry.get("sha256") for entry in described.values()}
    if len(kinds) > 1:
        raise UserError("the tasks were cached with different vocabularies",
                        got=", ".join(f"{name}: {entry['path']}"
                                      for name, entry in described.items()),
                        fix="cache them again: vishwam cache --task_or_mixture="
                            f"{config.mixture_or_task_name} --overwrite")
    if described:
        return tokenizer(next(iter(described.values()))["path"], layout)
    _register(config)
    screen.quiet_tensorflow()
    from vishwam_t5x.data.tf import metrics

    vocabulary = metrics.text_vocabulary(_with_text(tasks))
    path = getattr(vocabulary, "sentencepiece_model_file", None)
    if layout is None and any(name in task.features for task in tasks for name in _OF_T5):
        path = None  # Its sentinels are not where our layout has them.
    return tokenizer(path, layout) if path else VocabularyCodec(vocabulary, layout)


def text_ends(tasks: Sequence[TaskRecords], objective: Any) -> tuple[str, ...]:
    """Returns on which sides, 'inputs' and 'targets', the tasks' own texts carry an end token.

    A T5 task appends it (SeqIO's `add_eos`) or does not, and only its examples say so. Of an
    objective that adds ends itself nothing is read.

    Args:
        tasks: cached tasks; (): both sides, as SeqIO's features have it unless told otherwise.
        objective: that of the model.
    """
    if getattr(objective, "adds_ends", True) or not tasks:
        return _OF_T5
    found: dict[str, list[str]] = {side: [] for side in _OF_T5}
    for task in tasks:
        for side in _OF_T5:
            if any(_ends(task, record, side)
                   for record in range(min(task.num_records, _LOOKED_AT))):
                found[side].append(task.name)
    for side, with_end in found.items():
        if 0 < len(with_end) < len(tasks):
            logging.warning("the %s of some tasks have an end (%s), those of others do not: text "
                            "that is given gets one", side, ", ".join(with_end))
    return tuple(side for side in _OF_T5 if found[side])


def option_reader(codec: TextCodec, tasks: Sequence[TaskRecords], objective: Any,
                  scoring: OptionScoring) -> OptionReader | None:
    """Returns what reads the options of the tasks' examples; None if they are not to be read."""
    return OptionReader(codec.encode, text_ends(tasks, objective)) if scoring.tasks else None


def _ends(task: TaskRecords, record: int, side: str) -> bool:
    try:
        clean = task.read(record)
    except DamagedRecord:
        return False
    ids = clean.get(side, clean.get(f"text_{side}", ()))
    return len(ids) > 0 and int(ids[-1]) == EOS_ID


def how_resized(tasks: Sequence[TaskRecords], checkpoint: str | None = None
                ) -> Literal["exact", "fast"]:
    """Returns how pictures are to be read for a model: as those were that it has learned from.

    The data.json of the run says so, or else the tasks' caches; where they read some 'fast' and
    others not, or nobody knows, it is 'exact'. 'fast' only where this machine can.

    Args:
        tasks: cached tasks.
        checkpoint: its path, or that of its MODEL_DIR.
    """
    known, _ = _data_of(checkpoint) if checkpoint else ({}, "")
    cached = [getattr(task, "metadata", {}) for task in tasks]
    found = next(filter(None, (conversions.resized(
        facts.get(conversions.METADATA_KEY) for facts in records)
        for records in (known.values(), cached))), set())
    if len(found) > 1:
        logging.warning("some tasks have read their pictures 'fast', others exactly: those that "
                        "are given are read exactly")
    if found != {"fast"}:
        return "exact"
    return pictures.as_done(pictures.PictureConfig(resize="fast")).resize


def check_learned(tasks: Sequence[Any], checkpoint: str, given: str | None = None) -> None:
    """`check_vocabulary`; and says of tasks that the run has read if they were cached with other
    settings than then: other pixels, say."""
    check_vocabulary(tasks, checkpoint, given)
    known, where = _data_of(checkpoint)
    for task in tasks:
        for line in conversions.differences(
                known.get(task.name, {}).get(conversions.METADATA_KEY),
                getattr(task, "metadata", {}).get(conversions.METADATA_KEY)):
            logging.warning("task '%s' was cached with other settings than the run has read (%s): "
                            "%s", task.name, where, line)


def check_vocabulary(tasks: Sequence[Any], checkpoint: str, given: str | None = None) -> None:
    """Refuses a checkpoint that has learned another vocabulary than that of the tasks.

    Looks at what lies beside it: the data.json of the run whose it is, the SentencePiece model of a
    folder of Hugging Face's. Where neither says anything, nothing is refused.

    Args:
        tasks: cached tasks.
        checkpoint: its path, or that of its MODEL_DIR.
        given: SentencePiece model that texts are read with; it must be the tasks', too.

    Raises:
        UserError: a task, or what is given, has another.
    """
    mine = {f"the vocabulary of task '{task.name}'": entry for task in tasks
            if isinstance(entry := getattr(task, "metadata", {}).get("vocabulary"), dict)}
    if given is not None:
        if not storage.is_file(given):
            raise UserError("there is no such file", got=f"VOCABULARY_PATH = {given!r}")
        digest = hashlib.sha256(storage.read_bytes(given)).hexdigest()
        for what, entry in mine.items():
            if digest != entry.get("sha256"):
                raise UserError(f"{what} is not VOCABULARY_PATH",
                                got=f"{entry['path']}; VOCABULARY_PATH: {given}",
                                fix="VOCABULARY_PATH = None: the caches say what they were written "
                                    "with")
        if tasks and not mine:
            logging.warning("VOCABULARY_PATH is not looked at: %s is read as SeqIO's tasks say",
                            ", ".join(task.name for task in tasks))
        else:
            mine["VOCABULARY_PATH"] = {"path": given, "sha256": digest}
    if not mine:
        return
    digests, model, where = _vocabulary_of(checkpoint)
    for name, entry in mine.items():
        if not digests or entry.get("sha256") in digests:
            continue
        if model is not None and _pieces(entry["path"]) == _pieces(model):
            continue
        raise UserError(f"{name} is not the checkpoint's",
                        got=f"{entry['path']}, sha256 {str(entry.get('sha256'))[:12]}…; {where}: "
                            f"sha256 {min(digests)[:12]}…",
                        fix="take the vocabulary that the checkpoint was trained with, to cache "
                            "the task or as VOCABULARY_PATH, or give another checkpoint")


def _vocabulary_of(checkpoint: str) -> tuple[set[str], str | None, str]:
    """The hashes that are known of a checkpoint's vocabulary, its model, and where it says so."""
    folder = storage.expanded(checkpoint)
    for name in ("spiece.model", "tokenizer.model"):
        if storage.is_file(model := storage.join(folder, name)):
            return {hashlib.sha256(storage.read_bytes(model)).hexdigest()}, model, model
    known, data = _data_of(checkpoint)
    return {facts["vocabulary"] for facts in known.values() if facts.get("vocabulary")}, None, data


def _data_of(checkpoint: str) -> tuple[dict[str, dict[str, Any]], str]:
    """What the run whose checkpoint it is has read, by task, and where it says so."""
    run = _run_of(storage.expanded(checkpoint))
    if run is not None and storage.is_file(data := storage.join(run, "data.json")):
        return json.loads(storage.read_text(data)), data
    return {}, ""


def _run_of(checkpoint: str) -> str | None:
    """The MODEL_DIR of MODEL_DIR, MODEL_DIR/checkpoints and MODEL_DIR/checkpoints/STEP, each with
    '/latest' or without; None of a checkpoint that lies elsewhere."""
    place = storage.place(checkpoint)
    if place.name == "latest":
        place = place.parent
    for folder in (place, place.parent):
        if folder.name == _CHECKPOINTS:
            return str(folder.parent)
    return str(place) if storage.exists(place / _CHECKPOINTS) else None


def _pieces(path: str) -> list[str]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=storage.read_bytes(path))
    return [model.id_to_piece(index) for index in range(model.get_piece_size())]


def tokenizer(path: str, layout: VocabularyLayout | None) -> TextCodec:
    """Returns the codec of a SentencePiece model with a layout's extra tokens."""
    from vishwam_t5x.serving.tokenizer import Tokenizer

    return Tokenizer(path, layout)


def _with_text(tasks: Sequence[TaskCache]) -> str:
    for task in tasks:
        if any(name in ("text", *_OF_T5) or name.startswith("text_") for name in task.features):
            return task.name
    raise UserError("none of the tasks has text", got=", ".join(task.name for task in tasks))


def _register(config: DatasetConfig) -> None:
    screen.quiet_tensorflow()
    from vishwam_t5x.data.tf import examples

    examples.import_task_modules(config.modules)
