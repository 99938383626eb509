"""What a decoder may read of codes that the task hid, and attention in the patterns of a grid."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import model_fixtures

from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models.config import CodeOutput, TextInput
from vishwam_t5x.models.scan import stack_layers
from vishwam_t5x.training.setup import check_modalities

TOKENS = np.asarray([[4, 5, 6, 7, 8, 9, 0]], np.int32)
FIELDS = {
    "targets": TOKENS, "inputs": np.asarray([[0, 4, 5, 0, 7, 8, 0]], np.int32),
    "pos_ids": np.asarray([[0, 1, 2, 0, 1, 2, 0]], np.int32),
    "segment_ids": np.asarray([[1, 1, 1, 2, 2, 2, 0]], np.int32),
    "task_mask": np.asarray([[0, 1, 1, 0, 0, 0, 0]], np.int32)}


def codes(**options):
    return CodeOutput(modality="image", vocab_size=32, grid=(3, 4), **options)


@pytest.mark.parametrize("options, expected", [
    ({}, [0, 4, 5, 0, 7, 8, 0]), ({"mask_token": True}, [0, 4, 1, 0, 7, 8, 0]),
    # Only the first example has hidden codes: it reads its own tokens, those hidden as [MASK].
    ({"mask_token": True, "shift_back": True}, [4, 1, 1, 0, 7, 8, 0])])
def test_decoder_inputs(options, expected):
    fields = {name: jnp.asarray(value) for name, value in FIELDS.items()}
    np.testing.assert_array_equal(codes(**options).decoder_inputs(fields), [expected])


def test_nothing_is_hidden_where_the_batch_does_not_say():
    fields = {name: jnp.asarray(FIELDS[name]) for name in ("targets", "inputs")}
    out = codes(mask_token=True, shift_back=True).decoder_inputs(fields)
    np.testing.assert_array_equal(out, FIELDS["inputs"])


@pytest.mark.parametrize("options, match", [
    ({"shift_back": True}, "read what it is to predict"),
    ({"layout": (3, 3)}, "as many places")])
def test_refuses(options, match):
    with pytest.raises(UserError, match=match):
        codes(**options)


def test_patterns_need_an_encoder():
    with pytest.raises(UserError, match="need an encoder"):
        model_fixtures.config(num_encoder_layers=0, targets=(codes(pattern_mask=True),))


@pytest.mark.parametrize("options", [{"dynamic_mask": True}, {"mask_token": True}])
def test_the_objective_must_say_what_is_hidden(options):
    config = model_fixtures.config(inputs=(TextInput(vocab_size=64),), targets=(codes(**options),))
    sides = {"input_modalities": ("text",), "target_modalities": ("image",)}

    def check(task_masks):
        spec = BatchSpec(1, 8, 12, {"text": 8}, {"image": 12}, task_masks=task_masks)
        check_modalities(SimpleNamespace(config=config), SimpleNamespace(**sides), spec)

    check(("image",))
    with pytest.raises(UserError, match="task_masks = True"):
        check(())


@pytest.fixture(scope="module")
def drawing():
    """A model that draws a 3 x 4 grid by rows and columns, and its logits of a whole grid."""
    model, variables = model_fixtures.build(
        num_decoder_layers=3, inputs=(TextInput(vocab_size=64),),
        targets=(codes(pattern_mask=True, layout=(6, 2)),))
    targets = np.random.default_rng(0).integers(2, 32, (2, 12)).astype(np.int32)
    batch = {"inputs/text/tokens": np.full((2, 3), 7, np.int32),
             "targets/image/targets": targets, "targets/image/mask": np.ones_like(targets),
             "targets/image/inputs": np.pad(targets, ((0, 0), (1, 0)))[:, :-1]}
    logits = jax.jit(functools.partial(model.apply, method="logits"))(variables, batch)
    return model, variables, batch, logits["image"]


def test_patterns_hold_token_by_token(drawing):
    model, variables, batch, expected = drawing

    @jax.jit
    def decode(variables, inputs):
        encoded = model.apply(variables, {"inputs/text/tokens": batch["inputs/text/tokens"]},
                              method="encode")
        cache = model.apply(variables, encoded, 12, method="init_cache")

        def step(cache, tokens):
            logits, cache = model.apply(variables, tokens, cache, "image", method="decode_step")
            return cache, logits

        return jax.lax.scan(step, cache, inputs.T)[1].swapaxes(0, 1)

    np.testing.assert_allclose(decode(variables, batch["targets/image/inputs"]), expected,
                               atol=1e-5)


@pytest.mark.parametrize("options", [
    {"dynamic_mask": True, "mask_token": True, "pattern_mask": True, "layout": (6, 2)},
    pytest.param({"dynamic_mask": True}, marks=pytest.mark.slow),
    pytest.param({"mask_token": True}, marks=pytest.mark.slow),
    pytest.param({"dynamic_mask": True, "scan": True}, marks=pytest.mark.slow)])
def test_what_is_written_is_masked_as_in_training(drawing, options):
    """Token by token, two decodes of each example, as the whole grid is with the same mask."""
    _, variables, batch, _ = drawing
    options = dict(options)
    if scan := options.pop("scan", False):
        variables = {"params": stack_layers(variables["params"])}
    model = model_fixtures.EncoderDecoder(model_fixtures.config(
        num_decoder_layers=3, inputs=(TextInput(vocab_size=64),), targets=(codes(**options),),
        scan_layers=scan))
    hidden = np.asarray([[0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1], [1, 0] * 6], np.int32)
    whole = jax.jit(functools.partial(model.apply, method="logits"))
    expected = whole(variables, {**batch, "targets/image/task_mask": hidden})["image"]

    @jax.jit
    def decode(variables, inputs):
        encoded = model.apply(variables, {"inputs/text/tokens": batch["inputs/text/tokens"]},
                              method="encode")
        cache = model.apply(variables, encoded, 12, 2, hidden, method="init_cache")

        def step(cache, tokens):
            logits, cache = model.apply(variables, jnp.repeat(tokens, 2), cache, "image",
                                        method="decode_step")
            return cache, logits

        return jax.lax.scan(step, cache, inputs.T)[1].swapaxes(0, 1)

    found = decode(variables, batch["targets/image/inputs"])
    for each in (found[0::2], found[1::2]):
        np.testing.assert_allclose(each, expected, atol=1e-5)
    nothing = whole(variables, {**batch, "targets/image/task_mask": np.zeros_like(hidden)})["image"]
    assert np.abs(nothing - expected).max() > 1e-2


@pytest.mark.slow
def test_patterns_hold_in_a_scan_and_narrow_attention(drawing):
    _, variables, batch, expected = drawing
    changes = {"num_decoder_layers": 3, "inputs": (TextInput(vocab_size=64),)}
    scanned = model_fixtures.config(scan_layers=True, targets=(
        codes(pattern_mask=True, layout=(6, 2)),), **changes)
    whole = model_fixtures.config(scan_layers=True, targets=(codes(),), **changes)
    stacked = {"params": stack_layers(variables["params"])}

    def logits(config):
        model = model_fixtures.EncoderDecoder(config)
        return jax.jit(functools.partial(model.apply, method="logits"))(stacked, batch)["image"]

    np.testing.assert_allclose(logits(scanned), expected, atol=1e-5)
    assert np.abs(np.asarray(logits(whole)) - expected).max() > 1e-3
