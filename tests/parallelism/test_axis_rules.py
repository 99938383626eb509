"""Logical axis rules: what they give, their order, and the mistakes they catch."""

from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec as P

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules, standard_logical_axis_rules


@pytest.mark.parametrize("axes, spec", [
    (("embed", "mlp"), P("fsdp", "tensor")),
    (("mlp", "embed"), P("tensor", "fsdp")),
    (("embed", "joined_kv"), P("fsdp", "tensor")),
    (("embed", "heads"), P("fsdp", "tensor")),
    (("vocab", "embed"), P("tensor", "fsdp")),
    (("embed", "layers", "mlp"), P("fsdp", None, "tensor")),
    (("image_patch", "embed"), P(None, "fsdp")),
    (("kv",), P(None)),
    ((), P()),
])
def test_standard_rules_place_parameters(axes, spec):
    assert LogicalAxisRules().spec(axes) == spec


@pytest.mark.parametrize("axes, spec", [
    (("batch", "length", "embed"), P(("replica", "data", "fsdp"), None, None)),
    (("batch", "length", "mlp"), P(("replica", "data", "fsdp"), None, "tensor")),
    (("batch", "length", "heads", "kv"), P(("replica", "data", "fsdp"), None, "tensor", None)),
    (("length", "embed"), P(None, None)),  # no batch that would take fsdp first
    (("batch", None, "vocab"), P(("replica", "data", "fsdp"), None, "tensor")),
])
def test_standard_rules_place_activations(axes, spec):
    rules = LogicalAxisRules()
    assert rules.spec(rules.for_activations(axes)) == spec


def test_no_mesh_axis_twice_in_one_array():
    rules = LogicalAxisRules()
    assert rules.spec(("embed", "embed")) == P("fsdp", None)
    assert rules.spec(("mlp", "vocab", "heads")) == P(None, "tensor", None)  # vocab's rule is first
    assert rules.spec(("batch", "embed")) == P(("replica", "data", "fsdp"), None)


def test_a_later_rule_of_the_same_axis_gets_its_turn():
    rules = standard_logical_axis_rules([("a", "data"), ("b", "data"), ("b", "fsdp")])
    assert rules.spec(("a", "b")) == P("data", "fsdp")
    assert rules.spec(("b",)) == P("data")


def test_additional_rules_override_the_standard_ones():
    assert standard_logical_axis_rules([["embed", None]]).spec(("embed", "mlp")) == P(
        None, "tensor")
    assert standard_logical_axis_rules([["mlp", ["fsdp", "tensor"]]]).spec(("embed", "mlp")) == P(
        None, ("fsdp", "tensor"))


@pytest.mark.parametrize("rule, words", [
    (("embed", "fsdb"), ["'fsdb'", "did you mean 'fsdp'"]),
    (("embed", ("data", "data")), ["twice"]),
    ("embed", ["pair"]),
    (("embed", 3), ["pair"]),
])
def test_a_wrong_rule_is_refused(rule, words):
    with pytest.raises(UserError) as caught:
        standard_logical_axis_rules([rule])
    for word in words:
        assert word in str(caught.value)


def test_an_axis_without_a_rule_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'embed'"):
        LogicalAxisRules().check_known(("embd", "mlp"), "parameter 'wi/kernel'")
    LogicalAxisRules().check_known(("embed", None), "an array")


def test_allow_uneven_has_two_values():
    with pytest.raises(UserError, match="allow_uneven"):
        standard_logical_axis_rules(allow_uneven="pad")
