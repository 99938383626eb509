"""What the backward pass finds in memory, and what it computes again.

| name | the backward pass finds | and computes again |
|---|---|---|
| none | every intermediate result XLA wants to keep | nothing |
| dots | results of all matmuls, attention weights included | norms, softmax, activations |
| minimal | results of matmuls with weights (no batch dimension) | attention weights, the above |
| offload | as save_names with every name below, kept in host memory | the rest of the block |
| save_names:a,b | only the results with these names | the rest of the block |
| full | the inputs of each block | the whole block |

From top to bottom memory falls and time rises. 'minimal' and 'full' mean what they mean in T5X's
scalable_t5. Models wrap each block in `nn.remat(..., policy=remat_policy(name))`, or not at all
when the policy is None, and name results by `jax.ad_checkpoint.checkpoint_name`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.parallelism.sharding import current_platform

# Names for `checkpoint_name` in model code.
QKV = "qkv"  # query, key and value projections
ATTENTION_CONTEXT = "attention_context"  # weighted values, before the output projection
ATTENTION_OUT = "attention_out"  # after the output projection
MLP_HIDDEN = "mlp_hidden"  # gated hidden units, before the output projection
MLP_OUT = "mlp_out"  # after the output projection
CHECKPOINT_NAMES = (QKV, ATTENTION_CONTEXT, ATTENTION_OUT, MLP_HIDDEN, MLP_OUT)

REMAT_POLICIES = ("none", "minimal", "full", "dots", "offload", "save_names")

Policy = Callable[..., Any]


def remat_policy(name: str, platform: str | None = None) -> Policy | None:
    """Returns the policy for `jax.checkpoint` or `nn.remat`; None means: do not wrap at all.

    Args:
        name: 'none', 'minimal', 'full', 'dots', 'offload' or 'save_names:NAME,NAME' with names
            among `CHECKPOINT_NAMES`.
        platform: what the program is compiled for ('cpu', 'gpu', 'tpu'); by default that of the
            mesh in `partitioning`, or of jax's default device.

    Raises:
        UserError: unknown policy or checkpoint name.
    """
    kind, _, names = str(name).partition(":")
    one_of(kind, REMAT_POLICIES, "remat policy")
    if names and kind != "save_names":
        raise UserError(f"remat policy {kind!r} takes no names", got=repr(name),
                        fix=f"'{kind}' or 'save_names:{names}'")
    policies = jax.checkpoint_policies
    if kind == "none":
        return None
    if kind == "full":
        return policies.nothing_saveable
    if kind == "dots":
        return policies.dots_saveable
    if kind == "minimal":
        return policies.dots_with_no_batch_dims_saveable
    if kind == "save_names":
        return policies.save_only_these_names(*_split_names(names))
    if (platform or current_platform()) == "cpu":
        # A CPU's device memory is host memory: kept there, the same results are at hand.
        return policies.save_only_these_names(*CHECKPOINT_NAMES)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(CHECKPOINT_NAMES),
        offload_src="device", offload_dst="pinned_host")


def _split_names(names: str) -> list[str]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError("remat policy 'save_names' needs the names to save", got="save_names",
                        fix=f"e.g. 'save_names:{QKV},{MLP_OUT}'; names: "
                        + ", ".join(CHECKPOINT_NAMES))
    return [one_of(name, CHECKPOINT_NAMES, "checkpoint name") for name in wanted]

