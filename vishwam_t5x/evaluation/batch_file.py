"""A batch from an `.npz` file, in this project's keys or in T5X's feature names."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, did_you_mean

T5X_FEATURES = {
    "encoder_input_tokens": "inputs/text/tokens",
    "encoder_positions": "inputs/text/pos_ids",
    "encoder_segment_ids": "inputs/text/segment_ids",
    "decoder_input_tokens": "targets/text/inputs",
    "decoder_target_tokens": "targets/text/targets",
    "decoder_loss_weights": "targets/text/loss_mask",
    "decoder_positions": "targets/text/pos_ids",
    "decoder_segment_ids": "targets/text/segment_ids",
}
"""T5X's encoder-decoder features (its EncDecFeatureConverter) and the arrays they are here."""

_INPUT_ARRAYS = ("tokens", "input", "mask", "pos_ids", "segment_ids")
_FRAME_ARRAYS = ("frame_ids",)  # of histories only
# Unified-IO 2's batches have a task_mask; only dynamic_mask and mask_token of a CodeOutput read it.
_TARGET_ARRAYS = ("targets", "inputs", "mask", "loss_mask", "task_mask", "pos_ids", "segment_ids")


def read_batch(path: str | os.PathLike, input_modalities: tuple[str, ...],
               target_modalities: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads a batch and fills in what follows from the rest.

    Defaults: text masks are `tokens > 0` and `targets > 0`, other masks ones; positions, and the
    frames of a history, count from 0 (within each segment, where there are segments); decoder
    inputs are the targets shifted right with 0 in front (of each segment).

    Args:
        path: an .npz file with keys 'inputs/<modality>/…' and 'targets/<modality>/…', all arrays
            [B, N] or [B, N, patch_dim], or with the keys of `T5X_FEATURES`. 'inputs/row/index' and
            'targets/row/index' [B, L] for packed batches. Histories: `input` [B, F, P, patch_dim],
            `mask` and `pos_ids` [B, F, P], `frame_ids` and `segment_ids` [B, F]. Keys 'batch/…'
            are read without 'batch/'.
        input_modalities: what the model reads.
        target_modalities: what the model writes.

    Returns:
        The batch: integers as int32, floats as float32.

    Raises:
        UserError: the file cannot be read, a key is unknown, or shapes do not go together.
    """
    arrays = _load(path)
    unknown = [name for name in arrays if name not in T5X_FEATURES
               and not _is_known(name, input_modalities, target_modalities)]
    if unknown:
        known = [*T5X_FEATURES, *_known_names(input_modalities, target_modalities)]
        raise UserError(f"{path} holds arrays the model has no use for", got=", ".join(unknown),
                        fix=did_you_mean(unknown[0], known) or "known: " + ", ".join(known))
    batch: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        key = T5X_FEATURES.get(name, name)
        if key in batch:
            raise UserError(f"{path} holds '{key}' under two names", got=", ".join(arrays))
        batch[key] = _as_batch_dtype(name, value)
    if not any(name.endswith("/targets") for name in batch):
        raise UserError(f"{path} holds no targets", got=", ".join(arrays) or "no arrays",
                        fix="e.g. targets/text/targets or decoder_target_tokens, int32 [B, M]")
    for modality in input_modalities:
        _complete_inputs(batch, f"inputs/{modality}", path)
    for modality in target_modalities:
        _complete_targets(batch, f"targets/{modality}", path)
    rows = {value.shape[0] for value in batch.values()}
    if len(rows) != 1:
        raise UserError(f"the arrays of {path} have different numbers of rows",
                        got=", ".join(f"{name} {value.shape}" for name, value in batch.items()))
    return batch


def _load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    fix = "give an .npz file as numpy.savez writes it"
    try:
        # Read whole: it may lie in an object store.
        file = np.load(io.BytesIO(storage.read_bytes(path)))
        if isinstance(file, np.ndarray):
            raise UserError("the batch cannot be read", got=f"{path}: one array", fix=fix)
        with file:
            return {name.removeprefix("batch/"): file[name] for name in file.files}
    except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("the batch cannot be read", got=f"{path}: {error}", fix=fix) from error


def _known_names(input_modalities: tuple[str, ...],
                 target_modalities: tuple[str, ...]) -> list[str]:
    names = ["inputs/row/index", "targets/row/index"]
    names += [f"inputs/{m}/{array}" for m in input_modalities
              for array in (*_INPUT_ARRAYS, *_FRAME_ARRAYS)]
    return names + [f"targets/{m}/{array}" for m in target_modalities for array in _TARGET_ARRAYS]


def _is_known(name: str, input_modalities: tuple[str, ...],
              target_modalities: tuple[str, ...]) -> bool:
    return name in _known_names(input_modalities, target_modalities)


def _as_batch_dtype(name: str, value: np.ndarray) -> np.ndarray:
    if np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_:
        if value.size and (value.max() > np.iinfo(np.int32).max or value.min() < -1):
            raise UserError(f"'{name}' does not fit in int32, or is below -1",
                            got=f"{value.min()} to {value.max()}")
        return value.astype(np.int32)
    if np.issubdtype(value.dtype, np.floating):
        return value.astype(np.float32)
    raise UserError(f"'{name}' is neither whole numbers nor floats", got=str(value.dtype))


def positions(segment_ids: Int[np.ndarray, "B N"]) -> Int[np.ndarray, "B N"]:
    """Returns the position of each slot in its own segment, segments being contiguous runs."""
    index = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    return (index - np.maximum.accumulate(np.where(_starts(segment_ids), index, 0), axis=1)
            ).astype(np.int32)


def shift_right(targets: Int[np.ndarray, "B M"],
                segment_ids: Int[np.ndarray, "B M"]) -> Int[np.ndarray, "B M"]:
    """Returns teacher-forced decoder inputs: targets moved by one, 0 at the start of a segment."""
    moved = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return np.where(_starts(segment_ids), 0, moved).astype(np.int32)


def _starts(segment_ids: np.ndarray) -> np.ndarray:
    starts = np.ones(segment_ids.shape, np.bool_)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def _complete_inputs(batch: dict[str, np.ndarray], prefix: str, path: object) -> None:
    content = next((f"{prefix}/{name}" for name in ("tokens", "input")
                    if f"{prefix}/{name}" in batch), None)
    if content is None:
        _none_without(batch, prefix, path, "tokens (text) or input (patches)")
        return
    expected_rank = 2 if content.endswith("/tokens") else 3
    if content.endswith("/input") and batch[content].ndim == 4:
        _complete_frames(batch, prefix)
        return
    if f"{prefix}/frame_ids" in batch:
        raise UserError(f"'{prefix}/frame_ids' is for histories, which have 4 axes",
                        got=f"'{content}' of shape {batch[content].shape}")
    if batch[content].ndim != expected_rank:
        raise UserError(f"'{content}' must have {expected_rank} axes",
                        got=f"shape {batch[content].shape}")
    shape = batch[content].shape[:2]
    mask = (batch[content] > 0 if expected_rank == 2 else np.ones(shape)).astype(np.int32)
    _complete(batch, prefix, shape, mask)


def _complete_frames(batch: dict[str, np.ndarray], prefix: str) -> None:
    frames, places = batch[f"{prefix}/input"].shape[:2], batch[f"{prefix}/input"].shape[:3]
    for name, shape in (("mask", places), ("pos_ids", places), ("frame_ids", frames),
                        ("segment_ids", frames)):
        value = batch.get(f"{prefix}/{name}")
        if value is not None and value.shape != shape:
            raise UserError("arrays of one modality have different shapes",
                            got=f"{prefix}/{name} {value.shape}, expected {shape}")
    batch.setdefault(f"{prefix}/mask", np.ones(places, np.int32))
    batch.setdefault(f"{prefix}/pos_ids", np.broadcast_to(
        np.arange(places[2], dtype=np.int32), places).copy())
    segments = batch.get(f"{prefix}/segment_ids", np.ones(frames, np.int32))
    batch.setdefault(f"{prefix}/frame_ids", positions(segments))


def _complete_targets(batch: dict[str, np.ndarray], prefix: str, path: object) -> None:
    if f"{prefix}/targets" not in batch:
        _none_without(batch, prefix, path, "targets")
        return
    targets = batch[f"{prefix}/targets"]
    if targets.ndim != 2:
        raise UserError(f"'{prefix}/targets' must be [rows, length]", got=f"shape {targets.shape}")
    text = prefix.endswith("/text")
    mask = (targets > 0 if text else np.ones(targets.shape)).astype(np.int32)
    segments = _complete(batch, prefix, targets.shape, mask)
    batch.setdefault(f"{prefix}/inputs", shift_right(targets, segments))


def _complete(batch: dict[str, np.ndarray], prefix: str, shape: tuple[int, ...],
              mask: np.ndarray) -> np.ndarray:
    mask = batch.setdefault(f"{prefix}/mask", mask)
    segments = batch.get(f"{prefix}/segment_ids", np.ones(shape, np.int32))
    for name in _INPUT_ARRAYS[2:] + _TARGET_ARRAYS[1:]:
        value = batch.get(f"{prefix}/{name}")
        if value is not None and value.shape[:2] != shape:
            raise UserError("arrays of one modality have different shapes",
                            got=f"{prefix}/{name} {value.shape[:2]}, expected {shape}")
    batch.setdefault(f"{prefix}/pos_ids", positions(segments))
    return segments


def _none_without(batch: Mapping[str, np.ndarray], prefix: str, path: object, what: str) -> None:
    orphans = [name for name in batch if name.startswith(prefix + "/")]
    if orphans:
        raise UserError(f"{path} holds parts of '{prefix}' but not its {what}",
                        got=", ".join(orphans), fix=f"add '{prefix}/…' {what}")
