"""The whole original Unified-IO 2 network, every modality in and out: its numbers, stored here."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import golden_fixtures
from models.golden_fixtures import load

from vishwam_t5x.checkpointing.convert.unified_io2 import parameter_to_unified_io2
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.objectives.losses import LossConfig

HISTORIES = ("image_history", "audio_history")


@pytest.fixture(scope="module")
def everything():
    """Logits and intermediates of the case with every modality."""
    apply = jax.jit(functools.partial(EncoderDecoder(golden_fixtures.config()).apply,
                                      method="logits", capture_intermediates=True))
    logits, state = apply(golden_fixtures.variables(), golden_fixtures.all_to_all())
    return jax.tree.map(np.asarray, (logits, state["intermediates"]))


@pytest.mark.parametrize("target", ["text", "image", "audio"])
def test_logits(everything, target):
    case = load("all_to_all.npz")
    counts = case[f"out/{target}/loss_mask"] > 0
    np.testing.assert_allclose(everything[0][target][counts],
                               case[f"out/{target}/logits"][counts], atol=1e-5)


def test_transformers(everything):
    """Last and second layer, for the main input and for the history that shares the parameters."""
    case, batch = load("all_to_all.npz"), golden_fixtures.all_to_all()
    for name in ("image", "audio"):
        calls = everything[1][f"{name}_transformer"]["__call__"]
        for call, key in zip(calls, (name, f"{name}_history"), strict=True):
            mask = np.asarray(batch[f"inputs/{key}/mask"])
            valid = mask.reshape(-1, mask.shape[-1]) > 0
            golden = f"inter/input_{name}_encoder/image_encoder/__call__.{int(key != name)}"
            for half, features in enumerate(call):
                expected = case[f"{golden}.{half}"]
                np.testing.assert_allclose(features[valid], expected[valid], atol=2e-5)


@pytest.mark.parametrize("name", ["image", "audio"])
def test_resampler(everything, name):
    case, batch = load("all_to_all.npz"), golden_fixtures.all_to_all()
    module = f"input_encoders_{name}_history"
    latents = everything[1][module]["resampler"]["__call__"][0]
    present = np.asarray(batch[f"inputs/{name}_history/mask"]).any(-1).reshape(-1)
    expected = case[f"inter/{module}/resampler/PerceiverResampler_0/__call__.0"]
    np.testing.assert_allclose(latents[present], expected[present], atol=1e-5)


@pytest.mark.parametrize("name", ["text", "image", "audio", *HISTORIES])
def test_inputs(everything, name):
    case = load("all_to_all.npz")
    module = f"input_encoders_{name}" if name in HISTORIES else f"input_{name}_encoder"
    sequence = everything[1][module]["__call__"][0]
    golden = {key: case.get(f"inter/{module}/__call__.0.{key}")
              for key in ("embed", "mask", "position_embed")}
    valid = golden["mask"] > 0
    np.testing.assert_array_equal(sequence.segment_ids > 0, valid)
    np.testing.assert_allclose(sequence.embeddings[valid], golden["embed"][valid], atol=1e-5)
    if name in HISTORIES:
        turned = np.stack([np.cos(sequence.angles), np.sin(sequence.angles)], -1)
        turned = turned.reshape(*turned.shape[:2], -1)
        np.testing.assert_allclose(turned[valid], golden["position_embed"][valid], atol=1e-5)


@pytest.mark.parametrize("stack, num_layers", [("encoder", 2), ("decoder", 3)])
def test_layers(everything, stack, num_layers):
    case, batch = load("all_to_all.npz"), golden_fixtures.all_to_all()
    if stack == "encoder":
        valid = np.concatenate([np.asarray(
            everything[1][f"input_encoders_{name}" if name in HISTORIES else
                          f"input_{name}_encoder"]["__call__"][0].segment_ids) > 0
            for name in golden_fixtures.INPUTS], axis=1)
    else:
        valid = np.concatenate([np.asarray(batch[f"targets/{name}/mask"]) > 0
                                for name in golden_fixtures.TARGETS], axis=1)
    for path in ("", *(f"layers_{number}/" for number in range(num_layers))):
        node = everything[1][stack]
        node = node[path[:-1]] if path else node
        np.testing.assert_allclose(node["__call__"][0][valid],
                                   case[f"inter/{stack}/{path}__call__.0"][valid], atol=5e-5)


@pytest.mark.slow
def test_losses_and_gradients():
    """Of every parameter; those of the frozen transformers are zero."""
    batch, loss = golden_fixtures.all_to_all(), LossConfig(z_loss=1e-4)
    model = EncoderDecoder(golden_fixtures.config())

    def total(params):
        sums = model.apply({"params": params}, batch, loss, method="loss_sums")
        return sum(part.loss / part.weight for part in sums.values()), sums

    params = golden_fixtures.variables()["params"]
    (value, sums), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    golden = golden_fixtures.results()
    np.testing.assert_allclose(value, golden["total_loss"], rtol=1e-6)
    for name, part in sums.items():
        expected = golden["losses"][name]
        np.testing.assert_allclose(part.loss / part.weight, expected["loss"], rtol=2e-6)
        np.testing.assert_allclose(part.z_loss / part.weight, expected["z_loss"], rtol=1e-4)
        assert float(part.weight) == expected["weight_sum"]
        np.testing.assert_allclose(part.correct / part.weight, expected["accuracy"], rtol=1e-6)
    norms = {parameter_to_unified_io2(name): float(jnp.linalg.norm(array.reshape(-1)))
             for name, array in flatten_names(gradients).items()}
    assert norms.keys() == golden["grad_l2"].keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, golden["grad_l2"][name], rtol=2e-4, atol=1e-7,
                                   err_msg=name)
        assert (norm == 0.0) == ("vision_transformer" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "audio"])
def test_text_from_one_picture_or_sound(name):
    case, inputs = load("cases.npz"), golden_fixtures.all_to_all()
    case = {key.removeprefix(f"{name}_text_to_text/"): value for key, value in case.items()
            if key.startswith(f"{name}_text_to_text/")}
    batch = {key: value for key, value in inputs.items()
             if key.startswith(("inputs/text/", f"inputs/{name}/"))}
    batch |= {key.removeprefix("batch/"): value for key, value in case.items()
              if key.startswith("batch/targets/text/")}
    model = EncoderDecoder(golden_fixtures.config(("text", name), ("text",)))
    apply = jax.jit(functools.partial(model.apply, method="logits"))
    logits = np.asarray(apply(golden_fixtures.variables(), batch)["text"])
    counts = case["out/text/loss_mask"] > 0
    np.testing.assert_allclose(logits[counts], case["out/text/logits"][counts], atol=1e-5)


def pack(batch):
    """Both examples of a batch in one row, their slots example by example."""
    packed, sides = {}, {"inputs": [], "targets": []}
    offsets = dict.fromkeys(sides, 0)
    latents = {"image_history": 4, "audio_history": 2}
    names = {"inputs": tuple(golden_fixtures.INPUTS), "targets": tuple(golden_fixtures.TARGETS)}
    for side, modalities in names.items():
        for name in modalities:
            fields = {key: np.asarray(value) for key, value in batch.items()
                      if key.startswith(f"{side}/{name}/")}
            mask = fields[f"{side}/{name}/mask"]
            frames = mask.shape[1]
            slots = frames * latents.get(name, 1)
            segments = np.repeat(np.asarray([[1, 2]]), frames, axis=1)
            packed |= {key: value.reshape(1, -1, *value.shape[2:])
                       for key, value in fields.items()}
            packed[f"{side}/{name}/segment_ids"] = segments.astype(np.int32)
            if name in latents:
                packed[f"{side}/{name}/frame_ids"] = np.tile(np.arange(frames), 2)[None]
            elif f"{side}/{name}/pos_ids" not in packed:
                packed[f"{side}/{name}/pos_ids"] = np.tile(np.arange(slots), 2)[None]
            sides[side].append(offsets[side] + np.arange(2 * slots).reshape(2, slots))
            offsets[side] += 2 * slots
    for side, parts in sides.items():
        packed[f"{side}/row/index"] = np.concatenate(parts, axis=1).reshape(1, -1).astype(np.int32)
    return {key: jnp.asarray(value) for key, value in packed.items()}


def test_packed_rows_equal_unpacked():
    """Two examples of every modality in a row: continuous features keep to themselves as well."""
    case = load("all_to_all.npz")
    apply = jax.jit(functools.partial(EncoderDecoder(golden_fixtures.config()).apply,
                                      method="logits"))
    logits = apply(golden_fixtures.variables(), pack(golden_fixtures.all_to_all()))
    for name, array in logits.items():
        expected, counts = case[f"out/{name}/logits"], case[f"out/{name}/loss_mask"] > 0
        np.testing.assert_allclose(np.asarray(array).reshape(expected.shape)[counts],
                                   expected[counts], atol=1e-5)


@pytest.mark.parametrize("name, options", [
    pytest.param("released", {}, marks=pytest.mark.slow),
    ("dalle", {"pattern_mask": True, "dynamic_mask": True}),
    pytest.param("nodalle", {"dynamic_mask": True}, marks=pytest.mark.slow)])
def test_masks_of_the_decoder(name, options):
    """As released, where they are not applied, and as designed."""
    case = load("denoise.npz")
    batch = {key.removeprefix("batch/"): value for key, value in case.items()
             if key.startswith("batch/")}
    batch |= golden_fixtures.target("image", case["targets"], batch["targets/image/mask"])
    image = dataclasses.replace(golden_fixtures.TARGETS["image"], **options)
    model = EncoderDecoder(golden_fixtures.config(("text",), (image,)))
    apply = jax.jit(functools.partial(model.apply, method="logits"))
    logits = np.asarray(apply(golden_fixtures.variables(), batch)["image"])
    counts = case["loss_mask"] > 0
    assert counts.sum() == 40
    np.testing.assert_allclose(logits[counts], case[f"logits/{name}"][counts], atol=1e-5)


@pytest.mark.slow
def test_greedy_decoding():
    """Eight tokens one at a time, from text and image."""
    golden, batch = load("greedy.npz"), golden_fixtures.all_to_all()
    batch = {key: value for key, value in batch.items()
             if key.startswith(("inputs/text/", "inputs/image/"))}
    model = EncoderDecoder(golden_fixtures.config(("text", "image"), ("text",)))
    variables = golden_fixtures.variables("audio", "input_audio", "input_encoders",
                                          "target_encoders_audio", "target_encoders_image")

    @jax.jit
    def decode(variables, batch):
        encoded = model.apply(variables, batch, method="encode")
        cache = model.apply(variables, encoded, 8, method="init_cache")

        def step(carry, _):
            tokens, cache = carry
            logits, cache = model.apply(variables, tokens, cache, "text", method="decode_step")
            best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (best, cache), (best, logits)

        _, (tokens, logits) = jax.lax.scan(step, (jnp.zeros(2, jnp.int32), cache), length=8)
        return tokens.T, logits.swapaxes(0, 1)

    tokens, logits = decode(variables, batch)
    np.testing.assert_array_equal(tokens, golden["tokens"])
    np.testing.assert_allclose(logits, golden["step_logits"], atol=1e-5)
