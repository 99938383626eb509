"""Decoder-only models that write several modalities: rows, packing, and decoding with a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from models import model_fixtures

from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.models.codecs.layers import Codebook
from vishwam_t5x.models.config import (
    CodeOutput,
    EncoderDecoderConfig,
    RelativePositions,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism import sharding
from vishwam_t5x.parallelism.axis_rules import MESH_AXES

TEXT = (TextInput(vocab_size=64),)
TARGETS = (TextOutput(vocab_size=64), CodeOutput(modality="image", vocab_size=32, grid=(2, 3)))
BASE = {"num_encoder_layers": 0, "num_decoder_layers": 1, "inputs": TEXT, "targets": TARGETS}
VARIANTS = {
    "isolated": BASE,
    "causal": BASE | {"isolate_targets": False},
    "relative": BASE | {"isolate_targets": False, "scan_layers": True,
                        "num_decoder_layers": 2,
                        "position": RelativePositions(num_buckets=8, max_distance=16)}}
EXAMPLES = (
    {"inputs/text/tokens": [5, 6, 7], "targets/text/targets": [20, 21, 1],
     "targets/image/targets": [4, 9, 3, 7]},
    {"inputs/text/tokens": [8], "targets/image/targets": [6, 5]},
    {"inputs/text/tokens": [9, 10], "targets/text/targets": [22, 23, 24, 1]})


def lay_out(rows, packed):
    """A batch as the data pipeline lays it out; `rows` says the row of each of `EXAMPLES`."""
    arrays = [{key: np.asarray(value, np.int32) for key, value in example.items()}
              for example in EXAMPLES]
    placed = [PlacedExample(row, example_lengths(example), example)
              for row, example in zip(rows, arrays, strict=True)]
    spec = BatchSpec(rows[-1] + 1, 8, 16, {"text": 8}, {"text": 9, "image": 9}, packed=packed)
    return assemble(spec, rows[-1] + 1, placed)


@functools.cache
def logits_function(model):
    return jax.jit(functools.partial(model.apply, method="logits"))


@pytest.mark.parametrize("variant", [
    "isolated", *(pytest.param(name, marks=pytest.mark.slow) for name in ("causal", "relative"))])
def test_packed_is_unpacked(variant):
    model, variables = model_fixtures.build(**VARIANTS[variant])
    alone = logits_function(model)(variables, lay_out((0, 1, 2), packed=False))
    packed = logits_function(model)(variables, lay_out((0, 0, 0), packed=True))
    for name in ("text", "image"):
        start = 0
        for row, example in enumerate(EXAMPLES):
            number = len(example.get(f"targets/{name}/targets", ()))
            np.testing.assert_allclose(packed[name][0, start:start + number],
                                       alone[name][row, :number], atol=1e-5)
            start += number


@pytest.mark.parametrize("variant", [
    pytest.param("causal", marks=pytest.mark.slow), "isolated"])
def test_what_a_later_modality_sees(variant):
    model, variables = model_fixtures.build(**VARIANTS[variant])
    batch = lay_out((0, 1, 2), packed=False)
    before = logits_function(model)(variables, batch)

    def touched(key, column):
        changed = batch[key].copy()
        changed[0, column] += 1
        after = logits_function(model)(variables, batch | {key: changed})
        return {name: np.flatnonzero(np.abs(after[name] - before[name]).max(-1)[0, :number] > 1e-6
                                     ).tolist()
                for name, number in (("text", 3), ("image", 4))}

    everything = {"text": [0, 1, 2], "image": [0, 1, 2, 3]}
    assert touched("inputs/text/tokens", 1) == everything
    later = [0, 1, 2, 3] if variant == "causal" else []
    assert touched("targets/text/inputs", 1) == {"text": [1, 2], "image": later}
    assert touched("targets/image/inputs", 2) == {"text": [], "image": [2, 3]}


def decoded(model, variables, tokens, *parts):
    """Logits, token by token, of `parts`: (modality, decoder inputs [B, n])."""
    @jax.jit
    def run(variables):
        encoded = model.apply(variables, {"inputs/text/tokens": tokens}, method="encode")
        length = sum(inputs.shape[1] for _, inputs in parts)
        cache = model.apply(variables, encoded, length, method="init_cache")
        out = {}
        for modality, inputs in parts:
            def step(cache, token, modality=modality):
                found, cache = model.apply(variables, token, cache, modality, method="decode_step")
                return cache, found

            cache, found = jax.lax.scan(step, cache, inputs.T)
            out[modality] = found.swapaxes(0, 1)
        return out

    return run(variables)


@pytest.mark.parametrize("variant", [
    pytest.param("isolated", marks=pytest.mark.slow), "relative"])
def test_a_cache_gives_the_logits_of_the_whole_row(variant):
    """Of isolated targets each alone; of those that see each other one after the other."""
    model, variables = model_fixtures.build(**VARIANTS[variant])
    batch = lay_out((0, 1, 2), packed=False)
    whole = logits_function(model)(variables, batch)
    parts = [(name, batch[f"targets/{name}/inputs"][:, :number])
             for name, number in (("text", 3), ("image", 4))]
    run = functools.partial(decoded, model, variables, batch["inputs/text/tokens"])
    found = run(*parts) if variant == "relative" else run(parts[0]) | run(parts[1])
    for (name, inputs), row in ((parts[0], 0), (parts[1], 0), (parts[0], 2)):
        np.testing.assert_allclose(found[name][row], whole[name][row, :inputs.shape[1]], atol=1e-5)
    if variant == "isolated":  # the second example has no text
        np.testing.assert_allclose(found["image"][1, :2], whole["image"][1, :2], atol=1e-5)


@pytest.mark.slow
def test_an_encoder_keeps_targets_apart_unless_told_otherwise():
    changes = {"inputs": TEXT, "targets": TARGETS, "num_decoder_layers": 1, "num_encoder_layers": 1}
    batch = lay_out((0, 1, 2), packed=False)
    changed = batch | {"targets/text/inputs": batch["targets/text/inputs"] + 1}
    moved = []
    for isolate in (True, False):
        model, variables = model_fixtures.build(isolate_targets=isolate, **changes)
        before, after = (logits_function(model)(variables, part)["image"][0, :4]
                         for part in (batch, changed))
        moved.append(float(np.abs(before - after).max()))
    assert moved[0] == 0 and moved[1] > 1e-3


def test_refuses():
    with pytest.raises(UserError, match="takes rotary positions"):
        model_fixtures.config(**BASE | {"position": RelativePositions()})
    one = model_fixtures.build(**BASE | {"targets": TARGETS[:1]})
    batch = {key: value for key, value in lay_out((0, 1, 2), packed=False).items()
             if "image" not in key}
    batch["targets/text/subsegment_ids"] = np.zeros_like(batch["targets/text/targets"])
    with pytest.raises(UserError, match="several answers"):
        jax.eval_shape(functools.partial(one[0].apply, method="logits"), one[1], batch)


# --- codes in the table of the text ---

def shared(offset=40, vocab_size=24, **changes):
    return CodeOutput(modality="image", vocab_size=vocab_size, grid=(2, 3), in_table="text",
                      offset=offset, **changes)


def test_one_table_and_one_softmax_of_which_each_writes_its_own_rows():
    model, variables = model_fixtures.build(**BASE | {"targets": (TARGETS[0], shared())})
    assert model.config.tables == {"text": 64} and "image_token_embedder" not in variables["params"]
    batch = lay_out((0, 1, 2), packed=False)
    found, hidden, sums = jax.jit(lambda variables, batch: (
        model.apply(variables, batch, method="logits"),
        model.apply(variables, batch).hidden["image"], model.apply(
            variables, batch, LossConfig(z_loss=0.0), method="loss_sums")["image"]))(
                variables, batch)
    assert found["image"].shape[-1] == 24 and np.isfinite(found["image"]).all()
    assert np.isfinite(found["text"][..., :40]).all() and (found["text"][..., 40:] < -1e9).all()
    table = np.asarray(variables["params"]["text_token_embedder"]["embedding"], np.float64)
    logits = np.asarray(hidden) @ table.T / np.sqrt(32)
    np.testing.assert_allclose(found["image"], logits[..., 40:], atol=1e-5)
    log_z = np.log(np.exp(logits).sum(-1))
    at = np.take_along_axis(logits, batch["targets/image/targets"][..., None] + 40, -1)[..., 0]
    want = ((log_z - at) * batch["targets/image/mask"]).sum()
    np.testing.assert_allclose(sums.loss, want, rtol=1e-5)


@pytest.mark.parametrize("targets, match", [
    ((shared(offset=50),), "outside the table"),
    ((shared(), dataclasses.replace(shared(offset=30, vocab_size=20), modality="audio")),
     "the same rows"),
    ((dataclasses.replace(shared(), in_table="txt"),), "did you mean"),
])
def test_rows_that_do_not_fit(targets, match):
    with pytest.raises(UserError, match=f"(?s){match}"):
        try:
            model_fixtures.config(**BASE | {"targets": (TARGETS[0], *targets)})
        except UserError as error:
            raise UserError(f"{error.problem} {error.got} {error.fix}".lower()) from error


@pytest.mark.parametrize("settings, match", [
    ({"offset": 3}, "another modality's table"), ({"in_table": "image"}, "the modality itself"),
    ({"head": "mlp"}, "kernel of its own"), ({"embedding_dim": 8}, "need an adaptor"),
    ({"in_table": "text", "offset": -1}, "at least 0")])
def test_settings_of_codes(settings, match):
    with pytest.raises(UserError, match=match):
        CodeOutput(modality="image", vocab_size=32, grid=(2, 3), **settings)


def test_a_table_and_a_head_of_their_own():
    """Janus-Pro's way: narrow code vectors through two layers, and a layer before the logits."""
    image = CodeOutput(modality="image", vocab_size=32, grid=(2, 3), embedding_dim=8,
                       adaptor="mlp", head="mlp", logits_via_embedding=False)
    model, variables = model_fixtures.build(**BASE | {"targets": (TARGETS[0], image)})
    own = variables["params"]["target_encoders_image"]
    assert variables["params"]["image_token_embedder"]["embedding"].shape == (32, 8)
    assert own["adaptor"]["wi"]["kernel"].shape == (8, 32)
    batch = lay_out((0, 1, 2), packed=False)
    hidden, found, step = jax.jit(lambda variables, batch: (
        model.apply(variables, batch).hidden["image"],
        model.apply(variables, batch, method="logits")["image"],
        decoded(model, variables, batch["inputs/text/tokens"],
                ("image", batch["targets/image/inputs"][:, :2]))["image"]))(variables, batch)
    inner = np.asarray(hidden) @ own["head"]["kernel"] + own["head"]["bias"]
    want = jax.nn.gelu(inner, approximate=False) @ own["logits_kernel"]
    np.testing.assert_allclose(found, want, atol=1e-4)
    np.testing.assert_allclose(step[1], found[1, :2], atol=1e-5)


def test_narrow_vectors_are_split_over_no_devices():
    """A mesh may have more devices along 'fsdp' than a code's vector has numbers."""
    image = CodeOutput(modality="image", vocab_size=32, grid=(2, 3), embedding_dim=8,
                       adaptor="mlp", logits_via_embedding=False, head="mlp")
    config = EncoderDecoderConfig(
        emb_dim=32, num_heads=2, head_dim=16, mlp_dim=64, num_encoder_layers=0,
        num_decoder_layers=1, inputs=TEXT, targets=(TextOutput(vocab_size=64), image))
    mesh = AbstractMesh((1, 1, 16, 2), MESH_AXES)
    for module, given, name in (
            (EncoderDecoder(config), (), "image_token_embedder/embedding"),
            (Codebook(16384, 4), (jnp.zeros((1, 4)),), "embedding")):
        init = functools.partial(module.init, method="codes") if given else module.init
        boxed = jax.eval_shape(init, jax.random.key(0), *given)["params"]
        placed = flatten_names(sharding.parameter_shardings(boxed, mesh))
        assert placed[name].spec[0] == "tensor" and not any(placed[name].spec[1:])
