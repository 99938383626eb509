"""When to save and what to keep."""

import pytest

from vishwam_t5x.checkpointing.policy import (
    AnyOf,
    AtSteps,
    CheckpointConfig,
    EveryMinutes,
    EverySteps,
    Retention,
)
from vishwam_t5x.core.errors import UserError


def saves(policy, steps, seconds_per_step=1.0, first=0):
    """Steps at which a run of `steps` steps saves."""
    last, last_time, saved = first, first * seconds_per_step, []
    for step in range(first + 1, steps + 1):
        now = step * seconds_per_step
        if policy.due(step, last, now - last_time):
            saved.append(step)
            last, last_time = step, now
    return saved


def test_every_steps():
    assert saves(EverySteps(10), 35) == [10, 20, 30]
    assert saves(EverySteps(10), 45, first=24) == [30, 40]
    # A multiple that was missed (the run was elsewhere) is made up for at once.
    assert EverySteps(10).due(33, 28, None) and not EverySteps(10).due(29, 21, None)


def test_every_minutes():
    assert saves(EveryMinutes(1.0), 200) == [60, 120, 180]
    assert saves(EveryMinutes(0.5), 10, seconds_per_step=20.0) == [2, 4, 6, 8, 10]
    assert not EveryMinutes(1.0).due(50, 0, None)  # the time is not asked at this step


def test_any_of_and_lists():
    both = AnyOf(EverySteps(100), EveryMinutes(1.0), AtSteps((7, 130)))
    assert saves(both, 205) == [7, 67, 100, 130, 190, 200]
    assert both.by_clock and not AnyOf(EverySteps(5)).by_clock
    assert saves(AnyOf(), 50) == []


def test_keep_last_best_and_milestones():
    losses = {10: 5.0, 20: 1.0, 30: 3.0, 40: 1.5, 50: 4.0, 60: 4.5}
    checkpoints = {step: {"eval/loss": loss} for step, loss in losses.items()}
    assert Retention(last=2).kept(checkpoints) == {50, 60}
    assert Retention(last=1, best_metric="eval/loss").kept(checkpoints) == {20, 60}
    assert Retention(last=1, best_metric="eval/loss", best=2).kept(checkpoints) == {20, 40, 60}
    assert Retention(last=1, best_metric="eval/loss", best_mode="max").kept(checkpoints) == {10, 60}
    assert Retention(last=1, every_steps=30).kept(checkpoints) == {30, 60}
    assert Retention(last=None).kept(checkpoints) == set(losses)


def test_what_has_no_number_is_never_best():
    checkpoints = {1: {}, 2: {"m": float("nan")}, 3: {"m": 7.0}, 4: {"m": float("inf")}, 5: {}}
    keep = Retention(last=1, best_metric="m", best_mode="max", best=3)
    assert keep.kept(checkpoints) == {3, 5}
    assert keep.best_of(checkpoints) == 3
    assert keep.best_of({1: {}}) is None
    # Of equals the newest.
    assert Retention(best_metric="m").best_of({1: {"m": 2.0}, 9: {"m": 2.0}}) == 9


@pytest.mark.parametrize(("fields", "words"), [
    ({"period": 0}, "save period"), ({"minutes": 0.0}, "positive"), ({"keep": 0}, "last"),
    ({"keep_best_mode": "mx"}, "did you mean 'max'"), ({"keep_every_steps": 0}, "every_steps")])
def test_mistakes(fields, words):
    with pytest.raises(UserError, match=words):
        CheckpointConfig(**fields)


def test_config_makes_both():
    config = CheckpointConfig(period=10, minutes=1.0, keep=2, keep_best_metric="m")
    assert saves(config.policy(), 25, seconds_per_step=9.0) == [7, 10, 17, 20]
    assert config.retention() == Retention(2, "m")
    assert saves(CheckpointConfig(period=None).policy(), 5000) == []
