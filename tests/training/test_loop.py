"""The step and the loop on a toy regression: microbatches, bad batches, rollback, stop, resume."""

import dataclasses
import gc
import json
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.errors import Preempted
from vishwam_t5x.objectives import losses
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
from vishwam_t5x.precision.policy import Policy, policy_by_name
from vishwam_t5x.training import loop as loop_lib
from vishwam_t5x.training import step as step_lib
from vishwam_t5x.training.hooks import EarlyStop, EvaluateHook
from vishwam_t5x.training.signals import StopRequest
from vishwam_t5x.training.stability import CulpritBatches, StabilityConfig
from vishwam_t5x.training.state import StateFactory
from vishwam_t5x.training.throughput import StepWork, Throughput
from vishwam_t5x.training.writers import JsonlWriter, Writers

ROWS, LENGTH, VOCAB = 8, 4, 7


class Toy(nn.Module):
    """Logits from a table of contexts: the smallest thing with `loss_sums`."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def loss_sums(self, batch, config, enable_dropout=False):
        table = self.param("table", nn.with_logical_partitioning(
            nn.initializers.normal(1.0), ("vocab", "embed")), (VOCAB, VOCAB))
        # 'gain' lets a test overflow float16 or poison a batch.
        logits = table.astype(self.dtype)[batch["inputs/text/tokens"]]
        logits = logits * batch["gain"][:, None, None].astype(self.dtype)
        return {"text": losses.cross_entropy_sums(
            logits, batch["targets/text/targets"], batch["targets/text/mask"],
            config.z_loss, config.label_smoothing)}


def make_batch(number: int, gain: float = 1.0):
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    mask = (rng.random((ROWS, LENGTH)) < 0.7).astype(np.int32)
    return {"inputs/text/tokens": tokens, "targets/text/targets": (tokens * 3 + 1) % VOCAB,
            "targets/text/mask": mask, "gain": np.full((ROWS,), gain, np.float32)}


class FakeBatches:
    """Batch i starts at example 10 * i; `gains` poisons some."""

    def __init__(self, gains=None):
        self.gains, self.position, self.seeks = gains or {}, DataPosition(), []
        self.given = []

    def __next__(self):
        number = self.position.next_example // 10
        start, end = self.position, DataPosition(10 * (number + 1), (number,))
        self.position = end
        arrays = jax.tree.map(jnp.asarray, make_batch(number, self.gains.get(number, 1.0)))
        self.given.append(weakref.ref(arrays["gain"]))
        return types.SimpleNamespace(
            arrays=arrays, start=start, end=end,
            example_ids=list(range(10 * number, 10 * number + 10)),
            work=StepWork(10, 32, 16, 0.5, 0.0))

    def seek(self, position):
        self.seeks.append(position)
        self.position = position

    def check_damage(self):
        pass


class FakeSaver:
    """Keeps host copies of the states it is given."""

    def __init__(self, period=5):
        self.period, self.saved, self.seconds_held = period, {}, 0.0

    def should_save(self, step):
        return step % self.period == 0

    def save(self, step, state, metrics=None):
        self.saved[step] = jax.tree.map(np.array, state)
        return True

    def restore_before(self, abstract_state, step):
        good = [saved for saved in self.saved if saved < step]
        if not good:
            return None
        self.saved = {saved: state for saved, state in self.saved.items() if saved < step}
        last = self.saved[max(good)]
        return jax.tree.map(jnp.asarray, last.on_device()).replace(position=last.position)

    def wait(self):
        return True


def build(tmp_path, gains=None, total=20, stability=None, policy=None, num_microbatches=1,
          hooks=(), saver=None, stop=None, dtype=jnp.float32):
    mesh = make_mesh(MeshConfig())
    model = Toy(dtype)
    stability = stability or StabilityConfig(warmup_steps=5)
    config = step_lib.StepConfig(num_microbatches=num_microbatches, stability=stability)

    def init(key):
        return model.init(key, make_batch(0), config.loss, method="loss_sums")["params"]

    optimizer = optax.adamw(0.05)
    factory = StateFactory(init, optimizer, policy or Policy(), mesh, LogicalAxisRules())
    step_fn = step_lib.make_train_step(
        step_lib.model_loss(model, config.loss), optimizer, config)
    compiled = jax.jit(step_fn, donate_argnums=0, out_shardings=(factory.shardings, None))
    metrics_file = tmp_path / "metrics.jsonl"
    loop = loop_lib.Loop(
        loop_lib.LoopConfig(total_steps=total, stats_period=1, stability=stability), compiled,
        FakeBatches(gains), saver or FakeSaver(), list(hooks), Writers([JsonlWriter(metrics_file)]),
        CulpritBatches(tmp_path), Throughput((1.0, 1.0), None), factory.abstract,
        lambda metrics, step: {"loss": float(metrics["loss"]),
                               "loss_scale": float(metrics["loss_scale"]),
                               "update_applied": int(metrics["update_applied"])}, stop)
    return loop, factory, metrics_file, compiled


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_learns_compiles_once_and_saves(tmp_path):
    loop, factory, path, compiled = build(tmp_path)
    state = loop.run(factory.create(jax.random.key(0)))
    log = records(path)
    assert [record["step"] for record in log] == list(range(1, 21))
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert compiled._cache_size() == 1
    assert state.data_position == DataPosition(200, (19,))
    assert sorted(loop._saver.saved) == [5, 10, 15, 20]
    assert int(state.step) == 20 and int(state.stability.good_steps) == 20


def test_lets_go_of_batches(tmp_path):
    # The loop remembers which examples made up to 256 steps; their arrays would fill the device.
    loop, factory, _, _ = build(tmp_path)
    loop.run(factory.create(jax.random.key(0)))
    gc.collect()
    assert len(loop._batches.given) == 20 and len(loop._recent) == 20
    assert sum(array() is not None for array in loop._batches.given) <= 1


def test_stopping_while_bad_leaves_a_good_state(tmp_path):
    stop, saver = StopRequest(), FakeSaver()
    gains = {11: float("nan"), 12: float("nan"), 13: float("nan")}
    loop, factory, _, _ = build(tmp_path, gains=gains, saver=saver, stop=stop, hooks=[
        EvaluateHook(lambda params: stop.ask() or {}, period=14)])
    with pytest.raises(Preempted) as caught:
        loop.run(factory.create(jax.random.key(0)))
    assert caught.value.step == 10 and max(saver.saved) == 10


@pytest.mark.parametrize(("dtype", "exact"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_accumulation_dtype_is_that_of_the_sum(dtype, exact):
    def loss(params, batch, *, dropout_key):
        total = jnp.sum(params["w"] * batch["x"])
        return {"text": losses.LossSums(total, jnp.float32(0), jnp.float32(8), jnp.float32(0))}

    x = jnp.asarray([1.0, 2.0**-9] * 4, jnp.float32)  # bfloat16 has 8 bits: 1 + 2^-9 is 1
    ones = jnp.ones((8, 1), jnp.int32)
    batch = {"x": x, "targets/text/targets": ones, "targets/text/mask": ones}
    config = step_lib.StepConfig(num_microbatches=8)
    grads, _ = step_lib.accumulate_gradients(
        loss, {"w": jnp.float32(1)}, batch, config, lambda value: value, jax.random.key(0), dtype)
    assert grads["w"].dtype == jnp.float32
    assert (float(grads["w"]) == float(x.sum()) / 8) is exact


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_add_up(tmp_path, microbatches):
    # Masks differ from row to row, so a mean of means would give another number.
    whole, factory, _, _ = build(tmp_path / "a", total=4)
    parts, _, _, _ = build(tmp_path / "b", total=4, num_microbatches=microbatches)
    one = whole.run(factory.create(jax.random.key(0)))
    other = parts.run(factory.create(jax.random.key(0)))
    np.testing.assert_allclose(one.params["table"], other.params["table"], rtol=2e-6, atol=2e-6)


def test_a_step_is_logged_before_it_is_saved(tmp_path):
    # Killed after the save, a resume starts behind it: nobody would write the record again.
    seen = {}

    class Saver(FakeSaver):
        def save(self, step, state, metrics=None):
            seen[step] = [record["step"] for record in records(tmp_path / "metrics.jsonl")][-1]
            return super().save(step, state, metrics)

    loop, factory, _, _ = build(tmp_path, saver=Saver(period=3), total=7)
    loop.run(factory.create(jax.random.key(0)))
    assert seen == {3: 3, 6: 6, 7: 7}


def test_a_state_due_to_be_rolled_back_is_not_saved(tmp_path):
    # Steps 13 to 15 are bad and a save is due at 15: it must not become the newest checkpoint.
    gains = {12: float("nan"), 13: float("nan"), 14: float("nan")}
    loop, factory, _, _ = build(tmp_path, gains=gains, total=18)
    steps = []
    loop._saver.save, save = lambda step, *rest: (steps.append(step), save(step, *rest)), \
        loop._saver.save
    loop.run(factory.create(jax.random.key(0)))
    assert steps == [5, 10, 15, 18], "the first 15 was bad; this one is of other batches"
    assert loop._batches.seeks == [DataPosition(100, (9,))]


def test_nan_batch_is_skipped_and_named(tmp_path):
    loop, factory, path, _ = build(tmp_path, gains={7: float("nan")}, total=12)
    state = loop.run(factory.create(jax.random.key(0)))
    log = records(path)
    assert [r["step"] for r in log if not r["update_applied"]] == [8]
    assert log[7]["loss"] == "nan" and np.isfinite(log[8]["loss"])
    assert int(state.stability.skipped_steps) == 1 and int(state.stability.bad_in_a_row) == 0
    assert np.isfinite(state.params["table"]).all()


def test_spike_is_skipped(tmp_path):
    loop, factory, path, _ = build(tmp_path, gains={15: -500.0})
    loop.run(factory.create(jax.random.key(0)))
    assert [r["step"] for r in records(path) if not r["update_applied"]] == [16]


def test_rolls_back_and_steps_over_the_culprits(tmp_path):
    gains = {11: float("nan"), 12: float("inf"), 13: float("nan")}
    loop, factory, path, _ = build(tmp_path, gains=gains)
    state = loop.run(factory.create(jax.random.key(0)))
    culprits = records(tmp_path / "skipped_batches.jsonl")
    assert [c["next_example"] for c in culprits] == [110, 120, 130]
    assert [record["step"] for record in records(path)] == list(range(1, 21)), "none twice"
    assert culprits[0]["example_ids"] == list(range(110, 120))
    # Back to step 10 (batches 0-9), then batch 10, then 14 on: 20 steps end with batch 22.
    assert loop._batches.seeks == [DataPosition(100, (9,))]
    assert state.data_position.next_example == 230
    assert int(state.stability.skipped_steps) == 0, "the rolled-back state had seen no bad step"
    # The same run never given the three batches ends with the same parameters.
    other = CulpritBatches(tmp_path)
    assert len(other) == 3 and DataPosition(110, (10,)) in other


def test_gives_up_when_rolling_back_does_not_help(tmp_path):
    gains = {i: float("nan") for i in range(8, 100)}
    loop, factory, _, _ = build(tmp_path, gains=gains, total=60)
    with pytest.raises(loop_lib.Diverged, match="skipped_batches.jsonl"):
        loop.run(factory.create(jax.random.key(0)))


def test_no_checkpoint_to_go_back_to(tmp_path):
    gains = {i: float("nan") for i in range(3)}
    loop, factory, _, _ = build(tmp_path, gains=gains)
    with pytest.raises(loop_lib.Diverged, match="no earlier checkpoint"):
        loop.run(factory.create(jax.random.key(0)))


def test_float16_overflow_halves_the_scale_skips_once_and_recovers(tmp_path):
    policy = policy_by_name("float16")
    policy = dataclasses.replace(policy, loss_scale=dataclasses.replace(
        policy.loss_scale, initial=2.0**12))
    # A gain of 3e4 makes the scaled float16 gradient overflow, not the loss.
    loop, factory, path, _ = build(
        tmp_path, gains={6: 3.0e4}, total=12, policy=policy, dtype=jnp.float16,
        stability=StabilityConfig(spike_sigmas=None))
    state = loop.run(factory.create(jax.random.key(0)))
    log = records(path)
    assert [r["step"] for r in log if not r["update_applied"]] == [7]
    assert log[6]["loss_scale"] == 2.0**12 and log[7]["loss_scale"] == 2.0**11
    assert int(state.loss_scale.num_skipped) == 1
    assert int(state.stability.bad_in_a_row) == 0, "an overflow the scale cures is no bad batch"
    assert log[-1]["loss"] < log[0]["loss"]


def test_stop_request_saves_and_is_resumable(tmp_path):
    stop = StopRequest()
    saver = FakeSaver(period=100)
    loop, factory, path, _ = build(tmp_path / "a", saver=saver, stop=stop, hooks=[
        EvaluateHook(lambda params: stop.ask() or {}, period=7)])
    with pytest.raises(Preempted) as caught:
        loop.run(factory.create(jax.random.key(0)))
    assert caught.value.step == 7 and list(saver.saved) == [7]
    resumed, _, path2, _ = build(tmp_path / "b", saver=FakeSaver(100))
    state = jax.tree.map(jnp.asarray, saver.saved[7].on_device()).replace(
        position=saver.saved[7].position)
    resumed._batches.seek(state.data_position)
    final = resumed.run(state)
    straight, _, path3, _ = build(tmp_path / "c")
    expected = straight.run(factory.create(jax.random.key(0)))
    assert np.array_equal(final.params["table"], expected.params["table"])
    first, second, whole = ([r["loss"] for r in records(p)] for p in (path, path2, path3))
    assert first + second == whole


def test_early_stop_and_evaluation_records(tmp_path):
    values = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    hook = EvaluateHook(lambda params: {"loss": next(values)}, period=2,
                        early_stop=EarlyStop(patience=2))
    loop, factory, path, _ = build(tmp_path, hooks=[hook])
    state = loop.run(factory.create(jax.random.key(0)))
    assert int(state.step) == 8
    assert [r["eval/loss"] for r in records(path) if "eval/loss" in r] == [3.0, 2.0, 2.5, 2.6]
    assert 8 in loop._saver.saved


def test_jsonl_drops_half_lines_and_lost_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    writer = JsonlWriter(path, resume_step=1)
    writer.write(2, {"loss": 1.5})
    writer.close()
    assert [(r["step"], r["loss"]) for r in records(path)] == [(1, 2.0), (2, 1.5)]
