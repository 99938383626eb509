"""Stacked and unrolled layers: which arrays make up which."""

import jax.numpy as jnp
import pytest

from vishwam_t5x.checkpointing.layers import Recipe, layer_axis, make_plan
from vishwam_t5x.core.trees import flatten_names
from vishwam_t5x.models.scan import stack_layers

UNROLLED = {
    **{f"encoder/layers_{i}/mlp/wi/kernel": (4, 8) for i in range(3)},
    **{f"encoder/layers_{i}/norm/scale": (4,) for i in range(3)},
    **{f"decoder/layers_{i}/mlp/wi/kernel": (4, 8) for i in range(2)},
    "encoder/encoder_norm/scale": (4,)}
STACKED = {
    "encoder/encoder/mlp/wi/kernel": (4, 3, 8), "encoder/encoder/norm/scale": (4, 3),
    "decoder/decoder/mlp/wi/kernel": (4, 2, 8), "encoder/encoder_norm/scale": (4,)}


def test_the_axis_is_the_models():
    """What `models/scan.py` stacks is what this room takes for stacked."""
    tree = {side: {f"layers_{i}": {"w": {"kernel": jnp.zeros((5, 7))}, "s": {"scale": jnp.zeros(5)}}
                   for i in range(3)} for side in ("encoder", "decoder")}
    shapes = {name: leaf.shape for name, leaf in flatten_names(tree).items()}
    stacked = {name: leaf.shape for name, leaf in flatten_names(stack_layers(tree)).items()}
    for wanted, available in ((shapes, stacked), (stacked, shapes)):
        plan = make_plan(wanted, available)
        assert not (plan.missing or plan.mismatched or plan.extra)
        assert {recipe.axis for recipe in plan.recipes.values()} == {1}


def test_taken_apart():
    plan = make_plan(UNROLLED, STACKED)
    assert plan.recipes["encoder/layers_2/mlp/wi/kernel"] == Recipe(
        ("encoder/encoder/mlp/wi/kernel",), 1, 2)
    assert plan.recipes["encoder/encoder_norm/scale"] == Recipe(("encoder/encoder_norm/scale",))
    assert (plan.missing, plan.mismatched, plan.extra) == ((), (), ())


def test_put_together():
    plan = make_plan(STACKED, UNROLLED)
    assert plan.recipes["decoder/decoder/mlp/wi/kernel"] == Recipe(
        ("decoder/layers_0/mlp/wi/kernel", "decoder/layers_1/mlp/wi/kernel"), 1)
    assert (plan.missing, plan.mismatched, plan.extra) == ((), (), ())


def test_optimizer_state_below_any_root():
    single = {f"opt_state/param_states/encoder/layers_{i}/wi/kernel/{kind}": shape
              for i in range(3) for kind, shape in
              (("v_row", (128,)), ("v_col", (256,)), ("v", (1,)))}
    root = "opt_state/param_states/encoder/encoder/wi/kernel/"
    stacked = {f"{root}v_row": (128, 3), f"{root}v_col": (3, 256), f"{root}v": (1,)}
    plan = make_plan(stacked, single)
    assert plan.recipes[f"{root}v_row"].axis == 1 and plan.recipes[f"{root}v_col"].axis == 0
    assert len(plan.recipes[f"{root}v"].sources) == 1
    back = make_plan(single, stacked)
    assert len(back.recipes) == 9 and not back.missing


@pytest.mark.parametrize(("single", "stacked", "axis"), [
    ((4, 8), (4, 3, 8), 1), ((4, 8), (3, 4, 8), 0), ((4,), (4, 3), 1), ((), (3,), 0),
    ((3, 8), (3, 3, 8), 1), ((4, 8), (4, 8), None), ((4, 8), (3, 4, 9), None)])
def test_layer_axis(single, stacked, axis):
    assert layer_axis(single, stacked) == axis


def test_another_depth_is_another_model():
    fewer = {name: shape for name, shape in UNROLLED.items() if "layers_2" not in name}
    plan = make_plan(fewer, STACKED)
    assert {name for name, _, _ in plan.mismatched} == {
        name for name in fewer if name.startswith("encoder/layers_")}
    plan = make_plan(STACKED, fewer)
    assert ("encoder/encoder/norm/scale", (4, 3), (2, 4)) in plan.mismatched


def test_missing_extra_renamed():
    wanted = {"a/kernel": (2, 3), "b/kernel": (2, 3), "c/kernel": (5,)}
    plan = make_plan(wanted, {"old/kernel": (2, 3), "c/kernel": (6,), "d/kernel": (1,)},
                     {"a/kernel": "old/kernel"})
    assert plan.recipes == {"a/kernel": Recipe(("old/kernel",))}
    assert plan.missing == ("b/kernel",)
    assert plan.mismatched == (("c/kernel", (5,), (6,)),)
    assert plan.extra == ("d/kernel",)
