"""Placement of parameters, state, batches and activations; eight devices compute what one does."""

from __future__ import annotations

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.parallelism import sharding
from vishwam_t5x.parallelism.axis_rules import (
    MESH_AXES,
    LogicalAxisRules,
    standard_logical_axis_rules,
)

# Placement needs sizes and no devices.
CUBE = AbstractMesh((1, 2, 2, 2), MESH_AXES)
AXES = {"mlp/wi/kernel": ("embed", "mlp"), "mlp/wo/kernel": ("mlp", "embed"),
        "norm/scale": ("embed",), "token_embedder/embedding": ("vocab", "embed"),
        "layers/query/kernel": ("embed", "layers", "joined_kv"),
        "layers/scale": ("embed", "layers")}


def arrays(**overrides):
    shapes = {"mlp": {"wi": {"kernel": (16, 24)}, "wo": {"kernel": (24, 16)}},
              "norm": {"scale": (16,)}, "token_embedder": {"embedding": (40, 16)},
              "layers": {"query": {"kernel": (16, 4, 16)}, "scale": (16, 4)}} | overrides
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes,
                        is_leaf=lambda x: isinstance(x, tuple))


def specs(tree):
    return jax.tree.map(lambda s: s.spec, tree)


def test_parameters_are_split_over_fsdp_and_tensor():
    placed = sharding.parameter_shardings(arrays(), CUBE, axes=AXES)
    assert specs(placed) == {
        "mlp": {"wi": {"kernel": P("fsdp", "tensor")}, "wo": {"kernel": P("tensor", "fsdp")}},
        "norm": {"scale": P(None)}, "token_embedder": {"embedding": P("tensor", "fsdp")},
        "layers": {"query": {"kernel": P("fsdp", None, "tensor")}, "scale": P(None, None)}}


def test_axes_of_size_one_are_left_out_and_vectors_can_be_split():
    mesh = AbstractMesh((1, 4, 2, 1), MESH_AXES)
    rules = standard_logical_axis_rules(replicate_vectors=False)
    placed = specs(sharding.parameter_shardings(arrays(), mesh, rules, AXES))
    assert placed["mlp"]["wi"]["kernel"] == P("fsdp", None)
    assert placed["norm"]["scale"] == P("fsdp")


def test_flax_boxes_carry_the_axes():
    kernel = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
    boxed = jax.eval_shape(
        lambda: nn.Dense(8, kernel_init=kernel, bias_init=nn.with_logical_partitioning(
            nn.initializers.zeros, ("mlp",))).init(jax.random.key(0), jnp.ones((1, 4))))["params"]
    assert sharding.logical_axes_by_name(boxed) == {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    assert specs(sharding.parameter_shardings(boxed, CUBE)) == {
        "kernel": P("fsdp", "tensor"), "bias": P(None)}


def test_a_parameter_without_names_or_with_too_few_is_named():
    plain = {"decoder": {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}}
    with pytest.raises(UserError, match="'decoder/kernel' has 2 dimensions and 0 logical axes"):
        sharding.parameter_shardings(plain, CUBE)
    box = {"kernel": nn.LogicallyPartitioned(plain["decoder"]["kernel"], ("embed",))}
    with pytest.raises(UserError, match="'kernel' has 2 dimensions and 1 logical axes"):
        sharding.parameter_shardings(box, CUBE)


def test_an_unknown_logical_axis_names_the_parameter():
    with pytest.raises(UserError, match="(?s)'norm/scale'.*did you mean 'embed'"):
        sharding.parameter_shardings(arrays(), CUBE, axes=AXES | {"norm/scale": ("embedd",)})


def test_an_uneven_dimension_names_parameter_axis_and_sizes():
    mesh = AbstractMesh((1, 1, 6, 4), MESH_AXES)
    with pytest.raises(UserError) as caught:
        sharding.parameter_shardings(arrays(), mesh, axes=AXES)
    text = str(caught.value)
    assert "parameter 'layers/query/kernel'" in text
    assert "dimension 0 ('embed') of 16 over fsdp 6; and 3 more parameters" in text
    assert "make 'embed' 12 or 18; or use 2 instead of 6 devices for fsdp" in text


def test_uneven_dimensions_can_be_replicated_and_it_is_said_once(caplog):
    mesh = AbstractMesh((1, 1, 6, 4), MESH_AXES)
    rules = standard_logical_axis_rules(allow_uneven="replicate")
    sharding._said.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            placed = specs(sharding.parameter_shardings(arrays(), mesh, rules, AXES))
    assert placed["mlp"]["wi"]["kernel"] == P(None, "tensor")  # the other dimension stays split
    assert sum("'mlp/wi/kernel'" in record.message for record in caplog.records) == 1


def test_adam_and_adafactor_state_follow_the_parameters():
    square = arrays(mlp={"wi": {"kernel": (256, 256)}, "wo": {"kernel": (256, 128)}},
                    norm={"scale": (256,)}, token_embedder={"embedding": (512, 256)})
    placed = sharding.parameter_shardings(square, CUBE, axes=AXES)
    adam = jax.eval_shape(optax.adamw(1e-3).init, square)
    state = sharding.state_shardings({"opt_state": adam, "params": square}, square, placed, CUBE)
    assert state["params"] == placed
    assert state["opt_state"][0].mu == placed and state["opt_state"][0].nu == placed
    assert state["opt_state"][0].count.spec == P()

    factored = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=128).init, square)
    state = sharding.state_shardings(factored, square, placed, CUBE)
    assert specs(state.v_row["mlp"]["wo"]["kernel"]) == P("fsdp")  # 128 is left: embed
    assert specs(state.v_col["mlp"]["wo"]["kernel"]) == P("tensor")  # 256: mlp
    assert specs(state.v_row["mlp"]["wi"]["kernel"]) == P("fsdp")  # square: the last is reduced
    assert specs(state.v_col["mlp"]["wi"]["kernel"]) == P("tensor")
    assert specs(state.v["mlp"]["wi"]["kernel"]) in (P(), P(None))  # a placeholder of size 1
    assert state.v["layers"]["query"]["kernel"] == placed["layers"]["query"]["kernel"]
    jax.tree.map(lambda leaf, s: s.shard_shape(leaf.shape), factored, state)  # every one is even


