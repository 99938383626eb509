"""Layers one after another: unrolled, or one `jax.lax.scan` over stacked parameters.

A scanned stack compiles one layer whatever the depth. Its parameters carry the layers on axis 1,
under the stack's own name ('encoder/encoder/…'), as T5X and Unified-IO 2 checkpoints store them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from vishwam_t5x.parallelism.remat import remat_policy

LAYER_AXIS = 1
"""Axis of a stacked parameter along which its layers lie."""

STACKS = ("encoder", "decoder")

Body = Callable[[Any, Any, Any], tuple[Any, Any]]


def apply_layers(layers: nn.Module | Sequence[nn.Module], body: Body, carry: Any, xs: Any = None, *,
                 num_layers: int, policy: str = "none") -> tuple[Any, Any]:
    """Calls `body(layer, carry, x) -> (carry, y)` for each layer in turn.

    Args:
        layers: the modules one by one, or a single module whose parameters are stacked.
        body: may close over what all layers share (biases, rotations, the encoder's output).
        carry: what goes from layer to layer.
        xs: for unrolled layers a sequence with one entry per layer, for a stack a pytree whose
            arrays have the layers on axis 0; None where the layers need nothing of their own.
        num_layers: layers in the stack.
        policy: remat policy name, see `parallelism.remat`.

    Returns:
        The last carry and the ys: a tuple, or for a stack a pytree stacked on axis 0.
    """
    policy_fn = remat_policy(policy)
    scanned = isinstance(layers, nn.Module)
    if policy_fn is not None:
        # Inside a scan nothing can be merged with the forward pass, so the costly barrier that
        # prevents it can be left out.
        body = nn.remat(body, policy=policy_fn, prevent_cse=not scanned)
    if not isinstance(layers, nn.Module):
        ys = []
        for number, layer in enumerate(layers):
            carry, y = body(layer, carry, None if xs is None else xs[number])
            ys.append(y)
        return carry, tuple(ys)
    scan = nn.scan(
        body, variable_axes={"params": LAYER_AXIS, "intermediates": 0},
        split_rngs={"params": True, "dropout": True}, length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"})
    return scan(layers, carry, xs)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def _stack_leaves(*leaves: Any) -> Any:
    if not _is_box(leaves[0]):
        return jnp.stack(leaves, axis=min(LAYER_AXIS, leaves[0].ndim))
    stacked = _stack_leaves(*(leaf.unbox(apply_constraint=False) for leaf in leaves))
    boxed = leaves[0].add_axis(LAYER_AXIS, {nn.PARTITION_NAME: "layers"})
    return boxed.replace_boxed(stacked)


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `params` of an unrolled model as those of the same model with `scan_layers`.

    'encoder/layers_3/…' becomes entry 3 on axis 1 of 'encoder/encoder/…', the decoder likewise.
    Leaves may be arrays or boxed with their logical axes (then 'layers' is inserted).
    """
    out = dict(params)
    for stack in (stack for stack in STACKS if stack in params):
        branch = dict(params[stack])
        names = sorted((name for name in branch if re.fullmatch(r"layers_\d+", name)),
                       key=lambda name: int(name.removeprefix("layers_")))
        assert names == [f"layers_{number}" for number in range(len(names))], names
        layers = [branch.pop(name) for name in names]
        branch[stack] = jax.tree.map(_stack_leaves, *layers, is_leaf=_is_box)
        out[stack] = branch
    return out


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`."""
    out = dict(params)
    for stack in (stack for stack in STACKS if stack in params):
        branch = dict(params[stack])
        stacked = branch.pop(stack)
        leaves = jax.tree.leaves(meta.unbox(stacked))
        for number in range(leaves[0].shape[LAYER_AXIS]):
            branch[f"layers_{number}"] = jax.tree.map(
                lambda leaf, at=number: _unstack_leaf(leaf, at), stacked, is_leaf=_is_box)
        out[stack] = branch
    return out


def _unstack_leaf(leaf: Any, number: int) -> Any:
    if not _is_box(leaf):
        return jnp.take(leaf, number, axis=LAYER_AXIS)
    single = _unstack_leaf(leaf.unbox(apply_constraint=False), number)
    return leaf.remove_axis(LAYER_AXIS, {nn.PARTITION_NAME: "layers"}).replace_boxed(single)
