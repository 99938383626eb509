"""What a config refuses, and the models of the gin files, counted without allocating them."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from models import model_fixtures

from vishwam_t5x import gin_config
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import count_parameters
from vishwam_t5x.models.config import CodeOutput, PatchInput, RotaryPositions, TextInput, TextOutput
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.precision.policy import Policy


@pytest.mark.parametrize("changes, match", [
    ({"emb_dim": 0}, "emb_dim"), ({"num_heads": 2.0}, "num_heads"),
    ({"num_kv_heads": 3}, r"num_kv_heads one of \[1, 2, 4\]"),
    ({"head_dim": 7}, "head_dim = 8"), ({"head_dim": 6}, "head_dim = 8"),
    ({"mlp_activations": ("silu", "linea")}, "did you mean 'linear'"),
    ({"mlp_activations": ()}, "mlp_activations"), ({"dropout_rate": 1.0}, "dropout_rate"),
    ({"remat_policy": "ful"}, "did you mean 'full'"),
    ({"precision": "bfloat61"}, "did you mean 'bfloat16'"),
    ({"position": "rotary"}, "RotaryPositions"), ({"inputs": ()}, "inputs"),
    ({"inputs": (TextInput(vocab_size=64), TextInput(vocab_size=64))}, "twice"),
    ({"inputs": (TextInput(vocab_size=63),)}, "63 and 64"),
    ({"targets": (CodeOutput(modality="row", vocab_size=8, grid=(2, 2)),)}, "not a name"),
    ({"inputs": (PatchInput(modality="image", patch_dim=3, grid=(4,)),)}, "rows, columns"),
    ({"inputs": (PatchInput(modality="i", patch_dim=3, grid=(4, 4), rope_scale=0.0),)}, "scale"),
])
def test_refuses(changes, match):
    with pytest.raises(UserError, match=match):
        model_fixtures.config(**changes)


@pytest.mark.parametrize("make, match", [
    (lambda: TextInput(vocab_size=-1), "vocab_size"), (lambda: TextOutput(vocab_size=True), "size"),
    (lambda: PatchInput(modality="image", patch_dim=0, grid=(1, 1)), "patch_dim"),
    (lambda: CodeOutput(modality="image", vocab_size=10, grid=(1, 1), num_codes=9), "num_codes"),
    (lambda: RotaryPositions(theta=0.5), "theta")])
def test_modality_configs_refuse(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_derived_values():
    config = model_fixtures.config(mlp_activations=["relu"], num_kv_heads=None)
    assert config.mlp_activations == ("relu",) and config.kv_heads == 4
    assert config.tables == {"text": 64, "image": 32}
    assert config.patch_dims == {"image": 12, "audio": 6}
    assert config.target("image").num_tokens == 6 and config.target("image").token_range == (2, 32)
    assert config.policy == Policy() and hash(config) == hash(dataclasses.replace(config))
    shapes = jax.eval_shape(EncoderDecoder(config).init, jax.random.key(0))["params"]
    assert set(shapes["encoder"]["layers_1"]["mlp"]) == {"wi", "wo"}


def model(*files: str) -> EncoderDecoder:
    parsed = gin_config.parse([f"--gin_file=gin/{name}.gin" for name in files], "forward")
    return parsed.macro("MODEL")


SIZES = {  # millions of parameters; large: what Unified-IO 2 reports
    "tiny": (0.0057, 0.0099), "small": (21.0, 29.4), "base": (85.0, 113.3),
    "large": (308.3, 409.0), "xl": (1157.7, 1560.4), "xxl": (2718.1, 3624.1)}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_gin_files(name):
    found = model(f"models/{name}")
    shapes = jax.eval_shape(found.init, jax.random.key(0))["params"]
    for stack, millions in zip(("encoder", "decoder"), SIZES[name], strict=True):
        assert round(count_parameters(shapes[stack]) / 1e6, 1 if name != "tiny" else 4) == millions
    assert {key: shapes[f"{key}_token_embedder"]["embedding"].value.shape[0]
            for key in ("text", "image")} == {"text": 33280, "image": 16512}
    assert found.config.input_modalities == ("text", "image", "audio")


def test_modality_files_replace_one_another():
    assert model("models/tiny", "modalities/text").config.target_modalities == ("text",)
    config = model("models/tiny", "modalities/unified_io2").config
    assert config.target_modalities == ("text", "image", "audio")
    assert config.tables["audio"] == 8320 and config.target("audio").num_tokens == 512