def test_state_named_behind_the_parameter_and_reduced_with_kept_dimensions():
    placed = sharding.parameter_shardings(arrays(), CUBE, axes=AXES)
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    state = {"param_states": {"mlp": {"wi": {"kernel": {"v_row": leaf(16), "v_col": leaf(24),
                                                         "m": leaf(16, 24), "k": leaf(1, 24)}}}},
             "other": leaf(7)}
    got = specs(sharding.state_shardings(state, arrays(), placed, CUBE))
    assert got["param_states"]["mlp"]["wi"]["kernel"] == {
        "v_row": P("fsdp"), "v_col": P("tensor"), "m": P("fsdp", "tensor"), "k": P(None, "tensor")}
    assert got["other"] == P()


def test_big_state_that_is_like_no_parameter_is_named(caplog):
    sharding._said.clear()
    placed = sharding.parameter_shardings(arrays(), CUBE, axes=AXES)
    with caplog.at_level(logging.WARNING):
        sharding.state_shardings({"history": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)},
                                 arrays(), placed, CUBE)
    assert "'history'" in caplog.text and "4 MiB" in caplog.text


def test_batches_are_split_by_rows():
    batch = {"inputs/text/tokens": ((8, 32), jnp.int32), "inputs/image/input": np.zeros((8, 4, 3))}
    placed = sharding.batch_shardings(batch, CUBE)
    assert specs(placed) == dict.fromkeys(batch, P(("data", "fsdp")))
    assert sharding.batch_parts(CUBE) == 4


@pytest.mark.parametrize("size, microbatches, fix", [
    (10, 1, "BATCH_SIZE = 8 or 12"), (2, 1, "BATCH_SIZE = 4"), (12, 2, "BATCH_SIZE = 8 or 16")])
def test_a_batch_that_cannot_be_shared_names_the_nearest_sizes(size, microbatches, fix):
    with pytest.raises(UserError) as caught:
        sharding.batch_shardings({"x": ((size, 3), jnp.int32)}, CUBE, num_microbatches=microbatches)
    assert caught.value.fix == fix


def test_constrain_does_nothing_without_a_mesh_and_checks_names_with_one():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, ("batch", "embed")) is x
    mesh = AbstractMesh((1, 2, 1, 1), MESH_AXES)
    with sharding.partitioning(mesh) as here:
        assert sharding.current_partitioning() is here
        with pytest.raises(UserError, match="did you mean 'batch'"):
            sharding.constrain(x, ("batsh", "embed"))
    assert sharding.current_partitioning() is None


