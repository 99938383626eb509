"""Groups of parameters: frozen ones, learning rates, other optimizers; a whole train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from models import model_fixtures

from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import count_bytes, flatten_names
from vishwam_t5x.objectives import losses
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
from vishwam_t5x.precision.loss_scale import init_loss_scale
from vishwam_t5x.precision.policy import resolve_policy
from vishwam_t5x.training import step as step_lib
from vishwam_t5x.training.optimizer_groups import OptimizerGroups
from vishwam_t5x.training.optimizers import SGD, Adafactor, AdamW, Lion
from vishwam_t5x.training.stability import StabilityState
from vishwam_t5x.training.state import StateFactory, TrainState

PARAMS = {"encoder": {"wi": jnp.full((4, 6), 2.0), "scale": jnp.full((4,), 2.0)},
          "decoder": {"wi": jnp.full((4, 6), 2.0)}, "table": jnp.full((8, 4), 2.0)}
GRADS = jax.tree.map(lambda leaf: jnp.linspace(-1.0, 1.0, leaf.size).reshape(leaf.shape), PARAMS)


def updates_of(optimizer, steps=1, grads=GRADS):
    transformation = optimizer.build()
    state = transformation.init(PARAMS)
    for _ in range(steps):
        updates, state = transformation.update(grads, state, PARAMS)
    return flatten_names(updates), state


def alone(optimizer, *names, steps=1):
    """What the optimizer does to these parameters when there are no others."""
    pick = lambda tree: {name: flatten_names(tree)[name] for name in names}
    transformation = optimizer.build()
    state = transformation.init(pick(PARAMS))
    for _ in range(steps):
        updates, state = transformation.update(pick(GRADS), state, pick(PARAMS))
    return updates


def test_each_group_is_as_if_alone():
    groups = OptimizerGroups(groups=(("scale$", SGD(0.5)), ("^encoder/", 0.1), ("table", None)),
                             default=AdamW(0.01, global_norm_clip=0.5))
    found, state = updates_of(groups, steps=3)
    want = {**alone(SGD(0.5), "encoder/scale", steps=3),
            **alone(AdamW(0.001, global_norm_clip=0.5), "encoder/wi", steps=3),
            **alone(AdamW(0.01, global_norm_clip=0.5), "decoder/wi", steps=3)}
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-6, err_msg=name)
    assert not found["table"].any()
    assert set(state.groups) == {"0", "1", "default"}
    # Nothing is kept for what is frozen: two moments of each parameter of AdamW, and three counts.
    kept = sum(count_bytes(PARAMS[part]["wi"]) for part in ("encoder", "decoder"))
    assert 2 * kept < count_bytes(state) <= 2 * kept + 4 * 4
    assert not [name for name in flatten_names(state) if "table" in name]
    np.testing.assert_allclose([groups.schedule(0), groups.label("x") == "default"], [0.01, True])


def test_one_clip_over_all_that_is_trained():
    groups = OptimizerGroups(groups=(("^table", None), ("^encoder/", 0.1)), default=SGD(1.0),
                             global_norm_clip=0.25)
    found, _ = updates_of(groups)
    flat = flatten_names(GRADS)
    norm = np.sqrt(sum(np.sum(np.square(flat[name])) for name in flat if name != "table"))
    np.testing.assert_allclose(found["decoder/wi"], -0.25 / norm * flat["decoder/wi"], rtol=1e-5)
    np.testing.assert_allclose(found["encoder/wi"], -0.025 / norm * flat["encoder/wi"], rtol=1e-5)


def test_a_schedule_is_scaled():
    groups = OptimizerGroups(groups=(("table", 3),), default=SGD(lambda step: 0.5 / (step + 1)))
    found, _ = updates_of(groups, steps=2)
    np.testing.assert_allclose(found["table"], -0.75 * GRADS["table"], rtol=1e-6)
    np.testing.assert_allclose(groups.schedule(1), 0.25)


@pytest.mark.parametrize("groups, words", [
    ((("^encodr/", None),), "nearest names: encoder/"),
    ((("encoder", 0.5), ("encoder/scale", None)), "comes first"),
])
def test_a_pattern_that_decides_nothing(groups, words):
    transformation = OptimizerGroups(groups=groups, default=SGD(0.1)).build()
    with pytest.raises(UserError) as caught:
        transformation.init(PARAMS)
    assert words in str(caught.value)


def test_disjoint_groups_refuse_a_parameter_of_two():
    overlapping = (("encoder/scale", 0.5), ("encoder", None))
    OptimizerGroups(groups=overlapping, default=SGD(0.1)).build().init(PARAMS)
    refusing = OptimizerGroups(groups=overlapping, default=SGD(0.1), disjoint=True).build()
    with pytest.raises(UserError, match="more than one optimizer") as caught:
        refusing.init(PARAMS)
    assert "'encoder/scale' and 'encoder'" in caught.value.got
    apart = (("encoder/scale", 0.5), ("^table", None))
    OptimizerGroups(groups=apart, default=SGD(0.1), disjoint=True).build().init(PARAMS)


@pytest.mark.parametrize("fields, words", [
    ({"groups": (("(", None),)}, "regular expression"), ({"groups": ()}, "pairs"),
    ({"groups": (("x", "adam"),)}, "optimizer, a number or None"),
    ({"groups": ("x",)}, "pair"), ({"groups": (("x", 0.0),)}, "positive"),
    ({"groups": (("x", float("inf")),)}, "factor of the learning rate"),
    ({"groups": (("x", True),)}, "optimizer, a number or None"),
    ({"groups": (("x", 0.5),), "default": None}, "not there"),
    ({"groups": (("x", None),), "default": None}, "freeze everything"),
    ({"groups": (("x", None),), "default": 0.1}, "default must be"),
    ({"groups": (("x", None),), "global_norm_clip": 0.0}, "global_norm_clip"),
])
def test_mistakes(fields, words):
    with pytest.raises(UserError, match=words):
        OptimizerGroups(**{"default": SGD(0.1), **fields})


# --- a whole train step ---

GROUPS = OptimizerGroups(groups=(("^encoder/", None), ("^table", Adafactor(0.1, beta1=0.9))),
                         default=Lion(0.01))
AXES = {"encoder": {"wi": ("embed", "mlp")}, "decoder": {"wi": ("embed", "mlp")},
        "table": ("vocab", "embed")}


def init(key):
    shapes = {"encoder": {"wi": (4, 6)}, "decoder": {"wi": (4, 6)}, "table": (8, 4)}
    return jax.tree.map(lambda shape, axes: nn.LogicallyPartitioned(
        jax.random.normal(key, shape), axes), shapes, AXES, is_leaf=lambda x: isinstance(x, tuple))


def loss(params, batch, *, dropout_key):
    x = jnp.tanh(batch["x"] @ params["encoder"]["wi"]) @ params["decoder"]["wi"].T
    error = jnp.sum((x @ params["table"].T - batch["y"]) ** 2)
    number = jnp.float32(batch["x"].shape[0])
    return {"text": losses.LossSums(error, jnp.float32(0), number, jnp.float32(0))}


def batch(number, gain=1.0):
    rng = np.random.default_rng(number)
    ones = jnp.ones((4, 1), jnp.int32)
    return {"x": jnp.asarray(rng.normal(size=(4, 4)) * gain, jnp.float32),
            "y": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
            "targets/text/targets": ones, "targets/text/mask": ones}


@functools.cache
def build(num_microbatches=1, precision="float32", optimizer=GROUPS):
    policy, mesh = resolve_policy(precision), make_mesh(MeshConfig())
    transformation = optimizer.build()
    factory = StateFactory(init, transformation, policy, mesh, LogicalAxisRules())
    function = step_lib.make_train_step(
        loss, transformation, step_lib.StepConfig(num_microbatches=num_microbatches),
        policy.accumulation_dtype, optimizer.frozen)
    quick = {"xla_backend_optimization_level": 0}  # compiled once, run a few times
    return factory, jax.jit(function, donate_argnums=0, compiler_options=quick)


def run(factory, step, batches, state=None):
    state = (state or factory.create(jax.random.key(0))).on_device()
    for item in batches:
        state, metrics = step(state, item)
    return jax.device_get(state), metrics


def same(a, b, **tolerance):
    for (name, found), want in zip(flatten_names(a).items(), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(found, want, err_msg=name, **tolerance)


def test_frozen_parameters_stay():
    factory, step = build()
    first = jax.device_get(factory.create(jax.random.key(0)))
    state, metrics = run(factory, step, [batch(i) for i in range(3)])
    np.testing.assert_array_equal(state.params["encoder"]["wi"], first.params["encoder"]["wi"])
    for part in (state.params["decoder"]["wi"] - first.params["decoder"]["wi"],
                 state.params["table"] - first.params["table"]):
        assert np.abs(part).min() > 0
    assert int(metrics["skipped_steps"]) == 0


def test_microbatches_and_loss_scaling_change_nothing():
    """Gradients, frozen ones absent, are of a loss scaled up (float16), added up, scaled down."""
    whole, _ = run(*build(), [batch(i) for i in range(3)])
    parts, metrics = run(*build(2, "float16"), [batch(i) for i in range(3)])
    assert metrics["loss_scale"] > 1 and int(metrics["skipped_steps"]) == 0
    same(parts.params, whole.params, rtol=1e-5, atol=1e-6)


def test_gradient_norm_is_of_what_is_trained():
    factory, step = build()
    state = factory.create(jax.random.key(0))
    grads = jax.grad(lambda params: loss(params, batch(0), dropout_key=None)["text"].loss / 4)(
        jax.tree.map(jnp.array, state.params))
    _, metrics = run(factory, step, [batch(0)], state)
    want = np.sqrt(np.sum(np.square(grads["decoder"]["wi"])) + np.sum(np.square(grads["table"])))
    np.testing.assert_allclose(metrics["grad_norm"], want, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [
    GROUPS, pytest.param(Adafactor(0.1, beta1=0.9, global_norm_clip=1.0, skip_nan_updates=True),
                         marks=pytest.mark.slow)])
def test_a_bad_step_leaves_everything_as_it_was(optimizer):
    """The step's own verdict comes first: `skip_nan_updates` has nothing left to do."""
    factory, step = build(optimizer=optimizer)
    good = [batch(0), batch(1)]
    bad, metrics = run(factory, step, [good[0], batch(5, np.nan), good[1]])
    assert int(metrics["skipped_steps"]) == 1
    want, _ = run(factory, step, good)
    same((bad.params, bad.opt_state), (want.params, want.opt_state), rtol=0)


