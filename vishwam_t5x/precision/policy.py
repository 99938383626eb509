"""Which dtype holds what: parameters, matmuls, outputs and sums, by one name.

| name | parameters | compute | outputs | accumulation | loss scale | for |
|---|---|---|---|---|---|---|
| float32 | float32 | float32 | float32 | float32 | none | CPU, reference runs |
| bfloat16 | float32 | bfloat16 | float32 | float32 | none | TPU, GPUs from Ampere on |
| float16 | float32 | float16 | float32 | float32 | dynamic | GPUs before Ampere |

Parameters stay float32 in every named policy: they are the master copy the optimizer updates.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vishwam_t5x.core.errors import UserError, one_of

FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")
POLICIES = ("auto", "float32", "bfloat16", "float16")
LOSS_SCALES = ("none", "static", "dynamic")


@dataclasses.dataclass(frozen=True)
class LossScaleConfig:
    """How the loss is multiplied before the backward pass, so that float16 gradients do not vanish.

    Attributes:
        kind: 'none', 'static' (always `initial`) or 'dynamic' (divided by `factor` at an overflow,
            multiplied by it after `growth_interval` steps without one).
        initial: the scale at step 0.
        growth_interval: finite steps in a row before a dynamic scale grows.
        factor: by how much a dynamic scale grows and shrinks, > 1.
        minimum: a dynamic scale never falls below this.
        maximum: a dynamic scale never grows beyond this.

    Raises:
        UserError: a value out of its range.
    """

    kind: str = "none"
    initial: float = 2.0**15
    growth_interval: int = 2000
    factor: int = 2
    minimum: float = 1.0
    maximum: float = 2.0**24

    def __post_init__(self) -> None:
        one_of(self.kind, LOSS_SCALES, "kind of loss scale")
        if not 0 < self.minimum <= self.initial <= self.maximum < float("inf"):
            raise UserError(
                "a loss scale needs 0 < minimum <= initial <= maximum",
                got=f"minimum {self.minimum}, initial {self.initial}, maximum {self.maximum}",
                fix="e.g. minimum 1, initial 32768, maximum 16777216")
        if self.growth_interval < 1:
            raise UserError("growth_interval of a loss scale counts steps, at least 1",
                            got=self.growth_interval, fix="e.g. 2000")
        if self.factor < 2:
            raise UserError("factor of a loss scale is a whole number of at least 2",
                            got=self.factor, fix="2 halves and doubles")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes of one run, and the loss scale they need.

    Attributes:
        param_dtype: dtype in which parameters are stored and updated.
        compute_dtype: dtype of activations and matmul operands.
        output_dtype: dtype of logits and other results handed out of the model.
        accumulation_dtype: dtype in which gradients are summed over microbatches.
        loss_scale: see `LossScaleConfig`.

    Every dtype is given by name ('float32', 'bfloat16', 'float16', 'float64') or as a dtype, and
    kept as a `numpy.dtype`.

    Raises:
        UserError: not the name of a floating dtype.
    """

    param_dtype: DTypeLike = "float32"
    compute_dtype: DTypeLike = "float32"
    output_dtype: DTypeLike = "float32"
    accumulation_dtype: DTypeLike = "float32"
    loss_scale: LossScaleConfig = LossScaleConfig()

    def __post_init__(self) -> None:
        for name in ("param_dtype", "compute_dtype", "output_dtype", "accumulation_dtype"):
            object.__setattr__(self, name, float_dtype(getattr(self, name), name))

    @property
    def name(self) -> str:
        """The name of the compute dtype."""
        return np.dtype(self.compute_dtype).name


def float_dtype(dtype: DTypeLike, field: str = "dtype") -> np.dtype:
    """Returns the floating dtype of that name; `field` names it in the error."""
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    return jnp.dtype(one_of(name, FLOAT_DTYPES, f"floating dtype for {field}"))


def policy_by_name(name: str = "auto", device: Any = None) -> Policy:
    """Returns the policy called 'float32', 'bfloat16' or 'float16', or chosen for a device.

    Args:
        name: one of `POLICIES`; 'auto' is `default_policy_name(device)`.
        device: the `jax.Device` 'auto' chooses for; by default jax's first device.

    Raises:
        UserError: unknown name.
    """
    one_of(name, POLICIES, "precision")
    if name == "auto":
        name = default_policy_name(device)
    scale = LossScaleConfig(kind="dynamic" if name == "float16" else "none")
    return Policy(compute_dtype=name, loss_scale=scale)


def resolve_policy(policy: Policy | str, device: Any = None) -> Policy:
    """Returns a `Policy` as it is, and what `policy_by_name` says for a name."""
    return policy if isinstance(policy, Policy) else policy_by_name(policy, device)


def default_policy_name(device: Any = None) -> str:
    """Returns the precision a device is best at.

    'bfloat16' on TPUs and on GPUs from compute capability 8.0 (Ampere) on; 'float16' on older GPUs,
    whose matmul units know no bfloat16; 'bfloat16' on GPUs that state no capability (AMD);
    'float32' on CPUs.

    Args:
        device: a `jax.Device`; by default jax's first device.
    """
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        return "float32"
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.split(".")[0]
    return "float16" if major.isdigit() and int(major) < 8 else "bfloat16"
