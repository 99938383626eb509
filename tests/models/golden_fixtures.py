"""The original's tiny Unified-IO 2 model, its parameters and what it computed."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
from models.model_fixtures import GOLDEN

from vishwam_t5x.checkpointing.convert.unified_io2 import parameter_from_unified_io2
from vishwam_t5x.core.trees import unflatten_names
from vishwam_t5x.models.config import (
    AudioInput,
    AudioTransformer,
    CodeOutput,
    EncoderDecoderConfig,
    HistoryInput,
    ImageInput,
    ImageTransformer,
    Resampler,
    TextInput,
    TextOutput,
)

_SIZES = {"emb_dim": 24, "num_heads": 3, "head_dim": 8, "mlp_dim": 48, "num_layers": 3}
_RESAMPLER = {**_SIZES, "num_layers": 2}
IMAGE = ImageTransformer(**_SIZES, position_grid=(3, 3))
AUDIO = AudioTransformer(**_SIZES)
INPUTS = {
    "text": TextInput(vocab_size=256),
    "image": ImageInput(transformer=IMAGE, grid=(4, 4), rope_scale=1.5, freeze=True),
    "image_history": HistoryInput(modality="image_history", transformer=IMAGE, grid=(3, 3),
                                  resampler=Resampler(num_latents=4, **_RESAMPLER)),
    "audio": AudioInput(transformer=AUDIO, grid=(4, 2), rope_scale=1.5),
    "audio_history": HistoryInput(modality="audio_history", transformer=AUDIO, grid=(4, 2),
                                  resampler=Resampler(num_latents=2, **_RESAMPLER)),
}
TARGETS = {
    "text": TextOutput(vocab_size=256),
    "image": CodeOutput(modality="image", vocab_size=66, grid=(6, 6)),
    "audio": CodeOutput(modality="audio", vocab_size=34, grid=(4, 8), layout=(8, 4)),
}


def config(inputs: tuple[str, ...] = tuple(INPUTS), targets: tuple[Any, ...] = tuple(TARGETS)
           ) -> EncoderDecoderConfig:
    """The model with some of its modalities; `targets` are names or configs."""
    return EncoderDecoderConfig(
        emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64, num_encoder_layers=2, num_decoder_layers=3,
        inputs=tuple(INPUTS[name] for name in inputs),
        targets=tuple(TARGETS.get(target, target) if isinstance(target, str) else target
                      for target in targets))


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file."""
    with np.load(GOLDEN / name) as file:
        return dict(file)


@functools.cache
def params() -> dict[str, np.ndarray]:
    """Our names and values of the original's parameters, without the codecs'."""
    return {parameter_from_unified_io2(name): value
            for file in ("params.npz", "input_params.npz") for name, value in load(file).items()}


def variables(*without: str) -> dict[str, Any]:
    """The variables of the model, without parameters whose names begin so."""
    return {"params": unflatten_names({name: value for name, value in params().items()
                                       if not name.startswith(without)})}


@functools.cache
def results() -> dict[str, Any]:
    """Losses and norms of gradients."""
    return json.loads((GOLDEN / "all_to_all.json").read_text())


def target(modality: str, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a batch of an image or audio target, from the original's tokens."""
    return {f"targets/{modality}/targets": tokens, f"targets/{modality}/mask": mask,
            f"targets/{modality}/inputs": np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]}


def all_to_all() -> dict[str, Any]:
    """The batch of every modality, two examples."""
    case = load("all_to_all.npz")
    batch = {key.removeprefix("batch/"): value for key, value in case.items()
             if key.startswith("batch/")}
    # The original's segments of a text target are several answers to one input.
    batch["targets/text/subsegment_ids"] = batch.pop("targets/text/segment_ids")
    for name in ("image", "audio"):
        mask = batch[f"targets/{name}/mask"]
        batch |= target(name, case[f"out/{name}/targets"], mask)
    return {key: jnp.asarray(value) for key, value in batch.items()}
