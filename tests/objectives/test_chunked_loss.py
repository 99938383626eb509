"""The chunked cross-entropy: equal to the plain one, and never all logits at once."""

from __future__ import annotations

import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwam_t5x.objectives import chunked_loss
from vishwam_t5x.objectives.chunked_loss import (
    chunked_cross_entropy_sums,
    num_chunks_for,
    projected_cross_entropy_sums,
    should_chunk,
)
from vishwam_t5x.objectives.losses import LossConfig, cross_entropy_sums

B, L, D, V = 4, 23, 16, 50
SCALE = D**-0.5


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    weights = (jax.random.uniform(keys[3], (B, L)) < 0.7).astype(jnp.int32)
    return (2 * jax.random.normal(keys[0], (B, L, D)), jax.random.normal(keys[1], (V, D)),
            jax.random.randint(keys[2], (B, L), 0, V), weights)


def plain(hidden, table, targets, weights, z_loss=1e-4, label_smoothing=0.1):
    logits = jnp.einsum("bld,vd->blv", hidden, table.astype(hidden.dtype),
                        preferred_element_type=jnp.float32) * SCALE
    return cross_entropy_sums(logits, targets, weights, z_loss, label_smoothing)


def chunked(hidden, table, targets, weights, num_chunks=3, batch_shards=1):
    return chunked_cross_entropy_sums(hidden, table, targets, weights, 1e-4, 0.1,
                                      num_chunks=num_chunks, scale=SCALE,
                                      batch_shards=batch_shards)


@pytest.mark.parametrize("num_chunks,batch_shards", [(1, 1), (4, 1), (5, 2), (23, 4)])
def test_equal_to_the_plain_form(problem, num_chunks, batch_shards):
    """Values and both gradients to float32 rounding, with lengths that need padding and not."""
    def both(form):
        return jax.jit(jax.value_and_grad(
            lambda h, e: (lambda s: (s.loss * 3.0, s))(form(h, e)), (0, 1), has_aux=True))(
                *problem[:2])

    (_, want), want_gradients = both(lambda h, e: plain(h, e, *problem[2:]))
    (_, got), gradients = both(
        lambda h, e: chunked(h, e, *problem[2:], num_chunks, batch_shards))
    for name in ("loss", "z_loss", "weight", "correct"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-6)
    for ours, theirs in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-6)


def test_evaluation_equals_training(problem):
    value = jax.jit(chunked)(*problem)
    trained = jax.jit(lambda *args: jax.vjp(lambda h: chunked(h, *args[1:]), args[0])[0])(*problem)
    assert jax.tree.map(float, value) == jax.tree.map(float, trained)


