"""Builds the arrays of one model example from a clean example and the denoiser drawn for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vishwam_t5x.core.batch import SignalSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.objectives import augmentation, masking, no_text, span_corruption
from vishwam_t5x.objectives.choices import Denoiser
from vishwam_t5x.objectives.features import FeatureRoles
from vishwam_t5x.objectives.vocabulary import CODE_OFFSET, EOS_ID

if TYPE_CHECKING:
    from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers

NOISE_STREAM = "objective/noise"
AUGMENT_STREAM = "objective/augment"

Clean = Mapping[str, np.ndarray]
Example = dict[str, np.ndarray]


def supervised(objective: MixtureOfDenoisers, roles: FeatureRoles, clean: Clean, seed: int,
               example: int) -> Example:
    """Returns the example that predicts its target features from its input features."""
    out: Example = {}
    text = _ids(clean, roles.inputs["text"]) if "text" in roles.inputs else _NO_IDS
    if no_text.drawn(no_text.rate(objective, roles), seed, example):
        text = no_text.of(objective, roles)
    _put_input_text(out, objective, [(modality, "S") for modality in roles.targets], text)
    for modality, name in roles.inputs.items():
        chosen = _ids(clean, roles.patches[modality]) if modality in roles.patches else None
        if modality in objective.histories:
            _put_frames(out, objective.histories[modality], modality, clean[name], chosen)
        elif modality in objective.code_inputs:
            out[f"inputs/{modality}/tokens"] = _ids(clean, name) + np.int32(CODE_OFFSET)
        elif modality != "text":
            _put_patches(out, objective, modality, clean[name], None, seed, example)
            if chosen is not None:
                _choose_patches(out, modality, chosen)
    for modality, name in roles.targets.items():
        if modality == "text":
            out["targets/text/targets"] = np.concatenate([_ids(clean, name), _EOS])
        else:
            hidden = None
            if modality in roles.masks:
                hidden = _ids(clean, roles.masks[modality]) > 0
            _put_target(out, objective, modality, name, clean, hidden)
    return out


def denoised(objective: MixtureOfDenoisers, roles: FeatureRoles, clean: Clean, denoiser: Denoiser,
             split: float, seed: int, example: int) -> Example:
    """Returns the example that `denoiser` makes of a self-supervised one."""
    out: Example = {}
    rng = functools.partial(example_generator, seed, example, NOISE_STREAM)
    text = _ids(clean, roles.inputs["text"]) if "text" in roles.inputs else _NO_IDS
    masks: dict[str, np.ndarray] = {}
    if denoiser.modality == "text":
        text, target = _corrupt_text(objective, denoiser, text, split, rng)
        out["targets/text/targets"] = np.concatenate([target, _EOS])
    else:
        hidden = None
        modality, name = denoiser.modality, roles.targets[denoiser.modality]
        if denoiser.paradigm == "R":
            spec = getattr(objective, modality)
            grid = spec.grid(clean[roles.inputs[modality]].shape)
            mask = masking.patch_mask(grid[0] * grid[1], denoiser.rate, rng())
            signal = objective.signals.get(modality)
            codes_grid = (spec.codes_grid(grid, len(_ids(clean, name))) if signal is None
                          else signal.grid)
            hidden = masking.code_mask(mask, grid, codes_grid)
            masks[modality] = mask
        _put_target(out, objective, modality, name, clean, hidden)
    if no_text.drawn(no_text.rate(objective, roles, denoiser), seed, example):
        text = no_text.of(objective, roles, denoiser)
    _put_input_text(out, objective, [(denoiser.modality, denoiser.paradigm)], text)
    for modality, name in roles.inputs.items():
        generated = modality == denoiser.modality and modality not in masks
        if modality in objective.histories:
            _put_frames(out, objective.histories[modality], modality, clean[name], None)
        elif modality in objective.code_inputs and not generated:
            out[f"inputs/{modality}/tokens"] = _ids(clean, name) + np.int32(CODE_OFFSET)
        elif modality != "text" and not generated:
            _put_patches(out, objective, modality, clean[name], masks.get(modality), seed, example)
    return out


_NO_IDS = np.zeros((0,), np.int32)
_EOS = np.full((1,), EOS_ID, np.int32)


def _ids(clean: Clean, name: str) -> np.ndarray:
    ids = np.asarray(clean[name])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"the feature '{name}' must be a list of whole numbers",
                        got=f"shape {ids.shape}, dtype {ids.dtype}",
                        fix="tokenize it in the task's preprocessor")
    return ids.astype(np.int32)


def _corrupt_text(objective: MixtureOfDenoisers, denoiser: Denoiser, text: np.ndarray,
                  split: float, rng: Callable[[], np.random.Generator]
                  ) -> tuple[np.ndarray, np.ndarray]:
    if denoiser.paradigm == "S":
        suffix = span_corruption.suffix_length(len(text), objective.text_s_share(split))
        return text[:len(text) - suffix], text[len(text) - suffix:]
    mask = span_corruption.noise_mask(len(text), denoiser.rate, denoiser.mean_span, rng())
    return span_corruption.corrupt(text, mask, objective.vocabulary.sentinels)


def without_text(objective: MixtureOfDenoisers, tokens: np.ndarray, modality: str) -> np.ndarray:
    """Returns what `_put_input_text` made of a text, had it been that which stands for none."""
    is_prefix = tokens >= objective.vocabulary.prefix_start
    number = int(np.argmin(is_prefix)) if objective.mode_tokens and is_prefix.any() else 0
    return np.concatenate([tokens[:number], no_text.ids(objective, modality), _EOS])


def _put_input_text(out: Example, objective: MixtureOfDenoisers,
                    tasks: Sequence[tuple[str, str]], text: np.ndarray) -> None:
    prefix = [objective.vocabulary.prefix(*task) for task in tasks] if objective.mode_tokens else []
    out["inputs/text/tokens"] = np.concatenate([np.asarray(prefix, np.int32), text, _EOS])


def _put_patches(out: Example, objective: MixtureOfDenoisers, modality: str, array: np.ndarray,
                 mask: np.ndarray | None, seed: int, example: int) -> None:
    """Gives the encoder the patches of an array; with a mask only those it leaves visible."""
    # A masked image must stay where its codes are.
    if modality == "image" and mask is None and objective.augmentations:
        array = augmentation.augment(array, objective.augmentations,
                                     example_generator(seed, example, AUGMENT_STREAM))
    patches = _numbers(masking.patchify(np.asarray(array), getattr(objective, modality)), modality)
    positions = np.arange(len(patches), dtype=np.int32)
    if mask is not None:
        patches, positions = patches[~mask], positions[~mask]
    out[f"inputs/{modality}/input"] = patches
    out[f"inputs/{modality}/pos_ids"] = positions


def _put_frames(out: Example, spec: masking.FrameSpec, modality: str, array: np.ndarray,
                chosen: np.ndarray | None) -> None:
    """Gives the encoder the frames of a history; of each only the patches chosen."""
    patches = masking.patchify_frames(np.asarray(array), spec)
    out[f"inputs/{modality}/input"] = _numbers(patches, modality)
    if chosen is None:
        return
    mask = np.zeros(patches.shape[:2], np.int32)
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < mask.size:
        raise UserError(f"an example chooses patches that its {modality} does not have",
                        got=f"{chosen.min()} to {chosen.max()} of {mask.size}")
    mask.reshape(-1)[chosen] = 1
    if not (seen := mask.any(axis=1)).all():
        raise UserError(f"an example chooses no patch of a frame of its {modality}",
                        got=f"frame {int(np.argmin(seen)) + 1} of {len(mask)}",
                        fix="leave that frame out in the task's preprocessors")
    out[f"inputs/{modality}/mask"] = mask


def _numbers(patches: np.ndarray, modality: str) -> np.ndarray:
    """Returns patches as the model reads them: float32, or pixels as they are, 255 for 1.0."""
    if patches.dtype == np.uint8:
        return patches
    if not np.issubdtype(patches.dtype, np.floating):
        raise UserError(f"a feature of modality '{modality}' must be floats, or uint8 pixels",
                        got=str(patches.dtype), fix="convert it in the task's preprocessor")
    return patches.astype(np.float32, copy=False)


def _choose_patches(out: Example, modality: str, chosen: np.ndarray) -> None:
    """Leaves the encoder the chosen patches only; they stay where they are."""
    prefix, number = f"inputs/{modality}", len(out[f"inputs/{modality}/input"])
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < number:
        raise UserError(f"an example chooses patches that its {modality} does not have",
                        got=f"{chosen.min()} to {chosen.max()} of {number}")
    for name in ("input", "pos_ids"):
        out[f"{prefix}/{name}"] = out[f"{prefix}/{name}"][chosen]


def _put_target(out: Example, objective: MixtureOfDenoisers, modality: str, name: str,
                clean: Clean, hidden: np.ndarray | None) -> None:
    """Asks for codes: those of the example, or of its pixels or spectrogram by the model's codec.
    """
    signal = objective.signals.get(modality)
    if signal is None:
        codes = _ids(clean, name)
        out[f"targets/{modality}/targets"], number = codes + np.int32(CODE_OFFSET), len(codes)
    else:
        out[f"targets/{modality}/{signal.name}"] = as_signal(clean[name], signal, name)[None]
        number = signal.num_codes
    if hidden is not None and len(hidden) != number:
        raise UserError(f"the task mask of an example's {modality} is not as long as its codes",
                        got=f"{len(hidden)} and {number}")
    out[f"targets/{modality}/loss_mask"] = (
        hidden.astype(np.int32) if hidden is not None and objective.masked_loss == "masked"
        else np.ones((number,), np.int32))
    if objective.task_masks and hidden is not None:
        out[f"targets/{modality}/task_mask"] = hidden.astype(np.int32)


def as_signal(array: np.ndarray, spec: SignalSpec, name: str) -> np.ndarray:
    """Returns a picture or spectrogram as a batch holds it; floating pixels become whole 255ths.

    Args:
        array: [height, width, channels], [height, width] for one channel, or [frames, mel bins].
        spec: what the model's codec codes.
        name: of the feature.

    Raises:
        UserError: it is of another size or type.
    """
    array = np.asarray(array)
    if array.ndim == 2 and len(spec.shape) == 3:
        array = array[..., None]
    elif array.ndim == 3 and len(spec.shape) == 2 and array.shape[2] == 1:
        array = array[..., 0]
    floating = np.issubdtype(array.dtype, np.floating)
    if array.shape != spec.shape or not (floating or str(array.dtype) == spec.dtype):
        raise UserError(f"the feature '{name}' is not what the model's codec codes",
                        got=f"{array.dtype} {array.shape}, not {spec.dtype} {spec.shape}",
                        fix="resize it in the task's preprocessor, or change the codec's config")
    if spec.dtype == "uint8" and floating:
        array = np.rint(np.clip(array, 0, 1) * 255)
    return array.astype(spec.dtype, copy=False)
