"""Optimizers by name: what they are equal to, what does not decay, what a mistake gets."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.training import optimizers, schedules

PARAMS = {"encoder": {"layers_0": {"mlp": {"wi": {"kernel": jnp.full((4, 6), 2.0)}},
                                   "norm": {"scale": jnp.full((4,), 2.0)}}},
          "text_token_embedder": {"embedding": jnp.full((8, 4), 2.0)}}


def updates_of(optimizer, grads, steps=1, params=PARAMS):
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = jax.jit(optimizer.update)(grads, state, params)
    return flatten_names(updates)


def random_grads(seed=0):
    leaves, treedef = jax.tree.flatten(PARAMS)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.normal(key, leaf.shape)
                                        for key, leaf in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize(("ours", "theirs"), [
    (optimizers.AdamW(1e-2, b1=0.8, b2=0.95, eps=1e-6),
     optax.adam(1e-2, b1=0.8, b2=0.95, eps=1e-6)),
    (optimizers.Lion(1e-2, b1=0.8, b2=0.95), optax.lion(1e-2, b1=0.8, b2=0.95, weight_decay=0.0)),
    (optimizers.SGD(1e-2), optax.sgd(1e-2)),
    (optimizers.SGD(1e-2, momentum=0.9, nesterov=True),
     optax.sgd(1e-2, momentum=0.9, nesterov=True)),
    (optimizers.SGD(1e-2, global_norm_clip=0.5),
     optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1e-2))),
])
def test_equal_to_optax(ours, theirs):
    got, want = (updates_of(o, random_grads(), steps=3) for o in (ours.build(), theirs))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_decay_spares_norms_and_embeddings(name):
    optimizer = optimizers.optimizer(name, learning_rate=0.1, weight_decay=0.5)
    updates = updates_of(optimizer.build(), jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["encoder/layers_0/mlp/wi/kernel"], -0.1 * 0.5 * 2.0,
                               rtol=1e-6)
    np.testing.assert_array_equal(updates["encoder/layers_0/norm/scale"], 0.0)
    np.testing.assert_array_equal(updates["text_token_embedder/embedding"], 0.0)
    everything = optimizers.optimizer(name, learning_rate=0.1, weight_decay=0.5, no_decay=())
    updates = updates_of(everything.build(), jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["text_token_embedder/embedding"], -0.1, rtol=1e-6)


def test_adafactor_decay_is_masked_too():
    optimizer = optimizers.Adafactor(learning_rate=0.1, weight_decay_rate=0.25)
    updates = updates_of(optimizer.build(), jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["encoder/layers_0/mlp/wi/kernel"], -0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["text_token_embedder/embedding"], 0.0)


def test_global_norm_clip_bounds_what_adafactor_sees():
    grads = jax.tree.map(lambda leaf: 1e3 * jnp.ones_like(leaf), PARAMS)
    optimizer = optimizers.Adafactor(learning_rate=0.1, global_norm_clip=1.0).build()
    _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    v = flatten_names(state)["1/param_states/encoder/layers_0/norm/scale/v"]
    np.testing.assert_allclose(v, 1.0 / sum(leaf.size for leaf in jax.tree.leaves(PARAMS)),
                               rtol=1e-5)


def test_schedule_is_what_the_update_uses():
    optimizer = optimizers.SGD(schedules.warmup_cosine(1.0, 10, 100))
    transformation = optimizer.build()
    state, grads = transformation.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    for step in range(12):
        updates, state = transformation.update(grads, state, PARAMS)
        np.testing.assert_allclose(
                                   -np.asarray(jax.tree.leaves(updates)[0]).flat[0],
                                   optimizer.schedule(step), rtol=1e-6)
    assert float(optimizers.SGD(0.25).schedule(7)) == 0.25


def test_what_adamw_says_of_optax_s_defaults_is_so():
    theirs = inspect.signature(optax.adamw).parameters
    said = " ".join(optimizers.AdamW.__doc__.split())
    assert "b2 = 0.999, weight_decay = 1e-4 and no mask" in said
    assert [theirs[name].default for name in ("b2", "weight_decay", "mask")] == [0.999, 1e-4, None]
    assert [theirs[name].default for name in ("b1", "eps")] == [
        optimizers.AdamW().b1, optimizers.AdamW().eps]


@pytest.mark.parametrize(("name", "fields", "words"), [
    ("adamv", {}, "adamw"),
    ("adamw", {"beta2": 0.98}, "field of optimizer"),
    ("adamw", {"wieght_decay": 0.1}, "weight_decay"),
    ("adamw", {"b2": 1.0}, "b2"),
    ("adamw", {"weight_decay": -0.1}, "weight_decay"),
    ("adamw", {"weight_decay": float("nan")}, "weight_decay"),
    ("adamw", {"eps": 0.0}, "eps = 1e-8"),
    ("adamw", {"learning_rate": float("inf")}, "learning_rate"),
    ("adamw", {"learning_rate": -1e-3}, "learning_rate = 1e-3"),
    ("sgd", {"momentum": 1.0}, "momentum"),
    ("adafactor", {"decay_rat": 0.8}, "decay_rate"),
    ("sgd", {"nesterov": True}, "momentum"),
    ("lion", {"learning_rate": 0.0}, "learning_rate"),
    ("lion", {"global_norm_clip": 0.0}, "global_norm_clip"),
    ("lion", {"no_decay": "scale$"}, "no_decay"),
    ("lion", {"no_decay": ("(",)}, "regular expression"),
])
def test_mistakes(name, fields, words):
    with pytest.raises(UserError, match=words):
        optimizers.optimizer(name, **fields)
