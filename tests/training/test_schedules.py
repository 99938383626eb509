"""Learning rates: T5X's numbers, and the cosine's own."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.training import schedules

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "t5x"
                     / "adafactor_and_schedules.json").read_text())["lr_schedules"]


@pytest.mark.parametrize("case", GOLDEN["schedules"], ids=lambda case: case["kw"]["factors"])
@pytest.mark.parametrize("traced", [False, True])
def test_t5x_schedules(case, traced):
    schedule = schedules.create_learning_rate_scheduler(**case["kw"])
    if traced:
        rates = jax.jit(jax.vmap(schedule))(jnp.asarray(GOLDEN["steps"], jnp.int32))
    else:
        rates = [schedule(step) for step in GOLDEN["steps"]]
    # A cosine near its zero is all cancellation: one float32 ulp of pi is 2e-7 of the base there.
    floor = 1e-7 * case["kw"]["base_learning_rate"]
    np.testing.assert_allclose(rates, case["values"], rtol=1e-6, atol=floor)
    assert all(np.asarray(rate).dtype == np.float32 for rate in rates)


def test_all_factors_of_t5x_are_covered():
    used = {name.strip() for case in GOLDEN["schedules"]
            for name in case["kw"]["factors"].split("*")}
    assert used == set(schedules.FACTORS)


def test_warmup_cosine():
    schedule = schedules.warmup_cosine(3e-3, warmup_steps=100, total_steps=600, end_factor=0.1)
    np.testing.assert_allclose(schedule(0), 3e-5, rtol=1e-6)
    np.testing.assert_allclose(schedule(49), 1.5e-3, rtol=1e-6)
    np.testing.assert_allclose(schedule(99), 3e-3, rtol=1e-6)
    np.testing.assert_allclose(schedule(100), 3e-3, rtol=1e-6)
    np.testing.assert_allclose(schedule(350), 3e-3 * 0.55, rtol=1e-5)
    np.testing.assert_allclose(schedule(600), 3e-4, rtol=1e-5)
    np.testing.assert_allclose(schedule(10_000), 3e-4, rtol=1e-5)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(600)))
    assert (np.diff(rates[:100]) > 0).all() and (np.diff(rates[100:]) <= 0).all()


def test_step_offset_starts_anew():
    plain = schedules.warmup_cosine(1.0, 10, 100)
    later = schedules.warmup_cosine(1.0, 10, 100, step_offset=3_000_000)
    np.testing.assert_array_equal([later(3_000_000 + step) for step in (0, 7, 60)],
                                  [plain(step) for step in (0, 7, 60)])


@pytest.mark.parametrize(("arguments", "words"), [
    ({"factors": "constant * linear_warmpu"}, "linear_warmup"),
    ({"factors": "linear_decay * linear_warmup"}, "already"),
    ({"warmup_steps": 0}, "warmup_steps"),
    ({"base_learning_rate": -1.0}, "base_learning_rate"),
])
def test_mistakes_in_factor_strings(arguments, words):
    with pytest.raises(UserError, match=words):
        schedules.create_learning_rate_scheduler(**arguments)


def test_warmup_longer_than_the_run():
    with pytest.raises(UserError, match="shorter than the run"):
        schedules.warmup_cosine(1e-3, warmup_steps=100, total_steps=100)
