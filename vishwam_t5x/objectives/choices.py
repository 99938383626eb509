"""Which denoiser an example gets: a table of chances and one uniform number per example."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vishwam_t5x.core.rng import example_generator

if TYPE_CHECKING:
    from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
    from vishwam_t5x.objectives.features import FeatureRoles


class Denoiser(NamedTuple):
    """One way to make a task of an example.

    Attributes:
        modality: what the decoder writes.
        paradigm: 'R', 'S' or 'X'.
        rate: hidden share: of the tokens, of the patches ('R'), or the generated share ('S').
        mean_span: mean length of a hidden span in tokens, for text 'R' and 'X'; else 0.
    """

    modality: str
    paradigm: str
    rate: float
    mean_span: float = 0.0


@dataclasses.dataclass(frozen=True)
class ChoiceTable:
    """Denoisers and the chance of each.

    Attributes:
        denoisers: the possible denoisers.
        chances: probability of each, summing to one.
    """

    denoisers: tuple[Denoiser, ...]
    chances: tuple[float, ...]

    @functools.cached_property
    def _edges(self) -> list[float]:
        # The last edge is left out, so that rounding can never point behind the last denoiser.
        return np.cumsum(self.chances)[:-1].tolist()

    def pick(self, uniform: float) -> Denoiser:
        """Returns the denoiser at `uniform` in [0, 1)."""
        return self.denoisers[bisect.bisect_right(self._edges, uniform)]

    def pick_many(self, uniforms: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """Returns the index of the denoiser at each uniform number."""
        return np.searchsorted(self._edges, uniforms, side="right")


def denoisers_of(objective: MixtureOfDenoisers, modality: str, roles: FeatureRoles
                 ) -> list[tuple[Denoiser, float]]:
    """Returns the denoisers of one target modality with their relative weights."""
    if modality == "text":
        weights = objective.text_weights
        out = [(Denoiser("text", "S", objective.text_s_fraction), weights.get("S", 0.0))]
        for paradigm, spans in (("R", objective.text_r), ("X", objective.text_x)):
            share = weights.get(paradigm, 0.0) / max(len(spans), 1)
            out += [(Denoiser("text", paradigm, rate, mean), share) for mean, rate in spans]
        return out
    weights = getattr(objective, f"{modality}_weights")
    out = []
    if modality in roles.inputs.keys() - objective.code_inputs and weights.get("R", 0.0) > 0:
        out.append((Denoiser(modality, "R", getattr(objective, f"{modality}_mask_rate")),
                    weights["R"]))
    # With nothing to generate from, [S] is unconditional: only if [R] is out of the question.
    if not roles.prompted and (not out or any(other != modality for other in roles.inputs)):
        out.append((Denoiser(modality, "S", 1.0), weights.get("S", 0.0)))
    return out


def choice_table(by_modality: Mapping[str, Sequence[tuple[Denoiser, float]]],
                 target_weights: Mapping[str, float]) -> ChoiceTable:
    """Chances of: first a target modality, then one of its denoisers.

    Args:
        by_modality: the denoisers each modality offers, with relative weights.
        target_weights: relative weight of each modality, among those that offer something.

    Returns:
        The table; empty if nothing has a positive weight.
    """
    offered = {modality: [(d, w) for d, w in options if w > 0]
               for modality, options in by_modality.items() if target_weights[modality] > 0}
    total = sum(target_weights[modality] for modality, options in offered.items() if options)
    denoisers, chances = [], []
    for modality, options in offered.items():
        inner = sum(weight for _, weight in options)
        for denoiser, weight in options:
            denoisers.append(denoiser)
            chances.append(target_weights[modality] / total * weight / inner)
    return ChoiceTable(tuple(denoisers), tuple(chances))


_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def _multiply_high_low(a: np.uint64, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a_low, a_high = a & _LOW, a >> _HALF
    b_low, b_high = b & _LOW, b >> _HALF
    cross = a_high * b_low + ((a_low * b_low) >> _HALF)
    middle = (cross & _LOW) + a_low * b_high
    return a_high * b_high + (cross >> _HALF) + (middle >> _HALF), a * b


def two_uniforms(seed: int, examples: Int[np.ndarray, "n"], stream: str) -> Float[
        np.ndarray, "n 2"]:
    """Returns `example_generator(seed, example, stream).random(2)` of every example at once.

    Philox-4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") written
    out in array operations; a packer plans thousands of examples with it.
    """
    bits = example_generator(seed, 0, stream).bit_generator
    key = [int(word) for word in bits.state["state"]["key"]]  # type: ignore[index]
    zero = np.zeros((len(examples),), np.uint64)
    # NumPy steps the 256-bit counter before the first block.
    c0, c1, c2, c3 = zero + np.uint64(1), zero, zero, np.asarray(examples).astype(np.uint64)
    for _ in range(10):
        high0, low0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = (high1 ^ c1 ^ np.uint64(key[0]), low1,
                          high0 ^ c3 ^ np.uint64(key[1]), low0)
        key = [(word + step) % (1 << 64) for word, step in zip(key, _KEY_STEPS, strict=True)]
    words = np.stack([c0, c1], axis=-1)
    return (words >> np.uint64(11)) * (1.0 / 9007199254740992.0)
