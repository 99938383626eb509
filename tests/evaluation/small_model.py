"""A tiny model over text and images, and synthetic tasks for it."""

from __future__ import annotations

import jax
import numpy as np
from flax.core import meta

from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.data.source import DatasetConfig, batch_spec
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
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.vocabulary import VocabularyLayout

LAYOUT = VocabularyLayout(base_size=64, num_sentinels=16, num_location_bins=0)
PATCHES = {"image": PatchSpec(2, channels=1)}
NUM_CODES = 16


def model(**changes) -> EncoderDecoder:
    return EncoderDecoder(EncoderDecoderConfig(**{
        "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "inputs": (TextInput(vocab_size=LAYOUT.table_size),
                PatchInput(modality="image", patch_dim=4, grid=(2, 2))),
        "targets": (TextOutput(vocab_size=LAYOUT.table_size),
                 CodeOutput(modality="image", vocab_size=NUM_CODES + 2, grid=(2, 2))),
        **changes}))


def params(module: EncoderDecoder, seed: int = 0):
    return meta.unbox(jax.jit(module.init)(jax.random.key(seed)))["params"]


def objective(**changes) -> MixtureOfDenoisers:
    return MixtureOfDenoisers(vocabulary=LAYOUT, input_modalities=("text", "image"),
                              target_modalities=("text", "image"), image=PATCHES["image"],
                              text_r=((3.0, 0.15),), text_x=((3.0, 0.5),), **changes)


def text_task(num_records: int = 11, name: str = "captions") -> SyntheticTask:
    """Image and text to text."""
    return SyntheticTask(name, {
        "image_inputs": SyntheticFeature(4, 4, rest=(4, 1), dtype="float32"),
        "text_inputs": SyntheticFeature(2, 9, num_ids=64),
        "text_targets": SyntheticFeature(1, 5, num_ids=64)}, num_records, patch_specs=PATCHES)


def image_task(num_records: int = 7, name: str = "drawings") -> SyntheticTask:
    """Text to image codes."""
    return SyntheticTask(name, {
        "text_inputs": SyntheticFeature(2, 9, num_ids=64),
        "image_target_codes": SyntheticFeature(4, 4, num_ids=NUM_CODES)}, num_records)


def denoising_task(num_records: int = 9, name: str = "texts") -> SyntheticTask:
    """Text, for the denoisers."""
    return SyntheticTask(name, {"text": SyntheticFeature(8, 20, num_ids=64)}, num_records)


def dataset_config(batch_size: int = 2, **changes) -> DatasetConfig:
    return DatasetConfig(**{
        "mixture_or_task_name": "tiny", "batch_size": batch_size, "shuffle": False,
        "task_feature_lengths": {"inputs": 48, "targets": 40, "inputs/image": 16,
                              "targets/image": 16}, **changes})


def losses_one_by_one(module, parameters, task, goal, loss) -> dict[str, np.ndarray]:
    """Sums [loss, weight, correct] by modality, each record in a batch of its own, unpacked."""
    spec = batch_spec(dataset_config(batch_size=1, pack=False), goal)
    compiled = jax.jit(lambda batch: module.apply({"params": parameters}, batch, loss,
                                                  method="loss_sums"))
    totals: dict[str, np.ndarray] = {}
    for record in range(task.num_records):
        example = goal.apply(task.read(record), seed=0, example=record)
        placed = PlacedExample(0, example_lengths(example), example)
        for modality, part in compiled(assemble(spec, 1, [placed])).items():
            totals[modality] = totals.get(modality, np.zeros(3)) + np.array(
                [part.loss, part.weight, part.correct], np.float64)
    return {modality: sums for modality, sums in totals.items() if sums[1]}
