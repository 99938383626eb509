"""The training objective: what the encoder sees of a clean example, and what must be predicted.

The multimodal mixture of denoisers of Unified-IO 2 (Lu et al. 2023, arXiv:2312.17172) on top of
UL2's (Tay et al. 2022, arXiv:2205.05131): [R] restores hidden spans or patches, [S] continues,
[X] restores much more than it is given. The rules of Unified-IO 2's own mixture are not public;
every number here is a field, and `gin/objectives/` says which is published and which is a guess.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vishwam_t5x.core.batch import HISTORIES, ModalityLengths, SignalSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.objectives import augmentation, masking, model_example, no_text, span_corruption
from vishwam_t5x.objectives.choices import (
    ChoiceTable,
    Denoiser,
    choice_table,
    denoisers_of,
    two_uniforms,
)
from vishwam_t5x.objectives.features import FeatureRoles, feature_roles
from vishwam_t5x.objectives.objective import ManyLengths
from vishwam_t5x.objectives.settings import check_settings
from vishwam_t5x.objectives.vocabulary import VocabularyLayout

CHOICE_STREAM = "objective/choice"


@dataclasses.dataclass(frozen=True)
class MixtureOfDenoisers:
    """Supervised examples as they are; self-supervised ones through a denoiser drawn for each.

    Supervised (`*_inputs`, `*_targets`): the encoder reads `[Modality] [S]` for each target
    modality, the input text, EOS, and the input patches.
    Self-supervised (`text`, `image` with `image_codes`, `audio` with `audio_codes`): a target
    modality is drawn, then one of its denoisers; the other modalities are given whole.
    - text [R], [X]: T5 span corruption. [S]: the end of the text is generated from its beginning.
    With `text_prompt` in the place of `text` only [R] of an image or of sound is drawn, and that
    text, never corrupted, asks for it. Histories are given whole.
    - image or audio [R]: masked patches are withheld, codes are restored. [S]: all codes are
      generated from the other modalities; drawn only if there are others, or [R] is impossible.
    An empty text is not drawn as the target if another modality can be; alone, its target is EOS.
    A text of one token cannot be span-corrupted: it is given whole and the target is EOS.

    Attributes:
        vocabulary: text ids of sentinels and prefix tokens.
        input_modalities: what the encoder of the model reads.
        target_modalities: what its decoder writes; 'audio' needs examples with `audio_codes`.
        image: how images are cut into patches.
        audio: how log-mel spectrograms [frames, mel bins] are cut into patches.
        image_history: how the frames of a video, or further images, are cut and counted.
        audio_history: how the segments of sound before the last are.
        text_weights: relative chance of 'R', 'S', 'X' for a text target; {} for never a text.
        text_r: [R] denoisers, each (mean span in tokens, hidden share), equally likely.
        text_x: [X] denoisers, likewise.
        text_s_fraction: share of the text that [S] generates; with a uniform split its mean.
        text_s_split: 'fixed': the last `text_s_fraction`; 'uniform': a share drawn uniformly
            between 0 and twice `text_s_fraction` (at least one token).
        image_weights: relative chance of 'R', 'S' for an image target; {} for never an image.
        image_mask_rate: share of the patches that image [R] withholds.
        audio_weights: relative chance of 'R', 'S' for an audio target.
        audio_mask_rate: share of the patches that audio [R] withholds.
        target_weights: relative chance of each modality as the target, among those possible.
        masked_loss: image and audio [R], and inpainting, weigh 'masked' codes only, or 'all'.
        codecs: by target modality, the model's codec where the model is to make the codes of
            'image_targets', or the spectrogram 'audio_targets', itself (self-supervised:
            'image_pixels' or the image, 'audio_spectrogram'); None: examples have codes.
        task_masks: say in the batch which codes [R] or the task hid, for `mask_token` and
            `dynamic_mask` of the model's `CodeOutput`.
        image_shift: largest random shift of an image given as input, in pixels; 0 for none. The
            image that [R] must restore is never changed.
        image_augmentations: further callables (image, rng) -> image for images given as input.
        no_text_rates: share of the examples with that one target, e.g. {'image': 0.1}, that are
            generated without their input text, for `DecodingConfig.guidance`; see `no_text`.
        no_text: ids of the text that stands there instead, by target modality; nothing where it
            names none. See `serving.tokenizer.text_ids`.
        mode_tokens: put the prefix token before the input text (False: plain T5 text to text).
        supervised_only: refuse self-supervised examples.
        code_inputs: input modalities read as codes: features `image_input_codes` of supervised
            examples, `image_codes` of others; [R] hides none of them.
        ignored_features: features of the examples to leave out on purpose.
    """

    vocabulary: VocabularyLayout = dataclasses.field(default_factory=VocabularyLayout)
    input_modalities: Sequence[str] = ("text", "image", "audio")
    target_modalities: Sequence[str] = ("text", "image")
    image: masking.PatchSpec = masking.PatchSpec(16, channels=3)
    audio: masking.PatchSpec = masking.PatchSpec(16, channels=1)
    image_history: masking.FrameSpec = masking.FrameSpec()
    audio_history: masking.FrameSpec = masking.FrameSpec(
        masking.PatchSpec(16, channels=1), (16, 8), 16)
    text_weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"R": 2.0, "S": 1.0, "X": 4.0})
    text_r: Sequence[Sequence[float]] = ((3.0, 0.15), (8.0, 0.15))
    text_x: Sequence[Sequence[float]] = ((3.0, 0.5), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5))
    text_s_fraction: float = 0.25
    text_s_split: Literal["fixed", "uniform"] = "fixed"
    image_weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"R": 1.0, "S": 1.0})
    image_mask_rate: float = 0.75
    audio_weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"R": 1.0, "S": 1.0})
    audio_mask_rate: float = 0.75
    target_weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"text": 1.0, "image": 1.0, "audio": 1.0})
    masked_loss: Literal["masked", "all"] = "masked"
    codecs: Mapping[str, Any] | None = None
    task_masks: bool = False
    image_shift: int = 0
    image_augmentations: Sequence[augmentation.ImageAugmentation] = ()
    no_text_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    no_text: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    mode_tokens: bool = True
    supervised_only: bool = False
    code_inputs: Sequence[str] = ()
    ignored_features: Sequence[str] = ()
    _plans: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("input_modalities", "target_modalities", "text_r", "text_x",
                     "image_augmentations", "code_inputs", "ignored_features"):
            value = getattr(self, name)
            if isinstance(value, str):  # Its letters would pass for a list of names.
                raise UserError(f"MixtureOfDenoisers.{name} must be a list", got=repr(value),
                                fix=f"({value!r},)")
            frozen = tuple(tuple(item) if isinstance(item, list) else item for item in value)
            object.__setattr__(self, name, frozen)
        check_settings(self)

    @functools.cached_property
    def augmentations(self) -> tuple[augmentation.ImageAugmentation, ...]:
        """The steps every image given as input goes through, in order."""
        shift = (augmentation.RandomShift(self.image_shift),) if self.image_shift else ()
        return (*shift, *self.image_augmentations)

    @functools.cached_property
    def histories(self) -> dict[str, masking.FrameSpec]:
        """How frames are cut and counted, by the input modalities that consist of them."""
        return {modality: getattr(self, modality) for modality in HISTORIES
                if modality in self.input_modalities}

    @functools.cached_property
    def signals(self) -> dict[str, SignalSpec]:
        """Target modalities that the model is given as pixels or spectrograms."""
        return {modality: codec.signal for modality, codec in (self.codecs or {}).items()
                if codec is not None}

    # -- which denoiser ------------------------------------------------------------------------

    def choose(self, clean_lengths: Mapping[str, int], *, seed: int,
               example: int) -> Denoiser | None:
        """Returns the denoiser drawn for a self-supervised example; None for a supervised one.

        Args:
            clean_lengths: length of each feature: tokens, codes, or patches.
            seed: seed of the run.
            example: number of the example in the mixture.

        Raises:
            UserError: the features do not form an example (see `feature_roles`), or no denoiser
                with a positive weight can use them.
        """
        roles, tables = self._plan(tuple(clean_lengths))
        if roles.supervised:
            return None
        return self._draw(tables, clean_lengths, seed, example)[0]

    def input_features(self, names: Iterable[str]) -> dict[str, str]:
        """Returns modality -> feature that is read; its uint8 pixels stay uint8 in `apply`."""
        return self._plan(tuple(names))[0].inputs

    def _plan(self, names: tuple[str, ...]) -> tuple[FeatureRoles, tuple[ChoiceTable, ...]]:
        """Roles of these features, and the choices with and without an empty text."""
        plan = self._plans.get(names)
        if plan is None:
            roles = feature_roles(names, tuple(self.input_modalities),
                                  tuple(self.target_modalities), tuple(self.ignored_features),
                                  self.signals, tuple(self.code_inputs))
            plan = self._plans[names] = (roles, self._tables(roles, names))
        return plan

    def _tables(self, roles: FeatureRoles, names: tuple[str, ...]) -> tuple[ChoiceTable, ...]:
        if roles.supervised:
            return ()
        if self.supervised_only:
            raise UserError("this objective takes supervised examples only", got=", ".join(names),
                            fix="name features *_inputs and *_targets, or set "
                                "MixtureOfDenoisers.supervised_only = False")
        offers = {modality: denoisers_of(self, modality, roles) for modality in roles.targets}
        table = choice_table(offers, self.target_weights)
        if not table.denoisers:
            raise UserError("no denoiser with a positive weight can use an example",
                            got=", ".join(names),
                            fix="raise text_weights, image_weights, audio_weights or "
                                "target_weights for one of: " + ", ".join(roles.targets))
        others = choice_table({m: d for m, d in offers.items() if m != "text"},
                              self.target_weights)
        return table, others if others.denoisers else table

    def _draw(self, tables: tuple[ChoiceTable, ...], clean_lengths: Mapping[str, int],
              seed: int, example: int) -> tuple[Denoiser, float]:
        table = tables[clean_lengths.get("text", 1) == 0]
        choice, split = example_generator(seed, example, CHOICE_STREAM).random(2)
        return table.pick(choice), split

    # -- lengths -------------------------------------------------------------------------------

    def lengths(self, clean_lengths: Mapping[str, int], *, seed: int,
                example: int) -> ModalityLengths:
        """Returns the slots the example will take, by modality; absent modalities are left out.

        Args:
            clean_lengths: length of each feature: tokens, codes, or patches.
            seed: seed of the run.
            example: number of the example in the mixture.

        Raises:
            UserError: as `choose`, and if the text would have more spans than there are sentinels.
        """
        roles, tables = self._plan(tuple(clean_lengths))
        denoiser, split = None, 0.0
        if not roles.supervised:
            denoiser, split = self._draw(tables, clean_lengths, seed, example)
        bare = no_text.drawn(no_text.rate(self, roles, denoiser), seed, example)
        return self._lengths(roles, clean_lengths, denoiser, split, bare)

    def _input_slots(self, sizes: Mapping[str, str], clean_lengths: Mapping[str, Any]
                     ) -> dict[str, Any]:
        """Slots of the inputs given whole: as many as tokens and patches, several a frame."""
        return {modality: (self.histories[modality].slots(clean_lengths[name])
                           if modality in self.histories else clean_lengths[name])
                for modality, name in sizes.items()}

    def possible_lengths(self, clean_lengths: Mapping[str, int]) -> list[ModalityLengths]:
        """Returns what `lengths` may be, whatever is drawn: to know before training what fits.

        A uniform split of [S] is given at both its ends.

        Args:
            clean_lengths: length of each feature: tokens, codes, or patches.

        Raises:
            UserError: as `lengths`, for any denoiser that may be drawn.
        """
        roles, tables = self._plan(tuple(clean_lengths))
        drawn = (None,) if roles.supervised else (
            tables[clean_lengths.get("text", 1) == 0].denoisers)
        return [self._lengths(roles, clean_lengths, denoiser, split, bare)
                for denoiser in drawn for split in ((0.0, 1.0) if denoiser else (0.0,))
                for bare in ((False, True) if no_text.rate(self, roles, denoiser) else (False,))]

    def _lengths(self, roles: FeatureRoles, clean_lengths: Mapping[str, int],
                 denoiser: Denoiser | None, split: float, bare: bool) -> ModalityLengths:
        sizes = roles.inputs if denoiser else roles.sizes
        inputs = self._input_slots(sizes, clean_lengths)
        text = inputs.pop("text", 0)
        if bare:
            text = len(no_text.of(self, roles, denoiser))
        if denoiser is None:
            text += 1 + (len(roles.targets) if self.mode_tokens else 0)
            return ModalityLengths({"text": text, **inputs}, {
                m: roles.target_length(m, clean_lengths) + (m == "text") for m in roles.targets})
        target = roles.target_length(denoiser.modality, clean_lengths)
        if denoiser.modality == "text":
            text, target = self._text_lengths(denoiser, text, split)
            target += 1
        elif denoiser.paradigm == "R":
            patches = inputs[denoiser.modality]
            inputs[denoiser.modality] = patches - masking.num_masked(patches, denoiser.rate)
        else:
            inputs.pop(denoiser.modality, None)
        text += 1 + self.mode_tokens
        return ModalityLengths({"text": text, **inputs}, {denoiser.modality: target})

    def _text_lengths(self, denoiser: Denoiser, length: int, split: float) -> tuple[int, int]:
        """(input, target) tokens of a corrupted text, without prefix token and EOS."""
        if denoiser.paradigm == "S":
            suffix = span_corruption.suffix_length(length, self.text_s_share(split))
            return length - suffix, suffix
        noise, spans = span_corruption.num_noise_and_spans(
            length, denoiser.rate, denoiser.mean_span)
        if spans > self.vocabulary.num_sentinels:
            raise span_corruption.too_many_spans(spans, self.vocabulary.num_sentinels, length)
        return length - noise + spans, noise + spans

    def text_s_share(self, split: Any) -> Any:
        """Returns the share of a text that [S] generates, given a uniform number (or an array)."""
        return 2.0 * self.text_s_fraction * split if self.text_s_split == "uniform" else (
            self.text_s_fraction + 0.0 * split)

    def lengths_many(self, clean_lengths: Mapping[str, np.ndarray], examples: np.ndarray, *,
                     seed: int) -> ManyLengths:
        """`lengths` of many examples that have the same features, in array operations.

        Args:
            clean_lengths: for each feature the length in each example, [n].
            examples: example numbers, [n].
            seed: seed of the run.

        Raises:
            UserError: as `lengths`.
        """
        roles, tables = self._plan(tuple(clean_lengths))
        inputs = self._input_slots(roles.sizes, {
            name: np.array(sizes, np.int64) for name, sizes in clean_lengths.items()})
        text = inputs.pop("text", np.zeros((len(examples),), np.int64))
        if roles.supervised:
            bare = no_text.drawn_many(no_text.rate(self, roles), seed, examples)
            text = np.where(bare, len(no_text.of(self, roles)), text)
            text = text + 1 + (len(roles.targets) if self.mode_tokens else 0)
            return ManyLengths({"text": text, **inputs}, {
                m: np.array(roles.target_length(m, clean_lengths), np.int64) + (m == "text")
                for m in roles.targets})
        uniforms = two_uniforms(seed, examples, CHOICE_STREAM)
        targets = {m: np.zeros_like(text) for m in roles.targets}
        empty = np.asarray(clean_lengths.get("text", np.ones_like(text))) == 0
        for table, rows in ((tables[0], ~empty), (tables[1], empty)):
            picks = table.pick_many(uniforms[:, 0])
            for index, denoiser in enumerate(table.denoisers):
                at = np.flatnonzero((picks == index) & rows)
                target = np.asarray(roles.target_length(denoiser.modality, clean_lengths))[at]
                if denoiser.modality == "text":
                    text[at], target = self._text_lengths_many(denoiser, text[at],
                                                               uniforms[at, 1])
                    target = target + 1
                elif denoiser.paradigm == "R":
                    inputs[denoiser.modality][at] -= masking.num_masked_many(
                        inputs[denoiser.modality][at], denoiser.rate)
                elif denoiser.modality in inputs:
                    inputs[denoiser.modality][at] = 0
                bare = no_text.drawn_many(no_text.rate(self, roles, denoiser), seed, examples[at])
                text[at[bare]] = len(no_text.of(self, roles, denoiser))
                targets[denoiser.modality][at] = target
        return ManyLengths({"text": text + 1 + self.mode_tokens, **inputs}, targets)

    def _text_lengths_many(self, denoiser: Denoiser, lengths: np.ndarray, splits: np.ndarray
                           ) -> tuple[np.ndarray, np.ndarray]:
        if denoiser.paradigm == "S":
            suffix = span_corruption.suffix_length_many(lengths, self.text_s_share(splits))
            return lengths - suffix, suffix
        noise, spans = span_corruption.num_noise_and_spans_many(
            lengths, denoiser.rate, denoiser.mean_span)
        if spans.size and spans.max() > self.vocabulary.num_sentinels:
            worst = int(spans.argmax())
            raise span_corruption.too_many_spans(
                int(spans[worst]), self.vocabulary.num_sentinels, int(lengths[worst]))
        return lengths - noise + spans, noise + spans

    # -- the example ---------------------------------------------------------------------------

    def apply(self, clean: Mapping[str, np.ndarray], *, seed: int,
              example: int) -> dict[str, np.ndarray]:
        """Returns the model example: unbatched, unpadded arrays by batch key.

        - inputs/text/tokens [n] int32: prefix token, text, EOS; inputs/<m>/tokens: code + 2;
        - inputs/<m>/input [n, patch_dim] (float32, or uint8 as the pixels are, 255 standing for
          1.0) and inputs/<m>/pos_ids [n] int32 (place in the patch grid, row-major) for patches;
          for the frames of a history input [n, places, patch_dim], and mask [n, places] where a
          task says which patches of them are given;
        - targets/text/targets [m] int32, with EOS;
        - targets/<m>/targets, loss_mask [m] int32 for codes: targets are code + 2; loss_mask is 1
          where the loss counts; with `task_masks` also targets/<m>/task_mask, 1 where hidden;
        - targets/<m>/pixels [1, height, width, channels] uint8 or spectrogram [1, frames, mel bins]
          float32 instead of targets, of the modalities of `codecs`.

        Args:
            clean: features of one example, as cached.
            seed: seed of the run.
            example: number of the example in the mixture.

        Raises:
            UserError: as `lengths`, and if an array has a shape that cannot be used.
        """
        roles, tables = self._plan(tuple(clean))
        if roles.supervised:
            return model_example.supervised(self, roles, clean, seed, example)
        denoiser, split = self._draw(
            tables, {"text": len(clean["text"])} if "text" in clean else {}, seed, example)
        return model_example.denoised(self, roles, clean, denoiser, split, seed, example)

    def without_augmentation(self) -> MixtureOfDenoisers:
        """Returns the objective for evaluation: no image is changed, no text left out."""
        return dataclasses.replace(self, image_shift=0, image_augmentations=(), no_text_rates={})

    def without_text(self, tokens: np.ndarray, modality: str) -> np.ndarray:
        """Returns an example's input text ids [n] with `no_text` behind their prefix tokens."""
        return model_example.without_text(self, tokens, modality)
