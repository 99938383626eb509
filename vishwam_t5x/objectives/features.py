"""What the features of a clean example are for, told from their names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from vishwam_t5x.core.batch import HISTORIES, SignalSpec, modality_order
from vishwam_t5x.core.errors import UserError, did_you_mean

SUPERVISED_INPUTS = {"text_inputs": "text", "image_inputs": "image", "audio_inputs": "audio",
                     "image_history_inputs": "image_history",
                     "audio_history_inputs": "audio_history", "inputs": "text"}
SUPERVISED_TARGETS = {"text_targets": "text", "image_target_codes": "image",
                      "audio_target_codes": "audio", "targets": "text"}
"""Features by modality; `inputs` and `targets` are what T5's own tasks call their text."""
_SUPERVISED_SIGNALS = {"image": ("image_target_codes", "image_targets"),
                       "audio": ("audio_target_codes", "audio_targets")}
_NEUTRAL_SIGNALS = {"image": ("image_codes", "image_pixels", "image"),
                    "audio": ("audio_codes", "audio_spectrogram")}
"""The codes of a modality, then what a codec makes them of, the first of which there is. Pixels are
read where the model has the codec; else they are there beside their codes for people to look at.
An image as the encoder is given it may do for the codec; spectrograms are scaled otherwise."""
INPUT_PATCHES = {f"{modality}_input_patches": f"{modality}_inputs"
                 for modality in ("image", "audio", *HISTORIES)}
"""Numbers of the patches that the encoder is given of an image, a spectrogram or a history (counted
on from frame to frame); without them it is given all."""
TARGET_MASKS = {"image_target_task_masks": "image_target_codes",
                "audio_target_task_masks": "audio_target_codes"}
"""Which codes the task hid from the encoder: 1, or 0; of inpainting those inside the box."""
INPUT_CODES = {"image_input_codes": "image_inputs", "audio_input_codes": "audio_inputs"}
"""What is read where the objective's `code_inputs` say so; pixels beside it are for people."""
PROMPT = "text_prompt"
"""Text that asks for what was hidden of an image or sound to be restored; never itself hidden."""
NEUTRAL_INPUTS = {"text": "text", PROMPT: "text", "image": "image", "audio": "audio",
                  **{modality: modality for modality in HISTORIES}}
NEUTRAL_TARGETS = {"text": "text", "image_codes": "image", "audio_codes": "audio"}

_SUPERVISED = {*SUPERVISED_INPUTS, *SUPERVISED_TARGETS, *INPUT_CODES,
               *(name for names in _SUPERVISED_SIGNALS.values() for name in names)}
_NEUTRAL = {*NEUTRAL_INPUTS, *NEUTRAL_TARGETS,
            *(name for names in _NEUTRAL_SIGNALS.values() for name in names)}
_ABOUT = {**INPUT_PATCHES, **TARGET_MASKS}


@dataclasses.dataclass(frozen=True)
class FeatureRoles:
    """Which feature feeds which modality.

    Attributes:
        supervised: the example says what to predict from what; otherwise a denoiser decides.
        inputs: modality -> feature the encoder can be given, in row order.
        targets: modality -> feature the decoder can be asked for, in row order.
        patches: modality -> feature with the numbers of the patches that the encoder is given.
        masks: modality -> feature that says which codes the encoder cannot see.
        num_codes: modality -> codes of each target that is given as pixels or as a spectrogram.
    """

    supervised: bool
    inputs: dict[str, str]
    targets: dict[str, str]
    patches: dict[str, str] = dataclasses.field(default_factory=dict)
    masks: dict[str, str] = dataclasses.field(default_factory=dict)
    num_codes: dict[str, int] = dataclasses.field(default_factory=dict)

    def target_length(self, modality: str, clean_lengths: Mapping[str, Any]) -> Any:
        """Returns the tokens or codes of a target: one number, or those of many examples."""
        length = clean_lengths[self.targets[modality]]
        codes = self.num_codes.get(modality)
        return length if codes is None else codes + 0 * length

    @functools.cached_property
    def sizes(self) -> dict[str, str]:
        """Modality -> feature whose length is the number of slots, or frames, of the input."""
        return {**self.inputs, **{modality: name for modality, name in self.patches.items()
                                  if modality not in HISTORIES}}

    @property
    def prompted(self) -> bool:
        """Whether the text asks to restore something."""
        return self.inputs.get("text") == PROMPT


