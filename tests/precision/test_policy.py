"""Precision policies: what each name means and which device gets which."""

from __future__ import annotations

import types

import jax.numpy as jnp
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.precision.policy import (
    LossScaleConfig,
    Policy,
    default_policy_name,
    policy_by_name,
    resolve_policy,
)


@pytest.mark.parametrize("name, scale", [
    ("float32", "none"), ("bfloat16", "none"), ("float16", "dynamic")])
def test_named_policies_keep_float32_masters(name, scale):
    policy = policy_by_name(name)
    assert policy.name == name
    assert policy.compute_dtype == jnp.dtype(name)
    assert policy.param_dtype == policy.output_dtype == policy.accumulation_dtype == jnp.float32
    assert policy.loss_scale.kind == scale


def device(platform, **extra):
    return types.SimpleNamespace(platform=platform, **extra)


@pytest.mark.parametrize("of, name", [
    (device("cpu"), "float32"), (device("tpu"), "bfloat16"),
    (device("gpu", compute_capability="7.5"), "float16"),  # GTX 1650, T4
    (device("gpu", compute_capability="7.0"), "float16"),  # V100
    (device("gpu", compute_capability="8.0"), "bfloat16"),  # A100
    (device("gpu", compute_capability="12.0"), "bfloat16"),
    (device("gpu", compute_capability="gfx90a"), "bfloat16"),
])
def test_auto_suits_the_device(of, name):
    assert default_policy_name(of) == name
    assert policy_by_name("auto", of) == policy_by_name(name)
    assert resolve_policy("auto", of) == policy_by_name(name)


def test_a_policy_resolves_to_itself():
    policy = Policy(param_dtype=jnp.bfloat16)
    assert resolve_policy(policy) is policy
    assert policy.param_dtype == jnp.dtype("bfloat16")


@pytest.mark.parametrize("make, words", [
    (lambda: policy_by_name("bfloat"), "did you mean 'bfloat16'"),
    (lambda: Policy(compute_dtype="int8"), "compute_dtype"),
    (lambda: Policy(param_dtype="flaot32"), "did you mean 'float32'"),
    (lambda: LossScaleConfig("dynamo"), "did you mean 'dynamic'"),
    (lambda: LossScaleConfig("dynamic", initial=0.5), "minimum <= initial <= maximum"),
    (lambda: LossScaleConfig("dynamic", minimum=0), "minimum <= initial <= maximum"),
    (lambda: LossScaleConfig("dynamic", growth_interval=0), "growth_interval"),
    (lambda: LossScaleConfig("dynamic", factor=1), "factor"),
])
def test_mistakes_are_named(make, words):
    with pytest.raises(UserError, match=words):
        make()
