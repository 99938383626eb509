"""Checks of the fields of `MixtureOfDenoisers`, each with the fix in its message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vishwam_t5x.core.batch import MODALITIES, ROW_ORDER
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.objectives import no_text
from vishwam_t5x.objectives.span_corruption import check_span_parameters

if TYPE_CHECKING:
    from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers


def check_settings(objective: MixtureOfDenoisers) -> None:
    """Raises `UserError` for the first field that cannot be used."""
    for name, known in (("input_modalities", ROW_ORDER), ("target_modalities", MODALITIES)):
        for modality in getattr(objective, name):
            one_of(modality, known, f"modality in MixtureOfDenoisers.{name}")
    if "text" not in objective.input_modalities:
        raise UserError("the encoder must read text: it carries the prefix token and EOS",
                        got=f"input_modalities = {objective.input_modalities}",
                        fix="add 'text' to MixtureOfDenoisers.input_modalities")
    for modality in objective.code_inputs:
        one_of(modality, tuple(m for m in objective.input_modalities
                               if m in ("image", "audio")),
               "modality in MixtureOfDenoisers.code_inputs")
    if not objective.target_modalities:
        raise UserError("MixtureOfDenoisers.target_modalities is empty", fix="e.g. ('text',)")
    for modality, codec in (objective.codecs or {}).items():
        one_of(modality, [m for m in objective.target_modalities if m != "text"],
               "modality in MixtureOfDenoisers.codecs")
        if codec is not None and not hasattr(codec, "signal"):
            raise UserError(f"MixtureOfDenoisers.codecs['{modality}'] is no codec's config",
                            got=repr(codec), fix="codecs = {'image': %IMAGE_CODEC}")
    _check_weights(objective, "text_weights", ("R", "S", "X"))
    _check_weights(objective, "image_weights", ("R", "S"))
    _check_weights(objective, "audio_weights", ("R", "S"))
    _check_weights(objective, "target_weights", MODALITIES)
    missing = [m for m in objective.target_modalities if m not in objective.target_weights]
    if missing:
        raise UserError("MixtureOfDenoisers.target_weights lacks a target modality",
                        got=", ".join(missing), fix="give each a weight; 0 for never")
    for name, paradigm in (("text_r", "R"), ("text_x", "X")):
        _check_spans(name, getattr(objective, name), objective.text_weights.get(paradigm, 0.0))
    for name in ("text_s_fraction", "image_mask_rate", "audio_mask_rate"):
        value = getattr(objective, name)
        if not 0.0 < value < 1.0:
            raise UserError(f"MixtureOfDenoisers.{name} must lie strictly between 0 and 1",
                            got=value)
    one_of(objective.text_s_split, ("fixed", "uniform"), "text_s_split")
    one_of(objective.masked_loss, ("masked", "all"), "masked_loss")
    if objective.text_s_split == "uniform" and objective.text_s_fraction > 0.5:
        raise UserError("with a uniform split text_s_fraction is a mean and cannot exceed 0.5",
                        got=objective.text_s_fraction,
                        fix="0.5 draws the split anywhere in the text")
    if not isinstance(objective.image_shift, int) or objective.image_shift < 0:
        raise UserError("MixtureOfDenoisers.image_shift must be a whole number of pixels",
                        got=repr(objective.image_shift), fix="0 for no shift")
    no_text.check(objective)
    for step in objective.image_augmentations:
        if not callable(step):
            raise UserError("an entry of image_augmentations cannot be called", got=repr(step),
                            fix="e.g. [@augmentation.RandomShift()]")


def _check_weights(objective: MixtureOfDenoisers, name: str, known: tuple[str, ...]) -> None:
    for key, weight in getattr(objective, name).items():
        one_of(key, known, f"key of MixtureOfDenoisers.{name}")
        if not 0.0 <= weight < float("inf"):
            raise UserError(f"MixtureOfDenoisers.{name}['{key}'] must be finite and not negative",
                            got=weight, fix="weights are relative; 0 for never")


def _check_spans(name: str, spans: tuple[tuple[float, ...], ...], weight: float) -> None:
    for entry in spans:
        if len(entry) != 2:
            raise UserError(f"each entry of MixtureOfDenoisers.{name} is a pair",
                            got=repr(entry), fix="(mean span in tokens, hidden share of the text)")
        check_span_parameters(*entry)
    if weight > 0 and not spans:
        raise UserError(f"MixtureOfDenoisers.{name} is empty although its paradigm has a weight",
                        got=f"weight {weight}", fix="give a denoiser, or weight 0 in text_weights")
