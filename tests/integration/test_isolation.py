"""No example of a packed row has any influence on another: proved by changing one at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from vishwam_t5x.core.batch import BatchSpec, DataPosition
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.models.config import (
    CodeOutput,
    EncoderDecoderConfig,
    PatchInput,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.vocabulary import VocabularyLayout

LAYOUT = VocabularyLayout(base_size=40, num_sentinels=8, num_location_bins=0, num_history=0,
                          table_multiple=64)
PATCHES = {"image": PatchSpec(2, channels=1), "audio": PatchSpec((2, 3), channels=1)}
TABLES = {"text": LAYOUT.table_size, "image": 18}


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """A packed batch of every kind of example: all input and target modalities, all denoisers."""
    image = SyntheticFeature(8, 8, rest=(8, 1), dtype="float32")
    audio = SyntheticFeature(2, 6, rest=(6,), multiple_of=2, dtype="float32")
    codes, text = SyntheticFeature(16, 16, num_ids=16), SyntheticFeature(1, 9, num_ids=40)
    kinds = {"texts": {"text": text},
             "pairs": {"text": text, "image": image, "image_codes": codes, "audio": audio},
             "answers": {"text_inputs": text, "image_inputs": image, "audio_inputs": audio,
                         "text_targets": text, "image_target_codes": codes}}
    tasks = [SyntheticTask(name, features, 50, patch_specs=PATCHES)
             for name, features in kinds.items()]
    goal = MixtureOfDenoisers(vocabulary=LAYOUT, image=PATCHES["image"], audio=PATCHES["audio"])
    spec = BatchSpec(2, 112, 80, {"text": 60, "image": 64, "audio": 40}, {"text": 48, "image": 64},
                     {name: patch.patch_dim for name, patch in PATCHES.items()})
    made = PackedBatches(Mixture(tasks, [1, 2, 1], seed=3), goal, spec, seed=4).batch(
        DataPosition())
    assert min(map(len, made.plan.rows)) >= 4
    return made.arrays


def build(**changes):
    inputs = (TextInput(vocab_size=TABLES["text"]),
              *(PatchInput(modality=name, patch_dim=patch.patch_dim, grid=grid)
                for (name, patch), grid in zip(PATCHES.items(), ((4, 4), (3, 2)), strict=True)))
    model = EncoderDecoder(EncoderDecoderConfig(
        emb_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, num_encoder_layers=2,
        num_decoder_layers=2, inputs=inputs, targets=(
            TextOutput(vocab_size=TABLES["text"]),
            CodeOutput(modality="image", vocab_size=TABLES["image"], grid=(4, 4))), **changes))
    return model, meta.unbox(jax.jit(model.init)(jax.random.key(0)))


def modality_arrays(arrays):
    """(key, array, segment ids beside it) of everything that holds values of examples."""
    for key, array in arrays.items():
        side, modality, name = key.split("/")
        if modality != "row" and name in ("tokens", "input", "inputs", "pos_ids"):
            yield key, array, arrays[f"{side}/{modality}/segment_ids"]


def with_other_values(arrays, row, segment):
    """The batch in which everything that one example holds is something else."""
    rng = np.random.default_rng(segment)
    changed = dict(arrays)
    for key, array, segments in modality_arrays(arrays):
        changed[key] = array = array.copy()
        mine = segments[row] == segment
        if array.dtype == np.float32:
            array[row, mine] = 10 * rng.standard_normal(array[row, mine].shape)
        else:
            array[row, mine] = (array[row, mine] + rng.integers(1, 15, mine.sum())) % 16
    return changed


@pytest.mark.parametrize("changes", [
    {}, {"scan_layers": True, "precision": "bfloat16", "dropout_rate": 0.3},
    {"precision": "float16", "float32_attention_logits": False}],
    ids=["float32", "bfloat16-scan-dropout", "float16"])
def test_changing_an_example_changes_no_bit_of_its_neighbours(changes):
    model, variables = build(**changes)
    apply = jax.jit(functools.partial(
        model.apply, method="logits", enable_dropout="dropout_rate" in changes,
        rngs={"dropout": jax.random.key(1)}))
    arrays = batch()
    before = jax.device_get(apply(variables, arrays))
    seen = {"text": 0, "image": 0}
    for row in range(2):
        for segment in range(1, 1 + arrays["inputs/text/segment_ids"][row].max()):
            after = jax.device_get(apply(variables, with_other_values(arrays, row, segment)))
            for modality in seen:
                segments = arrays[f"targets/{modality}/segment_ids"]
                mine = np.zeros(segments.shape, bool)
                mine[row] = segments[row] == segment
                others = (segments > 0) & ~mine
                np.testing.assert_array_equal(before[modality][others], after[modality][others])
                if mine.any():
                    seen[modality] += 1
                    assert (before[modality][mine] != after[modality][mine]).mean() > 0.5
    assert min(seen.values()) >= 3


def test_the_loss_of_an_example_has_no_gradient_in_its_neighbours():
    model, variables = build()
    arrays = batch()
    patches = {key: array for key, array in arrays.items() if key.endswith("/input")}

    @jax.jit
    def gradient(given):
        def loss(patches, given):
            sums = model.apply(variables, {**given, **patches}, LossConfig(), method="loss_sums")
            return sum(part.loss for part in sums.values())

        return jax.grad(loss)({key: jnp.asarray(given[key]) for key in patches}, given)

    checked = 0
    for row in range(2):
        for segment in range(1, 1 + arrays["inputs/text/segment_ids"][row].max()):
            given = dict(arrays)
            for modality in ("text", "image"):
                name = f"targets/{modality}/loss_mask"
                given[name] = np.zeros_like(arrays[name])
                mine = arrays[f"targets/{modality}/segment_ids"][row] == segment
                given[name][row, mine] = arrays[name][row, mine]
            for key, found in jax.device_get(gradient(given)).items():
                segments = arrays[f"{key.rpartition('/')[0]}/segment_ids"]
                mine = np.zeros(segments.shape, bool)
                mine[row] = segments[row] == segment
                assert not found[~mine].any()
                if mine.any():
                    checked += 1
                    assert np.abs(found[mine]).max() > 0
    assert checked >= 4
