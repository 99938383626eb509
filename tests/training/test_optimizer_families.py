"""Optax's optimizers by name: what they are equal to, where their state lies, what is refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.training import optimizers
from vishwam_t5x.training.optimizer_families import FAMILY, REFUSED, OptaxOptimizer

PARAMS = {"mlp": {"wi": {"kernel": jnp.full((4, 6), 2.0)}}, "norm": {"scale": jnp.full((4,), 2.0)}}
GRADS = jax.tree.map(lambda leaf: jnp.linspace(-1.0, 1.0, leaf.size).reshape(leaf.shape), PARAMS)
SETTINGS = {"adam": {"b1": 0.8}, "lamb": {"weight_decay": 0.1}, "lars": {"weight_decay": 0.1},
            "rmsprop": {"momentum": 0.9}, "noisy_sgd": {"eta": 0.1}, "sgd": {"momentum": 0.9}}


def theirs(name, settings):
    if name == "noisy_sgd":
        return optax.noisy_sgd(0.1, key=0, **settings)
    mask = {"mlp": {"wi": {"kernel": True}}, "norm": {"scale": False}}
    masks = {"adamw": "mask", "lamb": "mask", "lion": "mask", "lars": "weight_decay_mask"}
    return getattr(optax, name)(0.1, **settings, **({masks[name]: mask} if name in masks else {}))


def two_updates(optimizer):
    state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(GRADS, state, PARAMS)
    return flatten_names(updates)


@pytest.mark.parametrize("name", FAMILY)
def test_is_optax_with_its_own_defaults_and_masks(name):
    settings = SETTINGS.get(name, {})
    got = two_updates(OptaxOptimizer(0.1, name=name, settings=settings).build())
    want = two_updates(theirs(name, settings))
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)
    assert any(np.abs(value).max() > 0 for value in got.values())


def test_every_name_of_t5x_is_known():
    names = {"adabelief", "adagrad", "adam", "adamw", "amos", "fromage", "lars", "lamb", "lion",
             "noisy_sgd", "radam", "rmsprop", "sgd", "yogi", "dpsgd"}
    assert {*FAMILY, *REFUSED} == names
    assert optimizers.optimizer("Yogi", learning_rate=0.5, b1=0.8) == OptaxOptimizer(
        0.5, name="yogi", settings={"b1": 0.8})


@pytest.mark.parametrize(("name", "fields", "words"), [
    ("amos", {}, "jestimator"), ("dpsgd", {}, "each example"), ("adm", {}, "adam"),
    ("adam", {"settings": {"beta1": 0.9}}, "b1"),
    ("adam", {"settings": {"learning_rate": 0.9}}, "setting of optax.adam"),
    ("adam", {"no_decay": ("scale$",)}, "no_decay"),
    ("adam", {"learning_rate": -1.0}, "learning_rate"),
    ("adam", {"settings": {"b1": 1.0}}, "b1 = 0.9, optax's default"),
    ("adamw", {"settings": {"eps": 0.0}}, "eps = 1e-08"),
    ("adamw", {"settings": {"weight_decay": -0.1}}, "at least 0"),
    ("rmsprop", {"settings": {"decay": "0.9"}}, "must be a number"),
    ("lion", {"settings": {"b2": float("nan")}}, "below 1"),
])
def test_mistakes(name, fields, words):
    with pytest.raises(UserError, match=words):
        OptaxOptimizer(name=name, **fields)


@pytest.mark.parametrize("number", [np.float32(1e-3), np.array(1e-3), jnp.asarray(1e-3),
                                    jnp.bfloat16(1e-3), np.int64(1)])
def test_numbers_of_numpy_and_jax_are_numbers(number):
    found = optimizers.AdamW(learning_rate=number, eps=number)
    assert type(found.learning_rate) in (int, float) and found.learning_rate == number
    kernels = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    sgd = OptaxOptimizer(number, name="sgd", settings={"momentum": np.float32(0.5)}).build()
    updates, _ = sgd.update(kernels, sgd.init(kernels), kernels)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    for wrong in (-number, np.array([1e-3]), np.float32("nan"), np.bool_(True), 1j, 10**400):
        with pytest.raises(UserError, match="learning_rate"):
            optimizers.AdamW(learning_rate=wrong)


def test_adagrad_takes_an_eps_of_zero_as_optax_does():
    updates = two_updates(OptaxOptimizer(0.1, name="adagrad", settings={"eps": 0.0}).build())
    assert all(np.isfinite(value).all() for value in updates.values())


def test_optax_s_own_defaults_are_in_range():
    for name in FAMILY:
        defaults = {setting: known.default for setting, known in inspect.signature(
            getattr(optax, name)).parameters.items()
            if known.default is not inspect.Parameter.empty and "mask" not in setting
            and setting != "key"}
        OptaxOptimizer(name=name, settings=defaults)


# All at once, one compiled program for the mesh and one for a single device.
ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np, optax
from flax import linen as nn
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
from vishwam_t5x.precision.policy import Policy
from vishwam_t5x.training.optimizer_families import FAMILY, OptaxOptimizer
from vishwam_t5x.training.optimizers import Adafactor
from vishwam_t5x.training.state import StateFactory

AXES = {"wi": ("embed", "mlp"), "wo": ("mlp", "embed"), "table": ("vocab", "embed")}
SHAPES = {"wi": (8, 12), "wo": (12, 8), "table": (16, 8)}

def init(key):
    return {name: nn.LogicallyPartitioned(jax.random.normal(key, shape), AXES[name])
            for name, shape in SHAPES.items()}

plan = {name: OptaxOptimizer(0.1, name=name).build() for name in FAMILY}
plan["adafactor"] = Adafactor(0.1, beta1=0.9, min_dim_size_to_factor=1).build()
together = optax.GradientTransformation(
    lambda params: {name: optimizer.init(params) for name, optimizer in plan.items()}, None)

def step(params, state):
    grads = jax.tree.map(lambda leaf: leaf - 1.0, params)
    return {name: optimizer.update(grads, state[name], params) for name, optimizer in plan.items()}

mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
factory = StateFactory(init, together, Policy(), mesh, LogicalAxisRules())
state = factory.create(jax.random.key(0)).on_device()
split = {leaf.shape: leaf.sharding.spec for leaf in state.params.values()}
assert not any(leaf.sharding.is_fully_replicated for leaf in state.params.values())
for name in plan:
    like_parameters = 0
    for path, leaf in flatten_names(state.opt_state[name]).items():
        if leaf.shape in split:
            assert leaf.sharding.spec == split[leaf.shape], (name, path, leaf.sharding)
            like_parameters += 1
        if path.endswith(("v_row", "v_col")):
            assert not leaf.sharding.is_fully_replicated, (name, path)
    assert (like_parameters > 0) == (name not in ("fromage", "noisy_sgd", "sgd")), name

places = {name: (factory.shardings.params, factory.shardings.opt_state[name]) for name in plan}
quick = {"xla_backend_optimization_level": 0}  # compiled once, run once
after = jax.jit(step, out_shardings=places, compiler_options=quick)(state.params, state.opt_state)
one_device = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)),
                          (state.params, state.opt_state))
alone = jax.jit(step, compiler_options=quick)(*one_device)
for (path, found), want in zip(flatten_names(after).items(), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-6, err_msg=path)
print("all", len(plan))
"""


@pytest.mark.slow
def test_state_lies_with_its_parameters_on_a_mesh(eight_devices):
    assert "all 14" in eight_devices(ON_A_MESH)
