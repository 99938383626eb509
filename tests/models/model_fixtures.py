"""Small models and batches that several tests of the models use."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from vishwam_t5x.models.config import (
    CodeOutput,
    EncoderDecoderConfig,
    PatchInput,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "unified_io2"

INPUTS = (TextInput(vocab_size=64), PatchInput(modality="image", patch_dim=12, grid=(4, 4)),
          PatchInput(modality="audio", patch_dim=6, grid=(4, 2), rope_scale=1.5))
TARGETS = (TextOutput(vocab_size=64), CodeOutput(modality="image", vocab_size=32, grid=(2, 3)))


def config(**changes: Any) -> EncoderDecoderConfig:
    """A model of every modality, with two layers a side."""
    values = {"emb_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48,
              "num_encoder_layers": 2, "num_decoder_layers": 2, "inputs": INPUTS,
              "targets": TARGETS}
    return EncoderDecoderConfig(**{**values, **changes})


@functools.cache
def build(**changes: Any) -> tuple[EncoderDecoder, Any]:
    """The model and variables of a sensible size; made once for the same changes.

    Drawn by NumPy: to compile the initialization would take longer than most tests.
    """
    model = EncoderDecoder(config(**changes))
    return model, draw_variables(model)


def draw_variables(model: EncoderDecoder) -> Any:
    """Variables of a sensible size for any model."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        spread = leaf.shape[0] ** -0.5 if name == "kernel" else 1.0 if name == "embedding" else 0.1
        return jnp.asarray((name == "scale") + spread * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


TEXT_ONLY = {"inputs": INPUTS[:1], "targets": TARGETS[:1]}
"""Changes of `config` that leave text alone: quicker to compile."""


def text_batch(num_rows: int = 2) -> dict[str, np.ndarray]:
    """Two texts in each row, and padding."""
    rng = np.random.default_rng(0)
    segments = {"inputs": [1] * 4 + [2] * 3 + [0], "targets": [1] * 3 + [2] * 4 + [0, 0]}
    batch: dict[str, np.ndarray] = {}
    for side, ids in segments.items():
        ids = np.tile(np.asarray(ids, np.int32), (num_rows, 1))
        starts = np.argmax(ids[:, :, None] == ids[:, None, :], axis=-1)
        tokens = rng.integers(2, 64, ids.shape).astype(np.int32) * (ids > 0)
        prefix = f"{side}/text"
        batch |= {f"{prefix}/{'tokens' if side == 'inputs' else 'targets'}": tokens,
                  f"{prefix}/mask": (ids > 0).astype(np.int32), f"{prefix}/segment_ids": ids,
                  f"{prefix}/pos_ids": (np.arange(ids.shape[1]) - starts).astype(np.int32)}
    shifted = np.pad(batch["targets/text/targets"], ((0, 0), (1, 0)))[:, :-1]
    batch["targets/text/inputs"] = shifted * (batch["targets/text/pos_ids"] > 0)
    return batch


# Slots of each example by side and modality; example 2 is text only, 4 has no text target.
EXAMPLES = (
    {"inputs": {"text": 5, "image": 3}, "targets": {"text": 4}},
    {"inputs": {"text": 4}, "targets": {"text": 6}},
    {"inputs": {"text": 2, "image": 4, "audio": 3}, "targets": {"text": 3, "image": 6}},
    {"inputs": {"text": 3, "audio": 5}, "targets": {"image": 6}},
    {"inputs": {"image": 2}, "targets": {"text": 5}},
)
ROWS = ((0, 2), (1, 3, 4))
PATCH_DIMS = {"image": 12, "audio": 6}
CODES = {"text": 64, "image": 32}
ORDER = {"inputs": ("text", "image", "audio"), "targets": ("text", "image")}


def examples(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Unbatched examples with the arrays of `EXAMPLES`."""
    rng = np.random.default_rng(seed)
    out = []
    for lengths in EXAMPLES:
        example: dict[str, np.ndarray] = {}
        for name, number in lengths["inputs"].items():
            if name == "text":
                example["inputs/text/tokens"] = rng.integers(2, 64, number).astype(np.int32)
                example["inputs/text/pos_ids"] = np.arange(number, dtype=np.int32)
            else:
                places = {"image": 16, "audio": 8}[name]
                example[f"inputs/{name}/input"] = rng.normal(
                    size=(number, PATCH_DIMS[name])).astype(np.float32)
                example[f"inputs/{name}/pos_ids"] = np.sort(
                    rng.permutation(places)[:number]).astype(np.int32)
        for name, number in lengths["targets"].items():
            targets = rng.integers(2, CODES[name], number).astype(np.int32)
            example[f"targets/{name}/targets"] = targets
            example[f"targets/{name}/inputs"] = np.concatenate([[0], targets[:-1]]).astype(np.int32)
            example[f"targets/{name}/pos_ids"] = np.arange(number, dtype=np.int32)
        out.append(example)
    return out


def lay_out(packed_rows: tuple[tuple[int, ...], ...], with_index: bool, slack: int = 2
            ) -> tuple[dict[str, np.ndarray], dict[tuple[int, str], tuple[int, slice]]]:
    """A batch with the examples of each row one after another, and where their targets lie.

    Args:
        packed_rows: example numbers of each row.
        with_index: give `row/index` (columns example by example) and segment ids.
        slack: unused slots in every array, and unused columns in every row.

    Returns:
        The batch, and (example, target modality) -> (row, slots).
    """
    everything, batch, where = examples(), {}, {}
    for side, order in ORDER.items():
        sizes = {name: max(sum(EXAMPLES[e][side].get(name, 0) for e in row) for row in packed_rows)
                 + slack for name in order}
        starts = dict(zip(order, np.cumsum([0, *sizes.values()]), strict=False))
        length = max(sum(sum(EXAMPLES[e][side].values()) for e in row) for row in packed_rows)
        index = np.full((len(packed_rows), length + slack), -1, np.int32)
        for number, row in enumerate(packed_rows):
            filled, column = dict.fromkeys(order, 0), 0
            for segment, example in enumerate(row, start=1):
                for name in order:
                    slots = EXAMPLES[example][side].get(name, 0)
                    if not slots:
                        continue
                    at = slice(filled[name], filled[name] + slots)
                    _write(batch, everything[example], f"{side}/{name}", number, at, sizes[name],
                           len(packed_rows), segment)
                    if side == "targets":
                        where[example, name] = number, at
                    index[number, column:column + slots] = starts[name] + np.arange(at.start,
                                                                                     at.stop)
                    filled[name], column = at.stop, column + slots
        if with_index:
            batch[f"{side}/row/index"] = index
    if not with_index:
        batch = {key: array for key, array in batch.items() if not key.endswith("segment_ids")}
    return batch, where


def _write(batch: dict[str, np.ndarray], example: dict[str, np.ndarray], prefix: str, row: int,
           at: slice, size: int, num_rows: int, segment: int) -> None:
    fields = {key: value for key, value in example.items() if key.startswith(prefix + "/")}
    ones = np.ones(at.stop - at.start, np.int32)
    fields |= {f"{prefix}/mask": ones, f"{prefix}/segment_ids": ones * segment}
    for key, value in fields.items():
        if key not in batch:
            batch[key] = np.zeros((num_rows, size, *value.shape[1:]), value.dtype)
        batch[key][row, at] = value