_NETWORK = """
    import re
    import jax, jax.numpy as jnp, numpy as np
    from vishwam_t5x.parallelism import sharding
    from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh

    axes = {"table": ("vocab", "embed"), "wi": ("embed", "mlp"), "wo": ("mlp", "embed")}
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)
    params = {"table": draw(32, 16), "wi": draw(16, 64), "wo": draw(64, 16)}
    batch = {"tokens": rng.integers(0, 32, (8, 12)).astype(np.int32)}
    traces = []

    def step(params, batch):
        traces.append(1)
        def loss(params):
            x = params["table"][batch["tokens"]]
            x = sharding.constrain(x, ("batch", "length", "embed"))
            h = sharding.constrain(jnp.tanh(x @ params["wi"]), ("batch", "length", "mlp"))
            x = sharding.constrain(x + h @ params["wo"], ("batch", "length", "embed"))
            logits = sharding.constrain(x @ params["table"].T, ("batch", "length", "vocab"))
            return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - g, params, grads), value
"""


def test_eight_devices_compute_what_one_does(eight_devices):
    out = eight_devices(_NETWORK + """
    def train(mesh):
        placed = sharding.parameter_shardings(params, mesh, axes=axes)
        rows = sharding.batch_shardings(batch, mesh)
        run = jax.jit(step, in_shardings=(placed, rows),
                      out_shardings=(placed, sharding.replicated(mesh)))
        state, losses = jax.device_put(params, placed), []
        with sharding.partitioning(mesh):
            for _ in range(4):
                state, loss = run(state, jax.device_put(batch, rows))
                losses.append(float(loss))
        return state, losses

    one, losses = train(make_mesh(devices=jax.devices()[:1]))
    for sizes in (dict(data=2, fsdp=2, tensor=2), dict(fsdp=8), dict(tensor=8, data=1),
                  dict(replica=2, data=2, fsdp=2)):
        traces.clear()
        mesh = make_mesh(MeshConfig(**{"data": 1} | sizes))
        many, others = train(mesh)
        assert len(traces) == 1, f"{len(traces)} compilations"
        np.testing.assert_allclose(others, losses, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), many, one)
        parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
        assert many["wi"].addressable_shards[0].data.size * parts == many["wi"].size
    assert losses[0] > losses[-1]
    print("same")
    """)
    assert out == "same\n"


def test_constraints_are_in_the_program_and_only_inside_the_context(eight_devices):
    out = eight_devices(_NETWORK + """
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    run = jax.jit(step)
    pins = lambda: run.lower(params, batch).as_text().count("sharding_constraint")
    with sharding.partitioning(mesh):
        inside = pins()
    print(pins(), inside >= 4, pins())
    # A dimension that four devices do not divide is split over two.
    with sharding.partitioning(mesh):
        print(jax.jit(lambda x: sharding.constrain(x, ("batch", "embed")))(
            jnp.ones((6, 4))).sharding.spec[0])
        # Each row of the batch stays on its devices: no activation is gathered whole.
        placed = sharding.parameter_shardings(params, mesh, axes=axes)
        rows = sharding.batch_shardings(batch, mesh)
        text = jax.jit(step, in_shardings=(placed, rows), out_shardings=(
            placed, sharding.replicated(mesh))).lower(params, batch).compile().as_text()
        whole = re.findall(r"f32\\[8,12,(?:16|32|64)\\]", text)
        local = re.findall(r"f32\\[2,12,(?:16|32)\\]", text)
        print(len(whole), len(local) > 0)
    """)
    assert out.split() == ["0", "True", "0", "data", "0", "True"]


_LOOKUP = """
    import re
    import jax, jax.numpy as jnp
    from vishwam_t5x.parallelism import sharding
    from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    place = sharding.parameter_shardings(
        {"table": jax.ShapeDtypeStruct((512, 64), jnp.float32)}, mesh,
        axes={"table": ("vocab", "embed")})["table"]

    def gathered(pin_table):
        def loss(table, ids):
            if pin_table:
                table = sharding.constrain(table, ("vocab", "embed"))
            x = sharding.constrain(jnp.take(table, ids, axis=0), ("batch", "length", "embed"))
            return jnp.sum(jnp.sin(x))
        with sharding.partitioning(mesh):
            text = jax.jit(jax.grad(loss), out_shardings=place).lower(
                jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=place),
                jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=sharding.batch_sharding(mesh)),
            ).compile().as_text()
        # Vectors of all 16 rows on one device, whichever part of their features.
        return bool(re.search(r"f32\\[16,32,\\d+\\]\\S* all-gather", text))
"""


def test_a_constrained_table_keeps_looked_up_vectors_where_their_rows_are(eight_devices):
    assert eight_devices(_LOOKUP + """
    print(gathered(pin_table=True))
    """) == "False\n"


def test_standard_rules_know_every_axis_of_the_published_checkpoints():
    for axes in (("axis_0", "embed"), ("axis_0", "axis_1", "embed", "axis_3"),
                 ("image_patch", "embed"), ("joined_kv", "embed"), ("vocab", "embed")):
        LogicalAxisRules().check_known(axes, "a parameter")