def feature_roles(names: Iterable[str], input_modalities: tuple[str, ...],
                  target_modalities: tuple[str, ...],
                  ignored: tuple[str, ...] = (),
                  signals: Mapping[str, SignalSpec] | None = None,
                  code_inputs: tuple[str, ...] = ()) -> FeatureRoles:
    """Sorts the features of a clean example by role.

    Args:
        names: feature names of one example; `meta_*` are skipped.
        input_modalities: what the encoder can read.
        target_modalities: what the decoder can write.
        ignored: features to leave out on purpose.
        signals: target modalities that are read as pixels or spectrograms.
        code_inputs: input modalities that are read as codes.

    Raises:
        UserError: an unknown feature, supervised and neutral features mixed, a feature whose
            modality the model does not have, pixels to predict without their codes (or, of
            `signals`, codes without their pixels), an input that is pixels but not codes where
            codes are read or the reverse, or nothing to predict.
    """
    names = [name for name in names if not name.startswith("meta_") and name not in ignored]
    about = [name for name in names if name in _ABOUT]
    names = [name for name in names if name not in _ABOUT]
    for name in about:
        pixels = _ABOUT[name].replace("_target_codes", "_targets")
        if _ABOUT[name] not in names and pixels not in names:
            raise UserError(f"an example has '{name}' without '{_ABOUT[name]}'",
                            got=", ".join([*names, *about]))
        if name in INPUT_PATCHES and SUPERVISED_INPUTS[INPUT_PATCHES[name]] in code_inputs:
            raise UserError(f"an example has '{name}', but codes are read and not patches",
                            got=f"code_inputs = {code_inputs}",
                            fix=f"add '{name}' to ignored_features")
    for name in names:
        if name not in _SUPERVISED and name not in _NEUTRAL:
            known = sorted({*_SUPERVISED, *_NEUTRAL, *_ABOUT})
            raise UserError("an example has a feature with no known role", got=name,
                            fix=did_you_mean(name, known) or "known: " + ", ".join(known))
    supervised = [name for name in names if name in _SUPERVISED]
    if supervised and len(supervised) != len(names):
        raise UserError(
            "an example mixes supervised features with self-supervised ones",
            got=", ".join(names),
            fix="use *_inputs and *_targets, or text, image, audio and their codes, not both; "
                "name what to leave out in ignored_features")
    if PROMPT in names and "text" in names:
        raise UserError(f"an example has 'text' and '{PROMPT}'", got=", ".join(names),
                        fix=f"'{PROMPT}' asks to restore an image or sound; 'text' is denoised")
    in_names, out_names = ((SUPERVISED_INPUTS, SUPERVISED_TARGETS) if supervised
                           else (NEUTRAL_INPUTS, NEUTRAL_TARGETS))
    inputs = {in_names[name]: name for name in names if name in in_names}
    inputs |= _read_as_codes(names, inputs, code_inputs, bool(supervised))
    targets = {out_names[name]: name for name in names if name in out_names}
    _check_modalities(inputs, input_modalities, "input_modalities")
    if supervised:
        _check_modalities(targets, target_modalities, "target_modalities")
    sources = _SUPERVISED_SIGNALS if supervised else _NEUTRAL_SIGNALS
    for modality, (codes, *features) in sources.items():
        _choose_source(targets, modality, codes, features, names, modality in (signals or {}))
    if not supervised:
        targets = {m: name for m, name in targets.items() if m in target_modalities}
    if not targets:
        raise UserError("an example has nothing to predict", got=", ".join(names) or "no features",
                        fix=f"target_modalities is {target_modalities}; give one of "
                            + ", ".join([*SUPERVISED_TARGETS, *NEUTRAL_TARGETS]))
    return FeatureRoles(bool(supervised), {m: inputs[m] for m in modality_order(inputs)},
                        {m: targets[m] for m in modality_order(targets)},
                        {SUPERVISED_INPUTS[INPUT_PATCHES[name]]: name for name in about
                         if name in INPUT_PATCHES},
                        {SUPERVISED_TARGETS[TARGET_MASKS[name]]: name for name in about
                         if name in TARGET_MASKS},
                        {m: spec.num_codes for m, spec in (signals or {}).items() if m in targets})


def _choose_source(targets: dict[str, str], modality: str, codes: str, features: list[str],
                   names: list[str], as_signal: bool) -> None:
    """Lets `targets` have the codes of a modality, or the pixels or spectrogram instead."""
    found = [name for name in features if name in names]
    if as_signal and found:
        targets[modality] = found[0]
    elif as_signal and codes in names:
        raise UserError(f"an example has '{codes}', but the model is to code {modality} itself",
                        got=", ".join(names),
                        fix=f"a task with '{features[0]}', or leave '{modality}' out of "
                            "MixtureOfDenoisers.codecs")
    elif features[0] in names and codes not in names:
        raise UserError(f"an example has '{features[0]}' without '{codes}'", got=", ".join(names),
                        fix="let the task write the codes; or give the model a codec, and the "
                            "objective too: MixtureOfDenoisers.codecs")


def _read_as_codes(names: list[str], inputs: dict[str, str], code_inputs: tuple[str, ...],
                   supervised: bool) -> dict[str, str]:
    """Modality -> feature with the codes that are read of it."""
    found = {}
    for modality in code_inputs:
        codes = f"{modality}_input_codes" if supervised else f"{modality}_codes"
        if codes in names:
            found[modality] = codes
        elif modality in inputs:
            raise UserError(f"an example has '{inputs[modality]}' without '{codes}'",
                            got=f"code_inputs = {code_inputs}",
                            fix="let the task write the codes, or take the modality out of "
                                "MixtureOfDenoisers.code_inputs")
    for codes in INPUT_CODES:
        modality = codes.split("_")[0]
        if codes in names and modality not in code_inputs:
            raise UserError(f"an example has '{codes}', but the objective reads no codes of "
                            f"{modality}", got=f"code_inputs = {code_inputs}",
                            fix=f"add '{modality}' to MixtureOfDenoisers.code_inputs, or '{codes}' "
                                "to ignored_features")
    return found


def _check_modalities(found: dict[str, str], allowed: tuple[str, ...], field: str) -> None:
    for modality, name in found.items():
        if modality not in allowed:
            raise UserError(f"an example has '{name}', but the objective has no {modality}",
                            got=f"{field} = {allowed}",
                            fix=f"add '{modality}' to {field}, or '{name}' to ignored_features")
