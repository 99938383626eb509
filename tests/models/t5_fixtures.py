"""The T5 1.1 model that T5X's numbers in tests/golden/t5x were computed with."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import numpy as np

from vishwam_t5x.core.trees import unflatten_names
from vishwam_t5x.evaluation.batch_file import read_batch
from vishwam_t5x.models.config import (
    EncoderDecoderConfig,
    RelativePositions,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "t5x"

NAMES = {"token_embedder": "text_token_embedder",
         "decoder/logits_dense/kernel": "target_encoders_text/logits_kernel"}
"""T5X's names and ours, where they differ."""


def config(*, logits_via_embedding: bool = False, **changes: Any) -> EncoderDecoderConfig:
    """T5 1.1 in small, with T5X's own choices."""
    values = {
        "emb_dim": 128, "num_heads": 4, "head_dim": 16, "mlp_dim": 128, "num_encoder_layers": 2,
        "num_decoder_layers": 2, "mlp_activations": ("gelu", "linear"), "qk_norm": False,
        "scale_attention_logits": False, "float32_attention_logits": False,
        "position": RelativePositions(),
        "inputs": (TextInput(vocab_size=384, modality_embedding=False),),
        "targets": (TextOutput(vocab_size=384, modality_embedding=False,
                               logits_via_embedding=logits_via_embedding),)}
    return EncoderDecoderConfig(**{**values, **changes})


def model(**changes: Any) -> EncoderDecoder:
    """The model of `config`."""
    return EncoderDecoder(config(**changes))


def ours(name: str) -> str:
    """Our name of a parameter of T5X's."""
    for theirs, mine in NAMES.items():
        name = name.replace(theirs, mine)
    return name


@functools.cache
def arrays(file: str) -> dict[str, np.ndarray]:
    """What a golden file holds."""
    with np.load(GOLDEN / f"{file}.npz") as found:
        return dict(found)


@functools.cache
def numbers() -> dict[str, Any]:
    """Losses, norms and scores."""
    return json.loads((GOLDEN / "network.json").read_text())


def flat(file: str, *, tied: bool = False) -> dict[str, np.ndarray]:
    """Parameters or gradients under our names."""
    return {ours(name): array for name, array in arrays(file).items()
            if not (tied and "logits_dense" in name)}


def variables(file: str, *, tied: bool = False) -> dict[str, Any]:
    """A golden file of parameters, as `apply` takes them."""
    return {"params": unflatten_names(flat(file, tied=tied))}


@functools.cache
def batch(name: str) -> dict[str, np.ndarray]:
    """The batch of a golden file, read as `vishwam forward` reads it."""
    return read_batch(GOLDEN / f"{name}.npz", ("text",), ("text",))
