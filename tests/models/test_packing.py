"""Many examples of many modalities in a row, against the same examples one a row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import model_fixtures
from models.model_fixtures import EXAMPLES, ROWS, lay_out

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models import rows
from vishwam_t5x.objectives.losses import LossConfig

ALONE = tuple((number,) for number in range(len(EXAMPLES)))


@pytest.fixture(scope="module")
def built():
    return model_fixtures.build()


@pytest.fixture(scope="module")
def reference(built):
    """Logits of every example alone in its row, without row indices or segments."""
    model, variables = built
    batch, where = lay_out(ALONE, with_index=False)
    return jax.jit(functools.partial(model.apply, method="logits"))(variables, batch), where


@pytest.mark.parametrize("packed_rows", [ROWS, ((4, 3), (0,), (2, 1))])
def test_packed_rows_equal_single_examples(built, reference, packed_rows):
    model, variables = built
    expected, alone = reference
    batch, where = lay_out(packed_rows, with_index=True)
    logits = jax.jit(functools.partial(model.apply, method="logits"))(variables, batch)
    assert set(where) == set(alone) and len(where) == 6
    for key, (row, slots) in where.items():
        alone_row, alone_slots = alone[key]
        np.testing.assert_allclose(logits[key[1]][row, slots],
                                   expected[key[1]][alone_row, alone_slots], atol=1e-5)


def test_packed_loss_and_gradients_equal_single_examples(built):
    model, variables = built

    def loss(params, batch):
        sums = model.apply({"params": params}, batch, LossConfig(), method="loss_sums")
        return sum(part.loss for part in sums.values()), sums

    results = []
    for packed_rows, with_index in ((ROWS, True), (ALONE, False)):
        batch, _ = lay_out(packed_rows, with_index)
        results.append(jax.jit(jax.grad(loss, has_aux=True))(variables["params"], batch))
    (packed, sums), (single, expected) = results
    assert float(sums["text"].weight) == 18 and float(sums["image"].weight) == 12
    for name in ("text", "image"):
        np.testing.assert_allclose(sums[name].loss, expected[name].loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), packed,
                 single)


def test_an_example_sees_neither_its_neighbours_nor_its_other_targets(built):
    """Changing example 2 leaves example 0 alone; changing its text leaves its own image alone."""
    model, variables = built
    apply = jax.jit(functools.partial(model.apply, method="logits"))
    batch, where = lay_out(ROWS, with_index=True)
    before = apply(variables, batch)
    changed = dict(batch)
    row, slots = where[2, "text"]
    changed["targets/text/inputs"] = batch["targets/text/inputs"].copy()
    changed["targets/text/inputs"][row, slots] = 7
    after = apply(variables, changed)
    first = where[0, "text"]
    np.testing.assert_array_equal(before["text"][first[0], first[1]],
                                  after["text"][first[0], first[1]])
    np.testing.assert_array_equal(before["image"], after["image"])
    assert np.abs(before["text"][row, slots] - after["text"][row, slots]).max() > 1e-2


def test_gather_has_the_gradient_of_take():
    index = jnp.asarray([[3, -1, 0, 4], [-1, 2, 1, -1]])
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    weights = jax.random.normal(jax.random.key(1), (2, 4, 3))
    inverse = rows.invert(index, 5)

    def loss(x, gather):
        return jnp.sum(gather(x) * weights)

    ours = jax.jit(jax.grad(lambda x: loss(x, lambda x: rows.permute(x, index, inverse))))
    plain = jax.jit(jax.grad(lambda x: loss(x, lambda x: rows.take(x, index))))
    np.testing.assert_array_equal(inverse, [[2, -1, -1, 0, 3], [-1, 2, 1, -1, -1]])
    np.testing.assert_array_equal(rows.permute(x, index, inverse)[0, 1], np.zeros(3))
    np.testing.assert_array_equal(ours(x), plain(x))
    assert "scatter" not in ours.lower(x).as_text() and "scatter" in plain.lower(x).as_text()


def test_a_modality_may_be_absent_but_not_unknown(built):
    model, variables = built
    batch, where = lay_out(((1,),), with_index=False)
    assert not any("image" in key or "audio" in key for key in batch)
    logits = jax.eval_shape(functools.partial(model.apply, method="logits"), variables, batch)
    assert list(logits) == ["text"] and (1, "text") in where
    with pytest.raises(UserError, match="did you mean 'image'"):
        model.apply(variables, {**batch, "inputs/imagee/input": np.zeros((1, 2, 12))},
                    method="logits")
    with pytest.raises(UserError, match="lacks 'targets/text/inputs'"):
        model.apply(variables, {key: value for key, value in batch.items()
                                if key != "targets/text/inputs"}, method="logits")
    with pytest.raises(UserError, match="patches the model was built for"):
        model.apply(variables, {**batch, "inputs/image/input": np.zeros((1, 2, 13), np.float32)},
                    method="logits")


def test_uint8_patches_stand_for_shares_of_255(built):
    model, variables = built
    apply = jax.jit(functools.partial(model.apply, method="encode"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 12)).astype(np.uint8)
    small = apply(variables, {"inputs/image/input": pixels})
    wide = apply(variables, {"inputs/image/input": (pixels / 255).astype(np.float32)})
    np.testing.assert_allclose(small.hidden, wide.hidden, atol=1e-5)
