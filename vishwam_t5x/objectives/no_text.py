"""Examples that are shown without their text, so that classifier-free guidance has something to
guide away from (Ho and Salimans 2022, arXiv:2207.12598; Unified-IO 2 does it to one in ten examples
of image generation).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.objectives.choices import Denoiser, two_uniforms
from vishwam_t5x.objectives.features import FeatureRoles

if TYPE_CHECKING:
    from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers

STREAM = "objective/no_text"


def rate(objective: MixtureOfDenoisers, roles: FeatureRoles,
         denoiser: Denoiser | None = None) -> float:
    """Returns the chance that an example of these features is shown without its text.

    Args:
        objective: has the rates by target modality.
        roles: of the features. Examples without a text, or with several targets, keep what they
            have.
        denoiser: what was drawn; None: the example is supervised. [R] and [X] restore what the
            encoder sees in part, so the text is not all that they go by: it stays.
    """
    if "text" not in roles.inputs:
        return 0.0
    if denoiser is not None:
        generates = denoiser.paradigm == "S" and denoiser.modality != "text"
        return objective.no_text_rates.get(denoiser.modality, 0.0) if generates else 0.0
    if len(roles.targets) != 1:
        return 0.0
    (target,) = roles.targets
    return objective.no_text_rates.get(target, 0.0)


def ids(objective: MixtureOfDenoisers, modality: str) -> Int[np.ndarray, "n"]:
    """Returns the text that stands for none where a modality is to be written, without an end."""
    return np.asarray(objective.no_text.get(modality, ()), np.int32)


def of(objective: MixtureOfDenoisers, roles: FeatureRoles, denoiser: Denoiser | None = None
       ) -> Int[np.ndarray, "n"]:
    """Returns the text that stands for none in an example of one target; see `rate`."""
    return ids(objective, denoiser.modality if denoiser is not None else next(iter(roles.targets)))


def drawn(chance: float, seed: int, example: int) -> bool:
    """Whether an example is shown without its text, given the chance of it."""
    return chance > 0 and example_generator(seed, example, STREAM).random() < chance


def drawn_many(chance: float, seed: int, examples: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """`drawn` of many examples."""
    if not chance:
        return np.zeros((len(examples),), bool)
    return two_uniforms(seed, examples, STREAM)[:, 0] < chance


def check(objective: MixtureOfDenoisers) -> None:
    """Raises `UserError` unless rates are shares and the text that stands for none is text."""
    for modality, share in objective.no_text_rates.items():
        one_of(modality, objective.target_modalities, "key of MixtureOfDenoisers.no_text_rates")
        if not 0.0 <= share < 1.0:
            raise UserError(f"MixtureOfDenoisers.no_text_rates['{modality}'] is no share",
                            got=share, fix="0.0 or more and below 1.0; Unified-IO 2 has 0.1")
    most = objective.vocabulary.prefix_start
    for modality, tokens in objective.no_text.items():
        one_of(modality, objective.target_modalities, "key of MixtureOfDenoisers.no_text")
        for token in (tokens,) if isinstance(tokens, str) else tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 2 <= token < most:
                raise UserError("MixtureOfDenoisers.no_text must be ids of text, without the end",
                                got=repr(token), fix=f"2 to {most - 1}; @tokenizer.text_ids() "
                                                     "gives those of a text")
