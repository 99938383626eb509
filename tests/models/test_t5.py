"""T5 by configuration of the one encoder-decoder, against numbers of the real T5X (cc342d4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from models import t5_fixtures as t5

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.models.beam_search import beam_search
from vishwam_t5x.models.config import RelativePositions
from vishwam_t5x.models.decoding import sample
from vishwam_t5x.models.relative_positions import RelativePositionBias, relative_buckets
from vishwam_t5x.models.scan import stack_layers
from vishwam_t5x.objectives import losses
from vishwam_t5x.objectives.losses import LossConfig

NORMALIZATIONS = {"None": "sum", "100.0": 100.0, "NUM_REAL_TARGET_TOKENS": "token",
                  "NUM_TOTAL_TARGET_TOKENS": "position", "AVERAGE_PER_SEQUENCE": "sequence"}


def logits(model, variables, batch):
    """Logits of the text target."""
    return np.asarray(jax.jit(
        lambda v, b: model.apply(v, b, method="logits"))(variables, batch)["text"], np.float32)


@pytest.mark.parametrize("name", ["unpacked", "packed"])
@pytest.mark.parametrize("changes", [{}, {"scan_layers": True, "remat_policy": "full"}])
def test_logits(name, changes):
    variables = t5.variables("params_init")
    if changes:
        variables = {"params": stack_layers(variables["params"])}
    found = logits(t5.model(**changes), variables, t5.batch(f"batch_{name}"))
    np.testing.assert_allclose(found, t5.arrays("logits")[name], atol=1e-5, rtol=0)


def test_encoder_output():
    batch = t5.batch("batch_unpacked")
    found = t5.model().apply(t5.variables("params_init"), batch).encoder_output
    real = batch["inputs/text/tokens"] > 0
    np.testing.assert_allclose(found[real], t5.arrays("logits")["encoded_unpacked"][real],
                               atol=1e-5, rtol=0)


def test_logits_via_embedding():
    found = logits(t5.model(logits_via_embedding=True), t5.variables("params_init", tied=True),
                   t5.batch("batch_unpacked"))
    np.testing.assert_allclose(found, t5.arrays("logits")["unpacked_logits_via_embedding"],
                               atol=1e-5, rtol=0)


def test_bfloat16_is_as_good():
    batch = t5.batch("batch_unpacked")
    found = logits(t5.model(precision="bfloat16"), t5.variables("params_init"), batch)
    real, golden = batch["targets/text/mask"] > 0, t5.arrays("logits")
    ours, theirs = (np.abs(x - golden["unpacked"])[real]
                    for x in (found, golden["unpacked_bf16"]))
    # Rounded elsewhere, so not equal: but no farther from float32 than T5X's own.
    assert ours.max() < 1.2 * theirs.max() and ours.mean() < 1.1 * theirs.mean()


def test_on_a_mesh(eight_devices):
    """Heads, their biases and the vocabulary split over `tensor`: the same numbers."""
    assert "same" in eight_devices("""
        import sys
        sys.path.insert(0, "tests")
        import jax, numpy as np
        from models import t5_fixtures as t5
        from vishwam_t5x.core.trees import flatten_names
        from vishwam_t5x.evaluation.placement import Placement
        from vishwam_t5x.evaluation.restoring import abstract_params
        from vishwam_t5x.objectives.losses import LossConfig
        from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh

        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        params, batch = t5.variables("params_init")["params"], t5.batch("batch_unpacked")
        placement = Placement(mesh, None, 4)

        def loss(model, params):
            sums = model.apply({"params": params}, placed, LossConfig(normalization="sum"),
                               method="loss_sums")
            return sums["text"].loss

        placed, model = placement.put(batch), t5.model()
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
        table = places["decoder"]["relpos_bias"]["rel_embedding"].spec
        assert "tensor" in table, table
        with placement.context():
            here = jax.device_put(params, places)
            logits = jax.jit(lambda p: model.apply({"params": p}, placed, method="logits"))(here)
            gradients = jax.jit(jax.grad(lambda p: loss(model, p)))(here)
        np.testing.assert_allclose(logits["text"], t5.arrays("logits")["unpacked"], atol=1e-5)
        for name, golden in t5.flat("grads_unpacked").items():
            np.testing.assert_allclose(flatten_names(gradients)[name], golden, rtol=0,
                                       atol=1e-5 * np.abs(golden).max(), err_msg=name)
        print("same")
    """)


def test_parameters_are_those_of_t5x():
    boxed = jax.eval_shape(t5.model().init, jax.random.key(0))["params"]
    found = {name: list(leaf.shape) for name, leaf in flatten_names(meta.unbox(boxed)).items()}
    assert found == {t5.ours(name): shape
                     for name, (shape, _) in t5.numbers()["params"].items()}


def test_relative_buckets():
    golden = t5.arrays("relpos")
    for bidirectional, name in ((True, "bucket_bidirectional"), (False, "bucket_causal")):
        np.testing.assert_array_equal(
            relative_buckets(golden["relative_position"], bidirectional=bidirectional),
            golden[name])


@pytest.mark.parametrize("stack, bidirectional, name", [
    ("encoder", True, "enc_bias_qlen20_klen20"), ("decoder", False, "dec_bias_qlen20_klen20")])
def test_relative_biases(stack, bidirectional, name):
    params = t5.variables("params_init")["params"][stack]["relpos_bias"]
    module = RelativePositionBias(4, bidirectional)
    golden = t5.arrays("relpos")[name]
    np.testing.assert_array_equal(module.apply({"params": params}, 20, 20), golden)
    np.testing.assert_array_equal(module.apply({"params": params}, 3, 20), golden[:, :, :3])
    for query in (0, 7, 19):
        found = jax.jit(lambda q: module.apply({"params": params}, q, 20, method="at"))(query)
        np.testing.assert_array_equal(found, golden[:, :, query:query + 1])
    # The backward pass of a look-up by distance needs no scatter.
    text = jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, 20, 20) ** 2))).lower(
        params).compile().as_text()
    assert "scatter" not in text and "gather" not in text


@pytest.mark.parametrize("case", sorted(t5.numbers()["losses"]))
def test_losses(case):
    name, z_loss, smoothing, factor = (part.split("=")[-1] for part in case.split("|"))
    config = LossConfig(z_loss=float(z_loss), label_smoothing=float(smoothing),
                        normalization=NORMALIZATIONS[factor])
    batch, logits = t5.batch(f"batch_{name}"), t5.arrays("logits")[name]
    sums = {"text": losses.cross_entropy_sums(
        logits, batch["targets/text/targets"], losses.loss_weights(batch, "text", config),
        config.z_loss, config.label_smoothing)}
    normalizers = losses.normalizers(batch, config)
    golden = t5.numbers()["losses"][case]
    assert losses.total_loss(sums, normalizers, config) == pytest.approx(golden["loss"], rel=2e-6)
    assert sums["text"].z_loss / normalizers["text"] == pytest.approx(golden["z_loss"], rel=2e-6)


@pytest.mark.parametrize("name", ["unpacked", "packed"])
def test_gradients(name):
    config, batch = LossConfig(normalization="sum"), t5.batch(f"batch_{name}")

    def loss(params):
        return t5.model().apply({"params": params}, batch, config, method="loss_sums")["text"].loss

    found = flatten_names(jax.jit(jax.grad(loss))(t5.variables("params_init")["params"]))
    if name == "unpacked":
        for name, golden in t5.flat("grads_unpacked").items():
            np.testing.assert_allclose(found[name], golden, rtol=0,
                                       atol=1e-5 * np.abs(golden).max(), err_msg=name)
    else:
        norms = t5.numbers()["grad_norm_per_param_packed"]
        assert {t5.ours(name) for name in norms} == set(found)
        for name, golden in norms.items():
            assert np.linalg.norm(found[t5.ours(name)]) == pytest.approx(golden, rel=1e-5), name


def test_a_cut_batch_normalized_by_sequence_adds_up():
    config, batch = LossConfig(normalization="sequence"), t5.batch("batch_packed")
    examples = {(row, segment) for row, line in enumerate(batch["targets/text/segment_ids"])
                for segment in line.tolist() if segment}
    assert losses.normalizers(batch, config)["text"] == pytest.approx(len(examples), rel=1e-6)
    weights = losses.loss_weights(batch, "text", config)
    parts = [losses.loss_weights({name: array[row:row + 1] for name, array in batch.items()},
                                 "text", config) for row in range(3)]
    np.testing.assert_array_equal(jnp.concatenate(parts), weights)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "mean"])
def test_normalizations_that_make_no_sense(value):
    with pytest.raises(UserError, match="normalization"):
        LossConfig(normalization=value)


@pytest.fixture(scope="module")
def trained():
    """(decode step, empty cache for so many decodes) of the trained model and its inputs."""
    model, variables = t5.model(), t5.variables("params_trained")
    inputs = {"inputs/text/tokens": t5.arrays("decode_batch")["encoder_input_tokens"]}
    encoded = model.apply(variables, inputs, method="encode")

    def step(tokens, cache):
        return model.apply(variables, tokens, cache, "text", method="decode_step")

    def cache(count):
        return model.apply(variables, encoded, 24, count, method="init_cache")

    return step, cache


def test_greedy_is_t5x_but_for_its_score(trained):
    step, cache = trained
    arguments = {"batch_size": 4, "max_length": 24, "temperature": 0.0}
    found = sample(step, cache(1), jax.random.key(0), **arguments)
    golden = t5.arrays("decodes")
    np.testing.assert_array_equal(found.tokens, golden["greedy_temp0/decodes"])
    np.testing.assert_array_equal(found.tokens, golden["greedy_default_topk1/decodes"])
    # T5X scores a token by the distribution left after temperature and top-k, in which the best
    # token is certain: every greedy decode scores 0. Ours is the model's own log-probability, which
    # for the first three is that of T5X's score_batch: there the targets are what is decoded.
    assert not golden["greedy_temp0/scores"].any()
    targets = t5.arrays("decode_batch")["decoder_target_tokens"]
    alike = [row for row in range(4) if (found.tokens[row, 0] == targets[row]).all()]
    assert len(alike) >= 2
    np.testing.assert_allclose(found.scores[alike, 0],
                               np.asarray(t5.numbers()["score_batch_trained"])[alike], rtol=2e-5)
    rescaled = sample(step, cache(1), jax.random.key(0), rescale_log_probs=True, **arguments)
    np.testing.assert_array_equal(rescaled.scores, golden["greedy_temp0/scores"])


@pytest.mark.parametrize("name, num_beams, alpha", [
    ("beam4_alpha0.6", 4, 0.6), ("beam4_alpha0.0", 4, 0.0), ("beam1", 1, 0.6)])
def test_beam_search(trained, name, num_beams, alpha):
    step, cache = trained
    found = jax.jit(lambda: beam_search(
        step, cache(num_beams), lambda cache, rows: cache.reorder(rows), batch_size=4,
        max_length=24, num_beams=num_beams, alpha=alpha))()
    golden = t5.arrays("decodes")
    np.testing.assert_array_equal(found.tokens, golden[f"{name}/decodes"])
    np.testing.assert_allclose(found.scores, golden[f"{name}/scores"], atol=2e-5)


@pytest.mark.parametrize("name, settings", [
    ("temp1_topk0_PRNGKey7", {"temperature": 1.0, "num_decodes": 4}),
    ("temp0.7_topk10_PRNGKey7", {"temperature": 0.7, "top_k": 10, "num_decodes": 4}),
    ("temp0.9_topp0.9_PRNGKey7", {"temperature": 0.9, "top_p": 0.9, "num_decodes": 2})])
def test_the_same_key_draws_the_same_tokens(trained, name, settings):
    step, cache = trained
    found = jax.jit(lambda: sample(
        step, cache(settings["num_decodes"]), jax.random.PRNGKey(7), batch_size=4, max_length=24,
        rescale_log_probs=True, **settings))()
    golden = t5.arrays("decodes")
    np.testing.assert_array_equal(found.tokens, golden[f"{name}/decodes"])
    np.testing.assert_allclose(found.scores, golden[f"{name}/scores"], atol=1e-4)


def test_a_prompt(trained):
    step, cache = trained
    prompts = t5.arrays("decode_prompt_batch")["decoder_input_tokens"][:, 1:]
    np.testing.assert_array_equal(t5.arrays("decode_prompt_batch")["encoder_input_tokens"],
                                  t5.arrays("decode_batch")["encoder_input_tokens"])
    found = sample(step, cache(1), jax.random.key(0), batch_size=4, max_length=24, temperature=0.0,
                   prompt=prompts)
    np.testing.assert_array_equal(found.tokens, t5.arrays("decodes")["prompted_greedy/decodes"])


def test_score_of_given_targets():
    batch = t5.batch("decode_batch")
    found = logits(t5.model(), t5.variables("params_trained"), batch)
    log_probs = jax.nn.log_softmax(found)
    at_target = jnp.take_along_axis(log_probs, batch["targets/text/targets"][..., None], -1)[..., 0]
    scores = jnp.sum(at_target * batch["targets/text/mask"], axis=1)
    np.testing.assert_allclose(scores, t5.numbers()["score_batch_trained"], rtol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_a_table_for_each_layer(scan):
    """umT5: decoding token by token gives the logits of the whole row."""
    model = t5.model(position=RelativePositions(per_layer=True), scan_layers=scan)
    variables = {"params": meta.unbox(model.init(jax.random.key(0))["params"])}
    names = flatten_names(variables["params"])
    table = "decoder/decoder/relpos_bias/rel_embedding" if scan else \
        "decoder/layers_1/relpos_bias/rel_embedding"
    assert names[table].shape == ((4, 2, 32) if scan else (4, 32))
    assert "decoder/relpos_bias/rel_embedding" not in names
    batch = t5.batch("batch_unpacked")
    whole = logits(model, variables, batch)
    encoded = model.apply(variables, batch, method="encode")
    cache = model.apply(variables, encoded, 24, method="init_cache")
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache, "text",
                                                     method="decode_step"))
    for position in range(6):
        found, cache = step(batch["targets/text/inputs"][:, position], cache)
        np.testing.assert_allclose(found, whole[:, position], atol=2e-5)


@pytest.mark.parametrize("fields, said", [
    ({"num_buckets": 30}, "multiple of 4"), ({"num_buckets": 0}, "at least 1"),
    ({"max_distance": 16}, "exceed")])
def test_positions_that_make_no_sense(fields, said):
    with pytest.raises(UserError, match=said):
        RelativePositions(**fields)
