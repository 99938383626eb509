"""Pictures or spectrograms to be coded and decoded: what a codec is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from vishwam_t5x.core.batch import ModalityLengths
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.objectives.masking import PatchSpec, patchify
from vishwam_t5x.objectives.objective import ManyLengths

_FEATURES = ("{}", "{}_inputs", "{}_targets")


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Gives a model whole pictures or spectrograms, to be made again out of codes.

    Of each example one feature is read, the first there is of '<modality>', '<modality>_inputs' and
    '<modality>_targets'; the others are no concern of a codec. It takes all its patches of the
    encoder's row, and one slot of the decoder's, which stands for the whole.

    Attributes:
        modality: 'image' or 'audio'.
        patch: how it is cut on its way to the model, which puts it together again.
    """

    modality: str = "image"
    patch: PatchSpec = PatchSpec()

    vocabulary = None

    def __post_init__(self) -> None:
        one_of(self.modality, ("image", "audio"), "modality that codecs code")

    @property
    def input_modalities(self) -> tuple[str, ...]:
        """What the model is given."""
        return (self.modality,)

    @property
    def target_modalities(self) -> tuple[str, ...]:
        """What its loss is counted in."""
        return (self.modality,)

    @property
    def patch_specs(self) -> dict[str, PatchSpec]:
        """How the data pipeline cuts the modality."""
        return {self.modality: self.patch}

    def _feature(self, names: Iterable[str]) -> str:
        names = list(names)
        for name in _FEATURES:
            if (found := name.format(self.modality)) in names:
                return found
        raise UserError(f"an example has no {self.modality} to code", got=", ".join(names),
                        fix="a task with a feature " + " or ".join(
                            f"'{name.format(self.modality)}'" for name in _FEATURES))

    def input_features(self, names: Iterable[str]) -> dict[str, str]:
        """Returns modality -> feature that is read; its uint8 pixels stay uint8 in `apply`."""
        return {self.modality: self._feature(names)}

    def lengths(self, clean_lengths: Mapping[str, int], *, seed: int, example: int
                ) -> ModalityLengths:
        """Returns the patches of an example, and one slot of the decoder's row."""
        del seed, example
        patches = clean_lengths[self._feature(clean_lengths)]
        return ModalityLengths({self.modality: patches}, {self.modality: 1})

    def lengths_many(self, clean_lengths: Mapping[str, np.ndarray], examples: np.ndarray, *,
                     seed: int) -> ManyLengths:
        """`lengths` of many examples that have the same features."""
        del seed
        patches = np.asarray(clean_lengths[self._feature(clean_lengths)], np.int64)
        return ManyLengths({self.modality: patches},
                           {self.modality: np.ones((len(examples),), np.int64)})

    def possible_lengths(self, clean_lengths: Mapping[str, int]) -> list[ModalityLengths]:
        """Returns what `lengths` may be."""
        return [self.lengths(clean_lengths, seed=0, example=0)]

    def apply(self, clean: Mapping[str, np.ndarray], *, seed: int, example: int
              ) -> dict[str, np.ndarray]:
        """Returns the model example.

        'inputs/<modality>/input' [n, patch_dim], the patches row-major, float32, or uint8 as the
        pixels are, 255 standing for 1.0; 'targets/<modality>/targets' [1], a zero.
        """
        del seed, example
        array = np.asarray(clean[self._feature(clean)])
        patches = patchify(array, self.patch)
        if patches.dtype != np.uint8:
            patches = patches.astype(np.float32)
        return {f"inputs/{self.modality}/input": patches,
                f"targets/{self.modality}/targets": np.zeros((1,), np.int32)}
