"""Frames among the inputs, and prompts that ask to restore: what the encoder is given of them."""

from __future__ import annotations

import numpy as np
import pytest

from vishwam_t5x.core.batch import ROW_ORDER
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import FrameSpec, PatchSpec, patchify
from vishwam_t5x.objectives.vocabulary import EOS_ID, VocabularyLayout

VOCABULARY = VocabularyLayout(1_024, num_sentinels=80, num_location_bins=0)


def objective(**changes) -> MixtureOfDenoisers:
    return MixtureOfDenoisers(**{
        "vocabulary": VOCABULARY, "input_modalities": ROW_ORDER,
        "target_modalities": ("text", "image", "audio"), "image": PatchSpec(2, channels=3),
        "audio": PatchSpec((4, 2), channels=1),
        "image_history": FrameSpec(PatchSpec(2, channels=3), (2, 3), 5, max_frames=3),
        "audio_history": FrameSpec(PatchSpec((4, 2), channels=1), (2, 2), 4), **changes})


def example(frames: int = 2, segments: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"text_inputs": np.asarray([7, 8], np.int32),
            "image_inputs": rng.integers(0, 256, (4, 4, 3), np.uint8),
            "image_history_inputs": rng.integers(0, 256, (frames, 4, 6, 3), np.uint8),
            "audio_inputs": rng.random((8, 4), np.float32),
            "audio_history_inputs": rng.random((segments, 8, 4), np.float32),
            "text_targets": np.asarray([9], np.int32)}


def lengths_of(clean: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: 4 if name in ("image_inputs", "audio_inputs") else len(value)
            for name, value in clean.items()}


def test_every_input_goes_where_it_belongs():
    mixture, clean = objective(), example()
    promised = mixture.lengths(lengths_of(clean), seed=0, example=0)
    assert promised.inputs == {"text": 4, "image": 4, "image_history": 10, "audio": 4,
                               "audio_history": 4}
    many = mixture.lengths_many({name: np.asarray([size, size]) for name, size
                                 in lengths_of(clean).items()}, np.arange(2), seed=0)
    assert {name: sizes.tolist() for name, sizes in many.inputs.items()} == {
        name: [size, size] for name, size in promised.inputs.items()}
    found = mixture.apply(clean, seed=0, example=0)
    for modality, frames in (("image_history", 2), ("audio_history", 1)):
        spec = mixture.histories[modality]
        given = found[f"inputs/{modality}/input"]
        assert given.shape == (frames, spec.places, spec.patch.patch_dim)
        pixels = clean[f"{modality}_inputs"]
        for frame, patches in zip(pixels, given, strict=True):
            np.testing.assert_array_equal(patches, patchify(frame, spec.patch))
        assert given.dtype == pixels.dtype
        assert f"inputs/{modality}/mask" not in found
    empty = mixture.apply(example(frames=0, segments=0), seed=0, example=0)
    assert len(empty["inputs/image_history/input"]) == 0


def test_a_task_chooses_the_patches_of_each_frame():
    chosen = np.asarray([0, 5, 8, 9], np.int32)
    clean = {**example(), "image_history_input_patches": chosen,
             "audio_input_patches": np.asarray([2, 3], np.int32)}
    mixture = objective()
    found = mixture.apply(clean, seed=0, example=0)
    assert found["inputs/image_history/mask"].tolist() == [[1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0]]
    assert found["inputs/audio/pos_ids"].tolist() == [2, 3]
    sizes = {**lengths_of(clean), "image_history_input_patches": 4, "audio_input_patches": 2}
    promised = mixture.lengths(sizes, seed=0, example=0).inputs
    assert (promised["image_history"], promised["audio"]) == (10, 2)
    for bad, why in (([0, 12], "does not have"), ([0, 1], "no patch of a frame")):
        with pytest.raises(UserError, match=why):
            mixture.apply({**clean, "image_history_input_patches": np.asarray(bad, np.int32)},
                          seed=0, example=0)


def test_frames_that_cannot_be_are_refused():
    mixture, clean = objective(), example()
    with pytest.raises(UserError, match="too many frames"):
        mixture.lengths(lengths_of(example(frames=4)), seed=0, example=0)
    with pytest.raises(UserError, match="not of the size"):
        mixture.apply({**clean, "image_history_inputs": np.zeros((1, 6, 6, 3), np.uint8)}, seed=0,
                      example=0)
    with pytest.raises(UserError, match="has no image_history"):
        objective(input_modalities=("text", "image", "audio")).lengths(
            lengths_of(clean), seed=0, example=0)
    with pytest.raises(UserError, match=r"FrameSpec\.latents"):
        FrameSpec(latents=0)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_prompt_asks_for_what_is_hidden(modality):
    """Only [R]: the prompt is given whole, some patches too, and the codes of all are written."""
    arrays = {"image": np.zeros((8, 8, 3), np.uint8), "audio": np.zeros((16, 8), np.float32)}
    clean = {"text_prompt": np.asarray([7, 8, 9], np.int32), modality: arrays[modality],
             f"{modality}_codes": np.arange(64, dtype=np.int32)}
    mixture = objective(task_masks=True)
    sizes = {"text_prompt": 3, modality: 16, f"{modality}_codes": 64}
    for number in range(20):
        promised = mixture.lengths(sizes, seed=0, example=number)
        assert promised == ({"text": 5, modality: 4}, {modality: 64})
        found = mixture.apply(clean, seed=0, example=number)
        assert found["inputs/text/tokens"].tolist() == [
            VOCABULARY.prefix(modality, "R"), 7, 8, 9, EOS_ID]
        hidden = found[f"targets/{modality}/task_mask"]
        assert hidden.sum() == 48 and len(found[f"inputs/{modality}/input"]) == 4
        np.testing.assert_array_equal(found[f"targets/{modality}/loss_mask"], hidden)
    with pytest.raises(UserError, match="'text' and 'text_prompt'"):
        mixture.lengths({**sizes, "text": 4}, seed=0, example=0)
