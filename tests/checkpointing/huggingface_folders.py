"""Small Hugging Face folders of random numbers, as `save_pretrained` lays them out."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

KINDS = {
    "t5": {"model_type": "t5", "feed_forward_proj": "relu"},
    "t5_1_1": {"model_type": "t5", "feed_forward_proj": "gated-gelu",
               "tie_word_embeddings": False},
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {"model_type": "umt5", "feed_forward_proj": "gated-gelu",
             "tie_word_embeddings": False},
    "ul2": {"model_type": "t5", "feed_forward_proj": "gated-silu", "tie_word_embeddings": False,
            "d_kv": 12, "num_decoder_layers": 2}}
"""What the config.json of each family says; sizes are those of `config`."""


def config(kind: str, **changes: Any) -> dict[str, Any]:
    """A config.json."""
    return {"vocab_size": 96, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 4,
            "num_layers": 2, "num_decoder_layers": 3, **KINDS[kind], **changes}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays that a config.json stands for."""
    wide, joined = config["d_model"], config["num_heads"] * config["d_kv"]
    found = {"shared.weight": (config["vocab_size"], wide)}
    if config.get("tie_word_embeddings") is False:
        found["lm_head.weight"] = (config["vocab_size"], wide)
    inner = ("wi_0", "wi_1") if config["feed_forward_proj"].startswith("gated") else ("wi",)
    for stack, layers in (("encoder", config["num_layers"]),
                          ("decoder", config["num_decoder_layers"])):
        found[f"{stack}.final_layer_norm.weight"] = (wide,)
        for number in range(layers):
            parts = ["SelfAttention", "EncDecAttention", "DenseReluDense"]
            if stack == "encoder":
                parts.remove("EncDecAttention")
            for place, part in enumerate(parts):
                layer = f"{stack}.block.{number}.layer.{place}"
                found[f"{layer}.layer_norm.weight"] = (wide,)
                if part == "DenseReluDense":
                    found.update({f"{layer}.{part}.{name}.weight": (config["d_ff"], wide)
                                  for name in inner})
                    found[f"{layer}.{part}.wo.weight"] = (wide, config["d_ff"])
                    continue
                found.update({f"{layer}.{part}.{name}.weight": (joined, wide) for name in "qkv"})
                found[f"{layer}.{part}.o.weight"] = (wide, joined)
                if part == "SelfAttention" and (number == 0 or config["model_type"] == "umt5"):
                    found[f"{layer}.{part}.relative_attention_bias.weight"] = (
                        32, config["num_heads"])
    return found


def random_arrays(config: dict[str, Any], dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random parameters of the size that keeps activations near 1."""
    rng = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return {name: (rng.normal(size=shape) * shape[-1] ** -0.5).astype(kind)
            for name, shape in shapes(config).items()}


def write(folder: pathlib.Path, config: dict[str, Any], arrays: dict[str, np.ndarray],
          files: int = 1) -> pathlib.Path:
    """Writes config.json and the arrays into `files` files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(arrays)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: arrays[name] for name in names[number::files]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())},
         "weight_map": weight_map}))
    return folder


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a folder, read by the safetensors package."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found
