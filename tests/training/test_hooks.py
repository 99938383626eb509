"""What happens between steps, and what is forgotten when the run goes back."""

import json
import math
import os
import signal
import types

import jax
import jax.numpy as jnp
import pytest

from vishwam_t5x.core.errors import Preempted, UserError
from vishwam_t5x.training import setup
from vishwam_t5x.training.hooks import EarlyStop, EvaluateHook, ProfileHook
from vishwam_t5x.training.optimizers import AdamW
from vishwam_t5x.training.schedules import warmup_cosine
from vishwam_t5x.training.signals import StopRequest


def test_early_stop_goes_on_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = [(2, 3.0), (4, 2.0), (6, 2.5), (8, 1.0)]
    path.write_text("".join(json.dumps({"step": s, "eval/loss": v}) + "\n" for s, v in values))
    early_stop = EarlyStop(patience=2)
    assert early_stop.replay(path, last_step=6) is None
    assert early_stop.observe(8, {"eval/loss": 2.2}) is not None, "2.0 was the best, two ago"


def test_a_run_that_stopped_early_has_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = [(2, 2.0), (4, 2.5), (6, 2.5)]
    path.write_text("".join(json.dumps({"step": s, "eval/loss": v}) + "\n" for s, v in values))
    assert "has not improved" in EarlyStop(patience=2).replay(path, last_step=6)
    assert EarlyStop(patience=3).replay(path, last_step=6) is None
    assert EarlyStop(patience=2).replay(path, last_step=4) is None, "step 6 is about to come again"


def test_early_stop_survives_nan_and_rollback():
    early_stop = EarlyStop(patience=2)
    assert early_stop.observe(1, {"eval/loss": math.nan}) is None
    assert early_stop.observe(2, {"eval/loss": 3.0}) is None, "better than no number"
    assert early_stop.observe(3, {"eval/loss": 4.0}) is None
    early_stop.rewind(2)
    assert early_stop.observe(3, {"eval/loss": 4.0}) is None, "step 3 counts once"
    assert early_stop.observe(4, {"eval/loss": 4.0}) is not None


def test_early_stop_watches_an_evaluation():
    with pytest.raises(UserError, match="eval/loss"):
        EarlyStop(metric="loss")


def test_early_stop_knows_its_metric_before_the_run():
    names = ["loss", "loss/text", "accuracy/text"]
    EarlyStop(metric="eval/accuracy/text", mode="max").check_metric(names)
    with pytest.raises(UserError, match="did you mean 'eval/accuracy/text'"):
        EarlyStop(metric="eval/acuracy/text").check_metric(names)


def profiled(monkeypatch, first, steps, total):
    """Steps after which a profile began and ended."""
    state = types.SimpleNamespace(step=jnp.int32(0), params={})
    seen, now = [], 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(now))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(now))
    hook = ProfileHook("unused", first, steps)
    for now in range(1, total + 1):
        hook(now, state, now == total)
    hook.close()
    return seen


@pytest.mark.parametrize(("first", "steps", "total", "expected"), [
    (10, 5, 100, [10, 15]), (0, 2, 100, [1, 3]), (10, 5, 12, [10, 12]), (10, 5, 10, [])])
def test_profile(monkeypatch, caplog, first, steps, total, expected):
    assert profiled(monkeypatch, first, steps, total) == expected
    assert ("no profile" in caplog.text) is (not expected)


def test_profile_ends_with_the_run(monkeypatch):
    state = types.SimpleNamespace(step=jnp.int32(0), params={})
    ended = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: ended.append(True))
    hook = ProfileHook("unused", 1, 50)
    hook(1, state, False)
    hook.close()
    hook.close()
    assert ended == [True]


def test_learning_rate_of_the_log_is_that_of_the_update():
    optimizer = AdamW(learning_rate=warmup_cosine(1.0, 4, 100))
    describe = setup.describe_metrics(optimizer)
    taken = [True, False, True]  # the second step is skipped: the third makes the second update
    rates = [describe({"update_applied": applied, "skipped_steps": taken[:step].count(False)},
                      step)["learning_rate"] for step, applied in enumerate(taken, 1)]
    assert rates == [0.25, 0.5, 0.5]


def test_a_stop_before_the_first_step_is_at_once():
    stop = StopRequest().install()
    try:
        with pytest.raises(Preempted, match="before the first step"):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        stop.wait_for_steps()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(3)
    finally:
        stop.restore()


def test_evaluation_is_not_billed_for_the_step(monkeypatch):
    clock = [0.0]

    def wait(tree):
        clock[0] += 5.0  # what is left of the step
        return tree

    def evaluate(params):
        clock[0] += 2.0
        return {"loss": 1.0}

    monkeypatch.setattr(jax, "block_until_ready", wait)
    hook = EvaluateHook(evaluate, period=1, clock=lambda: clock[0])
    assert hook(1, types.SimpleNamespace(params={}), False).seconds == 2.0
