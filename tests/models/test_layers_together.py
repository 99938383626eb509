"""Scanned and unrolled stacks, remat policies, precision, dropout, sharding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from models import model_fixtures

from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.models.scan import stack_layers, unstack_layers
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules


@pytest.fixture(scope="module")
def batch():
    return model_fixtures.text_batch()


def build(**changes):
    return model_fixtures.build(**model_fixtures.TEXT_ONLY, **changes)


def make(**changes):
    return EncoderDecoder(model_fixtures.config(**model_fixtures.TEXT_ONLY, **changes))


@functools.cache
def forward(enable_dropout=False, **changes):
    """Compiled (variables, batch, rngs) -> output."""
    return jax.jit(functools.partial(make(**changes).apply, enable_dropout=enable_dropout))


def loss_and_gradient(model, params, batch):
    def loss(params):
        sums = model.apply({"params": params}, batch, LossConfig(), method="loss_sums")
        return sum(part.loss / jnp.maximum(part.weight, 1) for part in sums.values())

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def reference(batch):
    model, variables = build()
    return variables["params"], loss_and_gradient(model, variables["params"], batch)


@pytest.mark.parametrize("scan_layers, remat_policy", [
    (True, "none"), (False, "minimal"), (True, "full"),
    pytest.param(True, "dots", marks=pytest.mark.slow),
    pytest.param(True, "offload", marks=pytest.mark.slow)])
def test_same_loss_and_gradient(reference, batch, scan_layers, remat_policy):
    params, (loss, gradient) = reference
    model = make(scan_layers=scan_layers, remat_policy=remat_policy)
    if scan_layers:
        params, gradient = stack_layers(params), stack_layers(gradient)
    found_loss, found = loss_and_gradient(model, params, batch)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, gradient)


def test_remat_recomputes(reference, batch):
    """The backward pass of 'full' contains the block again: the policy reaches the layers."""
    exponentials = {}
    for policy in ("none", "full"):
        model = make(remat_policy=policy)

        def loss(params, model=model):
            return model.apply({"params": params}, batch, LossConfig(), method="loss_sums")[
                "text"].loss

        exponentials[policy] = str(jax.make_jaxpr(jax.grad(loss))(reference[0])).count("= exp ")
    assert exponentials["full"] >= exponentials["none"] + 6  # one softmax per attention


def test_initial_numbers_depend_on_the_key_alone(batch):
    unrolled, scanned = (
        meta.unbox(jax.jit(model_fixtures.build(**changes)[0].init)(jax.random.key(0)))["params"]
        for changes in ({}, {"scan_layers": True}))
    stacked = stack_layers(unrolled)
    assert flatten_names(scanned).keys() == flatten_names(stacked).keys()
    assert scanned["encoder"]["encoder"]["mlp"]["wi_0"]["kernel"].shape == (32, 2, 48)
    jax.tree.map(np.testing.assert_array_equal, scanned, stacked)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(scanned), unrolled)
    # Layers differ, and are of the size their initializers say.
    kernels = np.asarray(scanned["encoder"]["encoder"]["mlp"]["wi_0"]["kernel"])
    assert np.abs(kernels[:, 0] - kernels[:, 1]).max() > 0.1
    assert 0.8 < kernels.std() * 32**0.5 < 1.2
    # Nor on the batch they are initialized with, even one without most of the modalities.
    model = model_fixtures.build()[0]
    found = meta.unbox(jax.jit(model.init)(jax.random.key(0), batch))["params"]
    jax.tree.map(np.testing.assert_array_equal, found, unrolled)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_has_logical_axes_with_a_rule(scan_layers):
    model = model_fixtures.build(scan_layers=scan_layers)[0]
    boxed = jax.eval_shape(model.init, jax.random.key(0))["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    known = LogicalAxisRules().logical_axes
    for leaf in leaves:
        assert isinstance(leaf, meta.Partitioned)
        assert len(leaf.names) == leaf.value.ndim and set(leaf.names) <= known, leaf
    stacked = [leaf for leaf in leaves if "layers" in leaf.names]
    assert len(stacked) == (11 + 18 if scan_layers else 0)
    assert all(leaf.names[1] == "layers" and leaf.value.shape[1] == 2 for leaf in stacked)


@pytest.mark.parametrize("precision, float32_attention_logits", [
    ("bfloat16", True), ("float16", False)])
def test_narrow_precision_is_near_and_finite(reference, batch, precision,
                                             float32_attention_logits):
    params, (loss, _) = reference
    model = make(precision=precision, float32_attention_logits=float32_attention_logits)
    shapes = jax.eval_shape(model.apply, {"params": params}, batch)
    assert shapes.encoder_output.dtype == shapes.hidden["text"].dtype == precision
    # Padding attends to nothing: if that gave NaN, it would reach the loss as keys.
    found, gradient = loss_and_gradient(model, params, batch)
    assert abs(float(found) - float(loss)) < 0.05 * float(loss)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
               for leaf in jax.tree.leaves(gradient))


def test_no_float32_copy_of_activations_in_bfloat16(batch):
    """Matmuls take bfloat16 operands, attention and output layer included."""
    model, variables = build(precision="bfloat16")
    text = jax.jit(functools.partial(model.apply, method="logits")).lower(
        variables, batch).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 30
    for line in products:
        operands = line.split(" : ")[-1].split("->")[0]
        assert "f32" not in operands.replace("bf16", ""), line


def test_dropout_acts_only_when_enabled_and_spares_positions(reference, batch):
    variables = {"params": reference[0]}
    np.testing.assert_array_equal(
        forward(dropout_rate=0.5)(variables, batch).hidden["text"],
        forward()(variables, batch).hidden["text"])
    drop = forward(enable_dropout=True, dropout_rate=0.5)
    first, second = (drop(variables, batch, rngs={"dropout": jax.random.key(seed)}).hidden["text"]
                     for seed in (0, 1))
    # The last dropout zeroes the same features at every position of a row.
    everywhere = (np.asarray(first) == 0).all(axis=1)
    assert 0.25 < everywhere.mean() < 0.75
    assert np.abs(first - second).max() > 0.1


def test_one_hot_lookup_equals_gather(reference, batch):
    variables = {"params": reference[0]}
    np.testing.assert_allclose(
        forward(one_hot_embeddings=True)(variables, batch).hidden["text"],
        forward()(variables, batch).hidden["text"], atol=1e-5)


def test_chunked_loss_equals_plain(batch):
    model, variables = build()
    plain, chunked = (
        jax.jit(lambda v, loss=LossConfig(chunk_tokens=tokens): model.apply(
            v, batch, loss, method="loss_sums"))(variables)["text"] for tokens in (0, 8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), chunked, plain)


@pytest.mark.slow  # tests/integration/test_program.py has devices, microbatches and scan together
def test_eight_devices_give_the_same_loss(eight_devices):
    """data 2 x fsdp 2 x tensor 2, sharded parameters and batch, against one device."""
    out = eight_devices("""
        import functools, jax, numpy as np
        from flax.core import meta
        from models import model_fixtures
        from vishwam_t5x.objectives.losses import LossConfig
        from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
        from vishwam_t5x.parallelism.sharding import partitioning

        batch, _ = model_fixtures.lay_out(((0, 2), (1, 3), (4, 1), (2,)), with_index=True)
        model, variables = model_fixtures.build(scan_layers=True)
        def loss(params, batch):
            sums = model.apply({"params": params}, batch, LossConfig(), method="loss_sums")
            return sum(part.loss for part in sums.values())
        single = jax.jit(jax.value_and_grad(loss))(variables["params"], batch)
        with partitioning(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))) as here:
            boxed = jax.eval_shape(model.init, jax.random.key(0))["params"]
            places = jax.tree.map(
                lambda leaf: jax.sharding.NamedSharding(here.mesh, here.rules.spec(leaf.names)),
                boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
            rows = jax.sharding.NamedSharding(
                here.mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
            sharded = jax.device_put(variables["params"], places)
            kernel = sharded["decoder"]["decoder"]["mlp"]["wo"]["kernel"]
            assert not kernel.sharding.is_fully_replicated
            found = jax.jit(jax.value_and_grad(loss))(sharded, jax.device_put(batch, rows))
        np.testing.assert_allclose(found[0], single[0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3),
                     found[1], single[1])
        print("equal")
    """, env={"PYTHONPATH": str(model_fixtures.GOLDEN.parent.parent)})
    assert out.split() == ["equal"]