def shapes_in(jaxpr) -> set[tuple]:
    """(shape, dtype) of every value a program makes, in its loops too."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {(v.aval.shape, str(v.aval.dtype)) for v in equation.outvars}
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(part, "eqns"):
                    found |= shapes_in(part)
                elif hasattr(part, "jaxpr"):
                    found |= shapes_in(part.jaxpr)
    return found


def matmul_outputs(jaxpr_text: str) -> int:
    return jaxpr_text.count("dot_general[")


def test_all_logits_never_exist(problem):
    gradient = jax.grad(lambda h, e: chunked(h, e, *problem[2:], 4).loss, (0, 1))
    made = shapes_in(jax.make_jaxpr(gradient)(*problem[:2]).jaxpr)
    sizes = [np.prod(shape) for shape, _ in made if shape and shape[-1] == V]
    assert max(sizes) == B * 6 * V  # 23 positions in 4 chunks of 6.
    reference = jax.grad(lambda h, e: plain(h, e, *problem[2:]).loss, (0, 1))
    assert ((B, L, V), "float32") in shapes_in(jax.make_jaxpr(reference)(*problem[:2]).jaxpr)


def test_only_the_gradients_asked_for_are_taken(problem):
    """Matrix products: one for evaluation, one more for each gradient."""
    hidden, table = problem[:2]
    loss = lambda h, e: chunked(h, e, *problem[2:]).loss
    count = lambda f, *args: matmul_outputs(str(jax.make_jaxpr(f)(*args)))
    assert count(loss, hidden, table) == 1
    assert count(jax.grad(loss), hidden, table) == 2
    assert count(jax.grad(loss, 1), hidden, table) == 2
    assert count(jax.grad(loss, (0, 1)), hidden, table) == 3  # Nothing is recomputed.
    frozen = jax.jit(jax.grad(lambda h: loss(h, table)))
    assert matmul_outputs(str(jax.make_jaxpr(frozen)(hidden))) == 2


def test_compiled_temporaries_stay_below_the_logits():
    batch, length, width, vocab = 8, 256, 32, 2_048
    shapes = (jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
              jax.ShapeDtypeStruct((vocab, width), jnp.float32),
              jax.ShapeDtypeStruct((batch, length), jnp.int32),
              jax.ShapeDtypeStruct((batch, length), jnp.float32))

    def temporaries(form):
        gradient = jax.jit(jax.grad(lambda h, e, t, w: form(h, e, t, w).loss, (0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * batch * length * vocab
    assert temporaries(plain) >= logits
    # A chunk's logits and their gradient, 1/16 of all each, and the residuals.
    residuals = 4 * (vocab * width + 2 * batch * length * width)
    assert temporaries(lambda *args: chunked(*args, 16)) < 2 * logits / 16 + 2 * residuals


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_under_a_loss_scale(problem, dtype):
    """Gradients scaled by 2^15 / tokens, as under float16 loss scaling, against float32."""
    hidden, table, targets, weights = problem
    factor = 2.0**15 / 64
    low = hidden.astype(dtype)
    want = jax.grad(lambda h, e: factor * plain(h, e, targets, weights).loss, (0, 1))(
        low.astype(jnp.float32), table)
    got = jax.grad(lambda h, e: factor * chunked(h, e, targets, weights).loss, (0, 1))(low, table)
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    for ours, theirs in zip(got, want, strict=True):
        error = np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()
        assert error < (0.02 if dtype == jnp.bfloat16 else 0.003)


def test_float16_keeps_small_probabilities_and_large_weights(problem):
    """Without the lift a probability below 6e-8 would vanish; with it weights must not overflow."""
    hidden, table, targets, _ = problem
    low = hidden.astype(jnp.float16)
    for weight in (1.0, 500.0):
        weights = jnp.full((B, L), weight)
        got = jax.grad(lambda h, w=weights: chunked(h, table, targets, w).loss / 500)(low)
        want = jax.grad(lambda h, w=weights: plain(h, table, targets, w).loss / 500)(
            low.astype(jnp.float32))
        np.testing.assert_allclose(got, want, rtol=0.01, atol=0.003 * float(jnp.abs(want).max()))


def test_second_order(problem):
    hidden, table, targets, weights = problem
    second = lambda form: jax.jit(jax.grad(jax.grad(
        lambda s: form(hidden * s, table, targets, weights).loss)))(1.0)
    np.testing.assert_allclose(second(chunked), second(plain), rtol=1e-4)


@pytest.mark.parametrize("tokens", [0, 32])
def test_positions_of_weight_zero_count_nothing_even_if_they_are_nan(problem, tokens):
    hidden, table, targets, weights = problem
    spoilt = jnp.where(weights[..., None] == 0, jnp.nan, hidden)
    config = LossConfig(label_smoothing=0.1, chunk_tokens=tokens)
    run = lambda h: jax.value_and_grad(
        lambda h, e: projected_cross_entropy_sums(
            h, e, targets, weights, config, scale=SCALE).loss, (0, 1))(h, table)
    (value, (d_hidden, d_table)), (want, (_, want_table)) = run(spoilt), run(hidden)
    assert value == want and np.all(np.isfinite(d_hidden))
    np.testing.assert_allclose(d_table, want_table, rtol=1e-6)


def test_choice_by_size():
    assert not should_chunk(16, 128, 1_152, platform="gpu")
    assert should_chunk(128, 128, 33_280, platform="gpu")  # 2.1 GB: T5 base, batch 128.
    assert not should_chunk(128, 128, 33_280, batch_shards=16, platform="tpu")
    assert should_chunk(16, 128, 1_152, platform="cpu")  # 9 MiB: more than fits a cache.
    assert not should_chunk(16, 40, 384, platform="cpu")
    assert should_chunk(16, 128, 1_152) == should_chunk(16, 128, 1_152, platform="cpu")
    # Each chunk adds a whole table's gradient: on CPUs it has as many positions as that is wide.
    assert num_chunks_for(8, 32, 32_128, platform="cpu") == 16
    assert num_chunks_for(8, 32, 32_128, platform="cpu", width=256) == 1
    assert num_chunks_for(64, 128, 32_128, platform="cpu", width=256) == 32
    assert num_chunks_for(128, 1_024, 16_512, chunk_tokens=0) == 1
    for platform, budget in (("cpu", chunked_loss.CHUNK_BYTES["cpu"]),
                             ("gpu", chunked_loss.OTHER_CHUNK_BYTES)):
        assert num_chunks_for(16, 40, 384, platform=platform) == 1
        for batch, length, vocab, shards in ((128, 128, 33_280, 1), (16, 1_024, 16_512, 1),
                                             (128, 100, 33_280, 4), (1, 7, 10**8, 1)):
            chunks = num_chunks_for(batch, length, vocab, batch_shards=shards, platform=platform)
            columns = -(-length // chunks)
            assert 1 < chunks <= length
            assert columns == 1 or 4 * batch * columns * vocab <= budget * shards
    assert num_chunks_for(4, 96, V, chunk_tokens=4 * 20) == 6  # 5 would do; 6 divides 96.
    assert num_chunks_for(4, 97, V, chunk_tokens=4 * 20) == 5


def test_projection_chooses_the_form(problem):
    hidden, table, targets, weights = problem
    want = plain(*problem, z_loss=0.01, label_smoothing=0.0)
    for tokens in (None, 0, 20, 1):
        config = LossConfig(z_loss=0.01, chunk_tokens=tokens)
        form = lambda h, e, config=config: projected_cross_entropy_sums(
            h, e, targets, weights, config, scale=SCALE, batch_shards=8)
        np.testing.assert_allclose(form(hidden, table).loss, want.loss, rtol=1e-6)
        loops = "scan[" in str(jax.make_jaxpr(form)(hidden, table))
        assert loops == (tokens in (20, 1))


SHARDED = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vishwam_t5x.objectives.chunked_loss import projected_cross_entropy_sums
from vishwam_t5x.objectives.losses import LossConfig

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
B, L, D, V = 8, 32, 16, 512
keys = jax.random.split(jax.random.key(0), 3)
hidden = jax.random.normal(keys[0], (B, L, D))
table = jax.random.normal(keys[1], (V, D))
targets = jax.random.randint(keys[2], (B, L), 0, V)
weights = jnp.ones((B, L)).at[:, 20:].set(0)
names = {"batch": "data", "vocab": "tensor"}
def constrain(x, axes):
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, P(*(names.get(axis) for axis in axes))))

def gradient(tokens, shards, constrain=None):
    config = LossConfig(label_smoothing=0.1, chunk_tokens=tokens)
    loss = lambda h, e, t, w: projected_cross_entropy_sums(
        h, e, t, w, config, scale=0.25, batch_shards=shards, constrain=constrain).loss
    return jax.value_and_grad(loss, (0, 1))

args = (place(hidden, "data"), place(table, "tensor"), place(targets, "data"),
        place(weights, "data"))
shardings = (NamedSharding(mesh, P()), (args[0].sharding, args[1].sharding))
compiled = jax.jit(gradient(B * 8, 4, constrain), out_shardings=shardings).lower(*args).compile()
one_device = jax.jit(gradient(0, 1))(hidden, table, targets, weights)
error = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
                     compiled(*args), one_device)
computations = re.split(r"\\n(?=%|ENTRY)", compiled.as_text())
collectives = [(part.startswith("ENTRY"), shape, kind) for part in computations
               for shape, kind in re.findall(
                   r"(\\w+\\[[\\d,]*\\])\\S* (all-reduce|all-gather|all-to-all)\\(", part)]
print(json.dumps([float(one_device[0]), jax.tree.leaves(error), collectives]))
"""


def test_sharded_over_eight_devices(run_python):
    """Data 4 x tensor 2: the same numbers; logits are never gathered, and the table's gradient is
    summed over the batch once, not in every chunk."""
    loss, errors, collectives = json.loads(run_python(textwrap.dedent(SHARDED), devices=8))
    assert max(errors) < 1e-6 * loss
    assert not [c for c in collectives if c[2] in ("all-gather", "all-to-all")]
    of_table = [c for c in collectives if c[1] == "f32[256,16]"]
    assert [c[0] for c in of_table] == [True]
    # What a chunk must exchange: sums over the vocabulary and its hidden gradient, 2 x 8 positions.
    inside = {c[1] for c in collectives if not c[0]}
    assert inside and inside <= {"f32[2,8]", "s32[2,8]", "f32[2,8,16]"}
