"""Cross-entropy sums against T5X's and Unified-IO 2's numbers, and against finite differences."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives import losses
from vishwam_t5x.objectives.losses import LossConfig, LossSums

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
T5X = json.loads((GOLDEN / "t5x_losses.json").read_text())
# Compiled whole: operation by operation the tests would mostly compile.
cross_entropy_sums = jax.jit(losses.cross_entropy_sums, static_argnums=(3, 4))
UNIFIED = json.loads((GOLDEN / "unified_io2_losses.json").read_text())


@pytest.mark.parametrize("case", T5X["losses"],
                         ids=lambda c: f"z{c['z_loss']}-ls{c['label_smoothing']}")
def test_t5x_loss(case):
    arrays = np.load(GOLDEN / "t5x_losses.npz")
    sums = cross_entropy_sums(arrays["logits"], arrays["targets"], arrays["weights"],
                              case["z_loss"], case["label_smoothing"])
    np.testing.assert_allclose(sums.loss, case["loss"], rtol=3e-7)
    np.testing.assert_allclose(sums.z_loss, case["z_loss_sum"], rtol=3e-7)
    assert sums.weight == arrays["weights"].sum()


def test_t5x_example():
    example = T5X["example"]
    for row in range(2):
        sums = cross_entropy_sums(jnp.asarray(example["logits"][row]),
                                  jnp.asarray(example["targets"][row]), jnp.ones(()),
                                  example["z_loss"])
        np.testing.assert_allclose(sums.loss, example["out"][0][row], rtol=1e-6)
        np.testing.assert_allclose(sums.z_loss, example["out"][1][row], rtol=1e-6)


@pytest.mark.parametrize("case", UNIFIED["cases"])
def test_unified_io_2_loss(case):
    """Means per modality, accuracies, and their sum; and the run with 10 % label smoothing."""
    arrays, want = np.load(GOLDEN / "unified_io2_losses.npz"), UNIFIED["cases"][case]
    config, sums, batch = LossConfig(z_loss=1e-4), {}, {}
    for modality in (name for name in want if name != "total_loss"):
        logits, targets, weights = (jnp.asarray(arrays[f"{case}/{modality}/{name}"])
                                    for name in ("logits", "targets", "loss_mask"))
        batch[f"targets/{modality}/targets"] = targets
        batch[f"targets/{modality}/mask"] = jnp.ones_like(weights)
        batch[f"targets/{modality}/loss_mask"] = weights
        part = sums[modality] = cross_entropy_sums(logits, targets, weights, 1e-4)
        golden = want[modality]
        np.testing.assert_allclose(part.loss / part.weight, golden["loss"], rtol=2e-6)
        np.testing.assert_allclose(part.z_loss / part.weight, golden["z_loss"], rtol=2e-6)
        np.testing.assert_allclose(part.correct / part.weight, golden["accuracy"], rtol=1e-6)
        assert part.weight == golden["weight_sum"]
        smoothed = cross_entropy_sums(logits, targets, weights, 1e-4, 0.1)
        np.testing.assert_allclose(smoothed.loss / part.weight,
                                   golden["loss_label_smoothing_0.1"], rtol=2e-6)
    total = losses.total_loss(sums, losses.normalizers(batch, config), config)
    np.testing.assert_allclose(total, want["total_loss"], rtol=2e-6)


def one_hot_loss(logits, targets, weights, z_loss, label_smoothing):
    """The textbook form, for automatic differentiation."""
    size = logits.shape[-1]
    low = label_smoothing / (size - 1)
    labels = jnp.where(jax.nn.one_hot(targets, size) > 0, 1.0 - label_smoothing, low)
    constant = jnp.sum(jax.scipy.special.xlogy(labels, labels), axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    loss = constant - jnp.sum(labels * jax.nn.log_softmax(logits), -1) + z_loss * log_z**2
    return jnp.sum(loss * weights)


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = 3.0 * jax.random.normal(keys[0], (3, 7, 11))
    targets = jax.random.randint(keys[1], (3, 7), 0, 11)
    return logits, targets, jax.random.uniform(keys[2], (3, 7)).round(1)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_value_and_gradient_of_the_textbook_form(problem, z_loss, label_smoothing):
    def scaled(loss):
        return lambda x, t, w: 5.0 * loss(x, t, w, z_loss, label_smoothing)

    ours = scaled(lambda *args: cross_entropy_sums(*args).loss)
    theirs = scaled(one_hot_loss)
    np.testing.assert_allclose(ours(*problem), theirs(*problem), rtol=2e-6)
    np.testing.assert_allclose(
        jax.jit(jax.grad(ours))(*problem), jax.jit(jax.grad(theirs))(*problem), atol=5e-6)
    first = [x[0, :2] for x in problem]
    hessian = lambda f: jax.jit(jax.jacrev(jax.grad(f)))(*first)
    np.testing.assert_allclose(hessian(ours), hessian(theirs), atol=5e-6)


def test_positions_of_weight_zero_count_nothing_even_if_they_are_nan(problem):
    logits, targets, _ = problem
    weights = jnp.ones(targets.shape, jnp.int32).at[:, 4:].set(0)
    spoilt = logits.at[:, 4].set(jnp.nan).at[:, 5].set(jnp.inf).at[:, 6].set(-jnp.inf)
    for array in (logits, spoilt):
        sums, gradient = jax.value_and_grad(
            lambda x: cross_entropy_sums(x, targets, weights, 1e-4, 0.1).loss)(array)
        clean = cross_entropy_sums(logits[:, :4], targets[:, :4], jnp.ones((3, 4)), 1e-4, 0.1)
        np.testing.assert_allclose(sums, clean.loss, rtol=1e-6)
        assert np.all(gradient[:, 4:] == 0) and np.all(np.isfinite(gradient))
    bad = cross_entropy_sums(spoilt, targets, jnp.ones_like(weights))
    assert not np.isfinite(bad.loss)  # NaN that counts is not hidden.


def test_accuracy_takes_the_first_of_equal_maxima():
    logits = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    correct = lambda targets: cross_entropy_sums(
        logits, jnp.array(targets), jnp.array([1.0, 0.5, 0.25])).correct
    assert correct([0, 0, 2]) == 1.75 and correct([1, 1, 2]) == 0.25
    assert correct([0, 1, 0]) == 1.0


def test_bfloat16_logits_are_summed_in_float32(problem):
    logits, targets, weights = problem
    low = logits.astype(jnp.bfloat16)
    sums, gradient = jax.value_and_grad(
        lambda x: cross_entropy_sums(x, targets, weights).loss)(low)
    want = cross_entropy_sums(low.astype(jnp.float32), targets, weights).loss
    assert sums.dtype == jnp.float32 and sums == want and gradient.dtype == jnp.bfloat16


def test_only_the_loss_has_a_gradient(problem):
    logits, targets, weights = problem
    for name in ("z_loss", "weight", "correct"):
        value = lambda x, w, name=name: getattr(cross_entropy_sums(x, targets, w), name)
        assert not any(np.any(g) for g in jax.grad(value, (0, 1))(logits, weights))
    by_weight = jax.grad(lambda w: cross_entropy_sums(logits, targets, w).loss)(weights)
    assert not np.any(by_weight)


def test_no_one_hot_and_no_scatter():
    """The gradient is elementwise: two arrays of the size of the logits, no scatter."""
    logits = jax.ShapeDtypeStruct((8, 64, 1_000), jnp.float32)
    targets = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    loss = lambda x, t: cross_entropy_sums(x, t, jnp.ones(t.shape)).loss
    compiled = jax.jit(jax.grad(loss)).lower(logits, targets).compile()
    assert " scatter(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 4 * 8 * 64 * 1_000


BATCH = {"targets/text/targets": jnp.ones((2, 4), jnp.int32),
         "targets/text/mask": jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]]),
         "targets/image/targets": jnp.ones((2, 3), jnp.int32),
         "targets/image/mask": jnp.ones((2, 3), jnp.int32),
         "targets/image/loss_mask": jnp.array([[1, 0, 0], [0, 0, 0]]),
         "targets/audio/targets": jnp.ones((2, 3), jnp.int32),
         "targets/audio/mask": jnp.zeros((2, 3), jnp.int32)}


@pytest.mark.parametrize("normalization,want", [
    ("modality", {"text": 5, "image": 1, "audio": 1}), ("token", dict.fromkeys(
        ("text", "image", "audio"), 6)), ("sum", dict.fromkeys(("text", "image", "audio"), 1))])
def test_normalizers(normalization, want):
    assert losses.normalizers(BATCH, LossConfig(normalization=normalization)) == want


def test_total_loss_and_addition():
    part = lambda loss: LossSums(*(jnp.float32(x) for x in (loss, 0.5, 2.0, 1.0)))
    config = LossConfig(modality_weights={"image": 0.5})
    sums = {"text": part(6.0) + part(4.0), "image": part(8.0)}
    assert sums["text"] == LossSums(10.0, 1.0, 4.0, 2.0)
    assert LossSums.zeros() + part(1.0) == part(1.0)
    assert losses.total_loss(sums, {"text": 4.0, "image": 2.0}, config) == 10 / 4 + 0.5 * 8 / 2
    with pytest.raises(UserError, match="did you mean 'image'"):
        losses.total_loss(sums, {}, LossConfig(modality_weights={"imag": 1.0}))


def test_microbatches_add_up(problem):
    """Sums over two halves of the batch, divided by the whole batch's normalizer."""
    logits, targets, weights = (jnp.concatenate([x, x[:1] * 2]) for x in problem)
    targets = targets % 11
    batch = {"targets/text/targets": targets, "targets/text/mask": weights}
    config = LossConfig(label_smoothing=0.1)
    norm = losses.normalizers(batch, config)
    sums = lambda part: cross_entropy_sums(logits[part], targets[part], weights[part], 1e-4, 0.1)
    whole = losses.total_loss({"text": sums(slice(None))}, norm, config)
    halves = sum(losses.total_loss({"text": sums(part)}, norm, config)
                 for part in (slice(0, 2), slice(2, 4)))
    np.testing.assert_allclose(halves, whole, rtol=1e-6)


@pytest.mark.parametrize("options", [
    {"z_loss": -1.0}, {"label_smoothing": 1.0}, {"normalization": "mean"},
    {"modality_weights": {"text": -1.0}}, {"chunk_tokens": -1}, {"chunk_tokens": 1.5}])
def test_unusable_settings(options):
    with pytest.raises(UserError, match=next(iter(options))):
        LossConfig(**options)
