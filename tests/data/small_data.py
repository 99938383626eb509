"""A small objective with random lengths and random contents, for tests of the data pipeline."""

from __future__ import annotations

import numpy as np

from vishwam_t5x.core.batch import BatchSpec, DataPosition, ModalityLengths
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.objectives.masking import PatchSpec, patchify

PATCHES = {"image": PatchSpec(2, channels=1)}


class HideSome:
    """Hides a random number of tokens and patches; the hidden tokens are the target."""

    input_modalities = ("text", "image")
    target_modalities = ("text", "image")

    def _hidden(self, seed, example, length):
        rng = example_generator(seed, example, "hide")
        return int(rng.integers(1, max(2, length))), rng

    def lengths(self, clean_lengths, *, seed, example):
        hidden, _ = self._hidden(seed, example, clean_lengths["text"])
        inputs = {"text": clean_lengths["text"] - hidden + 1}
        targets = {"text": hidden + 1}
        if "image" in clean_lengths:
            inputs["image"] = clean_lengths["image"] // 2
            targets["image"] = clean_lengths["image_codes"]
        return ModalityLengths(inputs, targets)

    def apply(self, clean, *, seed, example):
        text = clean["text"]
        hidden, rng = self._hidden(seed, example, len(text))
        out = {
            "inputs/text/tokens": np.append(text[hidden:], np.int32(1)),
            "targets/text/targets": np.append(text[:hidden], np.int32(1)),
        }
        if "image" in clean:
            patches = patchify(clean["image"], PATCHES["image"])
            keep = np.sort(rng.permutation(len(patches))[:len(patches) // 2])
            out["inputs/image/input"] = patches[keep]
            out["inputs/image/pos_ids"] = keep.astype(np.int32)
            out["targets/image/targets"] = clean["image_codes"] + np.int32(2)
            out["targets/image/loss_mask"] = (np.arange(len(clean["image_codes"])) % 2
                                              ).astype(np.int32)
        return out


def small_tasks(num_records=200):
    """Two kinds: text, and text with an image of 4 x 4 to 8 x 4 pixels."""
    text = SyntheticFeature(3, 40, 12, 0.7)
    return [
        SyntheticTask("words", {"text": text}, num_records, seed=1, patch_specs=PATCHES),
        SyntheticTask("pictures", {
            "text": SyntheticFeature(2, 10),
            "image": SyntheticFeature(4, 8, rest=(4, 1), multiple_of=2, dtype="float32"),
            "image_codes": SyntheticFeature(8, 8, num_ids=50)}, num_records // 2, seed=2,
            patch_specs=PATCHES),
    ]


def small_spec(batch_size=4, packed=True):
    return BatchSpec(batch_size, 64, 64, {"text": 64, "image": 24}, {"text": 64, "image": 40},
                     {"image": 4}, packed=packed)


def batches(batch_size=4, packed=True, repeat=True, num_records=200, **options):
    mixture = Mixture(small_tasks(num_records), [2, 1], seed=5, repeat=repeat, shuffle=repeat)
    return PackedBatches(mixture, HideSome(), small_spec(batch_size, packed), seed=11, **options)


def walk(packer, position=None, limit=10**9):
    position = position or DataPosition()
    for _ in range(limit):
        plan = packer.plan(position)
        if plan is None:
            return
        yield plan
        position = plan.end
