"""Decoder-only prefix LM: who sees whom, packing, decoding with a cache, training, sizes."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax.core import meta
from models import model_fixtures

from vishwam_t5x import gin_config
from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.models import decoding
from vishwam_t5x.models.beam_search import beam_search
from vishwam_t5x.models.cache import DecodeCache
from vishwam_t5x.models.config import RelativePositions, RotaryPositions
from vishwam_t5x.models.relative_positions import relative_buckets
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.training import step as step_lib

T5_LIKE = {"num_encoder_layers": 0, "num_kv_heads": 4, "qk_norm": False,
           "scale_attention_logits": False, "mlp_activations": ("gelu", "linear"),
           "position": RelativePositions(num_buckets=8, max_distance=16),
           "inputs": (dataclasses.replace(model_fixtures.INPUTS[0], modality_embedding=False),),
           "targets": (dataclasses.replace(model_fixtures.TARGETS[0], modality_embedding=False,
                                           logits_via_embedding=False),)}
VARIANTS = {"t5": T5_LIKE,
            "rotary": T5_LIKE | {"position": RotaryPositions(), "qk_norm": True,
                                 "num_kv_heads": 2, "scan_layers": True},
            "per_layer": T5_LIKE | {"position": RelativePositions(
                num_buckets=8, max_distance=16, per_layer=True), "num_kv_heads": 2}}
INPUTS = ([5, 6, 7], [8, 9, 10, 11, 12], [13])
TARGETS = ([20, 21, 22, 1], [23, 24, 1], [25, 26, 27, 28, 1])


def build(variant="t5", **changes):
    return model_fixtures.build(**VARIANTS[variant] | changes)


def rows_of(examples, packed, input_length=10, target_length=13):
    """A batch as the data pipeline lays it out; `examples` are (row, inputs, targets)."""
    placed = []
    for row, inputs, targets in examples:
        arrays = {"inputs/text/tokens": np.asarray(inputs, np.int32),
                  "targets/text/targets": np.asarray(targets, np.int32)}
        placed.append(PlacedExample(row, example_lengths(arrays), arrays))
    number = examples[-1][0] + 1
    spec = BatchSpec(number, input_length, target_length, {"text": input_length},
                     {"text": target_length}, packed=packed)
    return assemble(spec, number, placed)


@functools.cache
def logits_function(model):
    return jax.jit(lambda variables, batch: model.apply(variables, batch, method="logits")["text"])


def logits(model, variables, batch):
    return np.asarray(logits_function(model)(variables, batch))


# --- the mathematics, once more in NumPy: T5X's sequence BOS, inputs, targets ---

def reference(params, inputs, targets, layers=2, heads=4):
    """Logits of each target from a sequence of one example (arXiv:1910.10683, T5 1.1)."""
    sequence = np.asarray([0, *inputs, *targets[:-1]])
    prefix, length = len(inputs) + 1, len(sequence)
    place = np.arange(length)
    seen = (place[:, None] >= place) | ((place[:, None] < prefix) & (place < prefix))
    norm = lambda x, scale: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))
    table = params["decoder"]["relpos_bias"]["rel_embedding"]
    bias = table[:, relative_buckets(place - place[:, None], bidirectional=False, num_buckets=8,
                                     max_distance=16)]
    x = params["text_token_embedder"]["embedding"][sequence]
    for i in range(layers):
        p = params["decoder"][f"layers_{i}"]
        y = norm(x, p["pre_self_attention_layer_norm"]["scale"])
        split = lambda name, y=y, p=p: np.moveaxis(
            (y @ p["self_attention"][name]["kernel"]).reshape(length, heads, -1), 1, 0)
        scores = split("query") @ np.swapaxes(split("key"), 1, 2) + bias
        weights = np.exp(np.where(seen, scores, -1e10) - scores.max())
        context = (weights / weights.sum(-1, keepdims=True)) @ split("value")
        context = np.moveaxis(context, 0, 1).reshape(length, -1)
        x = x + context @ p["self_attention"]["out"]["kernel"]
        y = norm(x, p["pre_mlp_layer_norm"]["scale"])
        x = x + (gelu(y @ p["mlp"]["wi_0"]["kernel"]) * (y @ p["mlp"]["wi_1"]["kernel"])) @ (
            p["mlp"]["wo"]["kernel"])
    x = norm(x, params["decoder"]["decoder_norm"]["scale"])
    return x[prefix - 1:] @ params["target_encoders_text"]["logits_kernel"]


def test_packed_and_unpacked_are_the_numpy_reference():
    model, variables = build()
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    examples = list(zip(INPUTS, TARGETS, strict=True))
    alone = logits(model, variables, rows_of(
        [(row, *example) for row, example in enumerate(examples)], packed=False))
    packed = logits(model, variables, rows_of(
        [(0, *examples[0]), (0, *examples[1]), (0, *examples[2])], packed=True))
    start = 0
    for row, (inputs, targets) in enumerate(examples):
        want = reference(params, inputs, targets)
        np.testing.assert_allclose(alone[row, :len(targets)], want, atol=1e-5)
        np.testing.assert_allclose(packed[0, start:start + len(targets)], want, atol=1e-5)
        start += len(targets)


def test_packed_is_unpacked_with_rotary_positions():
    model, variables = build("rotary")
    alone = logits(model, variables, rows_of(
        list(zip(range(3), INPUTS, TARGETS, strict=True)), packed=False))
    packed = logits(model, variables, rows_of(
        list(zip((0, 0, 0), INPUTS, TARGETS, strict=True)), packed=True))
    np.testing.assert_allclose(packed[0, :4], alone[0, :4], atol=1e-5)
    np.testing.assert_allclose(packed[0, 7:12], alone[2, :5], atol=1e-5)


def test_who_sees_whom():
    """Of the output: every target sees all of its prefix and nothing later; no other example."""
    model, variables = build()
    batch = rows_of([(0, INPUTS[0], TARGETS[0]), (0, INPUTS[1], TARGETS[1])], packed=True)

    def touched(key, column):
        changed = batch[key].copy()
        changed[0, column] = 40
        after = logits(model, variables, batch | {key: changed})
        return np.flatnonzero(np.abs(after - before).max(-1)[0, :7] > 1e-6).tolist()

    before = logits(model, variables, batch)
    assert touched("inputs/text/tokens", 0) == touched("inputs/text/tokens", 2) == [0, 1, 2, 3]
    assert touched("inputs/text/tokens", 5) == [4, 5, 6]
    assert touched("targets/text/inputs", 2) == [2, 3]
    assert touched("targets/text/inputs", 5) == [5, 6]


def test_the_prefix_sees_itself_both_ways_and_no_target():
    """Inside: a later input changes an earlier slot of the prefix, a target does not."""
    model, variables = build()
    batch = rows_of([(0, INPUTS[1], TARGETS[1])], packed=False)

    @jax.jit
    def whole(batch):
        return model.apply(variables, batch, method="logits", capture_intermediates=(
            lambda module, name: (module.name, name) == ("decoder", "__call__")),
            mutable=["intermediates"])[1]

    def hidden(batch):  # of the joint row: BOS, the five inputs, two targets
        return np.asarray(whole(batch)["intermediates"]["decoder"]["__call__"][0])[0, :8]

    def touched(key, column):
        changed = batch[key].copy()
        changed[0, column] = 40
        return (np.abs(hidden(batch | {key: changed}) - hidden(batch)).max(-1) > 1e-6).tolist()

    assert all(touched("inputs/text/tokens", 4))
    assert touched("targets/text/inputs", 1) == [False] * 6 + [True] * 2


# --- decoding ---

def decoded(model, variables, tokens, method, num_decodes, length=5, **settings):
    def run(variables):
        encoded = model.apply(variables, {"inputs/text/tokens": tokens}, method="encode")
        cache = model.apply(variables, encoded, length, num_decodes, method="init_cache")
        assert (cache.num_rows, cache.num_decodes) == (len(tokens) * num_decodes, num_decodes)

        def step(tokens, cache):
            return model.apply(variables, tokens, cache, "text", method="decode_step")

        common = settings | {"batch_size": len(tokens), "max_length": length, "eos_id": None}
        if method == "beam":
            return beam_search(step, cache, DecodeCache.reorder, num_beams=num_decodes,
                               **common | {"eos_id": 1})
        return decoding.sample(step, cache, jax.random.key(0), num_decodes=num_decodes, **common)

    return jax.jit(run)(variables)


def padded(sequences):
    length = max(map(len, sequences))
    return np.asarray([[*s, *[0] * (length - len(s))] for s in sequences], np.int32)


@pytest.mark.parametrize("variant", [
    "t5", "rotary", pytest.param("per_layer", marks=pytest.mark.slow)])
def test_greedy_with_a_cache_is_the_argmax_of_the_whole_row(variant):
    model, variables = build(variant)
    found = decoded(model, variables, padded(INPUTS), "sample", 2, temperature=0.0)
    whole = logits(model, variables, rows_of(
        [(row, inputs, found.tokens[row, 1]) for row, inputs in enumerate(INPUTS)], packed=False))
    for row in range(3):
        log_probs = jax.nn.log_softmax(whole[row, :5])
        np.testing.assert_array_equal(found.tokens[row, 0], np.argmax(log_probs, -1))
        np.testing.assert_allclose(found.scores[row], np.max(log_probs, -1).sum(), rtol=1e-5)


@pytest.mark.slow
def test_beams_have_their_true_scores():
    model, variables = build()
    found = decoded(model, variables, padded(INPUTS), "beam", 3, alpha=0.0)
    best = np.asarray(found.best)
    whole = logits(model, variables, rows_of(
        [(row, inputs, best[row]) for row, inputs in enumerate(INPUTS)], packed=False))
    for row in range(3):
        length = int(np.argmax(best[row] == 1)) + 1 if (best[row] == 1).any() else 5
        log_probs = np.asarray(jax.nn.log_softmax(whole[row]))
        score = log_probs[np.arange(length), best[row, :length]].sum()
        np.testing.assert_allclose(found.scores[row, -1], score, rtol=1e-4)


# --- training ---

def test_learns_from_packed_rows():
    model, variables = build(num_decoder_layers=1)
    config = step_lib.StepConfig(num_microbatches=2)
    loss = step_lib.model_loss(model, config.loss)
    batch = rows_of([(row, *example) for row in range(2) for example in zip(
        INPUTS, TARGETS, strict=True)], packed=True)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        grads, sums = step_lib.accumulate_gradients(loss, params, batch, config, lambda x: x,
                                                    jax.random.key(0))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, sums["text"].loss / sums["text"].weight

    params, state, losses = variables["params"], optimizer.init(variables["params"]), []
    for _ in range(12):
        params, state, loss_value = step(params, state)
        losses.append(float(loss_value))
    assert losses[-1] < 0.5 * losses[0], losses
    sums = model.apply(variables, batch, LossConfig(), method="loss_sums")["text"]
    assert float(sums.weight) == 2 * sum(map(len, TARGETS))  # the prefix is not predicted


# --- configuration ---

@pytest.mark.slow
def test_images_may_stand_in_the_prefix():
    model, variables = build(inputs=model_fixtures.INPUTS[:2])
    batch = rows_of([(0, INPUTS[0], TARGETS[0])], packed=False)
    rng = np.random.default_rng(0)
    image = {"inputs/image/input": rng.normal(size=(1, 3, 12)).astype(np.float32)}
    changed = {"inputs/image/input": image["inputs/image/input"] + 1.0}
    before, after = (logits(model, variables, batch | part)[0, :4] for part in (image, changed))
    assert np.abs(before - after).max(-1).min() > 1e-4


def test_names_are_t5x_own():
    names = set(flatten_names(build()[1]["params"]))
    layer = {"pre_self_attention_layer_norm/scale", "pre_mlp_layer_norm/scale", "mlp/wi_0/kernel",
             "mlp/wi_1/kernel", "mlp/wo/kernel",
             *(f"self_attention/{part}/kernel" for part in ("query", "key", "value", "out"))}
    assert names == {f"decoder/layers_{i}/{name}" for i in range(2) for name in layer} | {
        "decoder/decoder_norm/scale", "decoder/relpos_bias/rel_embedding",
        "text_token_embedder/embedding", "target_encoders_text/logits_kernel"}


# T5X writes two of these in its files, of the days when each layer had biases of its own and the
# base model a kernel for its logits.
SIZES = {"small": (False, None), "base": (True, 134_307_072), "large": (False, None),
         "xl": (False, None), "xxl": (False, 4_762_357_760)}


@pytest.mark.parametrize("size", SIZES)
def test_number_of_parameters(size):
    model = gin_config.parse([f"--gin_file=gin/models/decoder_only/{size}.gin"],
                             "forward").macro("MODEL")
    config = model.config

    def count(config):
        boxed = jax.eval_shape(model.clone(config=config).init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(meta.unbox(boxed["params"])))

    def whole(config):  # layers are alike
        one, two = (count(dataclasses.replace(config, num_decoder_layers=n)) for n in (1, 2))
        return one + (config.num_decoder_layers - 1) * (two - one)

    attention = 4 * config.emb_dim * config.num_heads * config.head_dim
    layer = attention + 3 * config.emb_dim * config.mlp_dim + 2 * config.emb_dim
    table = 32128 * config.emb_dim
    assert config.decoder_only and whole(config) == (
        config.num_decoder_layers * layer + table + config.emb_dim + 32 * config.num_heads)
    own_kernel, published = SIZES[size]
    if published is not None:
        old = dataclasses.replace(
            config, position=RelativePositions(per_layer=True),
            targets=(dataclasses.replace(config.targets[0], logits_via_embedding=not own_kernel),))
        assert whole(old) == published


def test_flops_are_those_of_one_row():
    from vishwam_t5x.training.setup import flops_per_slot

    config = model_fixtures.config(**T5_LIKE)
    spec = BatchSpec(1, 40, 24, {"text": 40}, {"text": 24})
    of_input, of_target = flops_per_slot(config, spec)
    width, attention, columns = 32, 32, 64
    layer = columns * (4 * width * attention + 3 * width * 48) * 2 + 4 * columns ** 2 * attention
    assert of_input == 3 * 2 * layer / columns
    np.testing.assert_allclose(40 * of_input + 24 * of_target, 3 * (
        2 * layer + 24 * 2 * width * 64))
    compiled = jax.jit(lambda params, batch: build()[0].apply(
        {"params": params}, batch, method="logits")).lower(
            build()[1]["params"], rows_of([(0, [3] * 40, [4] * 24)], False, 40, 24))
    counted = compiled.cost_analysis()["flops"]
    assert 1.0 < counted / ((40 * of_input + 24 * of_target) / 3) < 1.3