def test_saved_and_restored_it_goes_on_exactly(tmp_path):
    factory, step = build()
    batches = [batch(i) for i in range(4)]
    want, _ = run(factory, step, batches)
    half, _ = run(factory, step, batches[:2])
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(period=1)) as checkpoints:
        checkpoints.save(2, jax.device_put(half, factory.shardings).at(DataPosition(7)))
        checkpoints.wait()
        restored = checkpoints.restore(factory.abstract)
    assert restored.data_position == DataPosition(7)
    found, _ = run(factory, step, batches[2:], restored)
    same((found.params, found.opt_state), (want.params, want.opt_state), rtol=0)


def test_freezing_the_encoder_saves_its_backward_pass():
    """Counted by XLA in the lowered step of the real model; a layer norm or two are lost in it."""
    model, variables = model_fixtures.build(num_encoder_layers=1, num_decoder_layers=1,
                                            **model_fixtures.TEXT_ONLY)
    config, rows, params = step_lib.StepConfig(), model_fixtures.text_batch(), variables["params"]

    def flops(*patterns):
        optimizer = OptimizerGroups(groups=[(pattern, None) for pattern in patterns] or [
            ("^encoder/", 1.0)], default=SGD(0.1))
        transformation = optimizer.build()
        state = TrainState(jnp.zeros((), jnp.int32), params, transformation.init(params),
                           init_loss_scale(model.config.policy), StabilityState.create())
        step = step_lib.make_train_step(step_lib.model_loss(model, config.loss), transformation,
                                        config, frozen=optimizer.frozen)
        return jax.jit(step).lower(state, rows).cost_analysis()["flops"]

    def forward(params):
        return model.apply({"params": params}, rows, method="encode").hidden

    encoder = jax.jit(forward).lower(params).cost_analysis()["flops"]
    saved = flops() - flops("^encoder/", "^input_", "embedding$")
    # Its own two passes backward, and the gradient that cross-attention would send it.
    assert 1.7 * encoder < saved < 3 * encoder, (saved, encoder)
