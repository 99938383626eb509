"""Which mesh axis carries which named dimension of an array.

Model code names the dimensions of its arrays ('batch', 'embed', 'mlp', ...) and never a mesh axis.
A rule maps one such logical axis to the mesh axes it is split over, or to None. Rules are tried in
their order and a mesh axis is used at most once for one array, as T5X and Flax do it.

Parameters and activations share the names, but not their placement: a kernel's 'embed' is split
over 'fsdp', an activation's is not (its batch already is). So a rule for 'activation_embed', where
there is one, is what an activation's 'embed' follows; see `LogicalAxisRules.for_activations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from vishwam_t5x.core.errors import UserError, did_you_mean, one_of

MESH_AXES = ("replica", "data", "fsdp", "tensor")
"""Mesh axes, slowest link first: slices, data parallel, sharded data parallel, tensor parallel."""

MeshAxes = str | tuple[str, ...] | None

_STANDARD: tuple[tuple[str, MeshAxes], ...] = (
    ("batch", ("replica", "data", "fsdp")),
    # Parameters. Megatron splits one side of each pair of matmuls over 'tensor'; FSDP the other.
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("joined_kv", "tensor"),
    ("embed", "fsdp"),
    ("kv", None),  # one head's features: a head is never torn apart
    ("length", None),
    ("layers", None),
    ("stack", None),
    ("image_patch", None),
    ("audio_patch", None),
    ("modality", None),
    ("latents", None),
    ("relpos_buckets", None),
    ("lora_rank", None),
    ("unmodeled", None),
    # Names the Unified-IO 2 checkpoints use for dimensions that nobody splits.
    ("axis_0", None),
    ("axis_1", None),
    ("axis_2", None),
    ("axis_3", None),
    # Activations: sharded by batch, and inside a block by heads or hidden units.
    ("activation_embed", None),
    ("activation_vocab", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_heads", "tensor"),
    ("activation_joined_kv", "tensor"),
    ("activation_kv", None),
    ("activation_length", None),
)

RULES_IN_GIN = "train.logical_axis_rules = @axis_rules.standard_logical_axis_rules()"

STACKING_AXES = ("layers", "stack")
"""Logical axes that stack arrays of several layers, and are no dimension of a layer's own array."""


def _as_tuple(mesh_axes: MeshAxes) -> tuple[str, ...]:
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


@dataclasses.dataclass(frozen=True)
class LogicalAxisRules:
    """Ordered rules from logical axes to mesh axes.

    Attributes:
        rules: pairs (logical axis, mesh axis | tuple of mesh axes | None); earlier ones go first.
        replicate_vectors: keep parameters of one dimension (norm scales, biases) whole on every
            device: they weigh nothing, and gathering each before its use costs a message.
        allow_uneven: what to do where a parameter's dimension is not divisible by its mesh axes:
            'error' (name it and stop) or 'replicate' (do not split that dimension, and log it).

    Raises:
        UserError: a rule names an unknown mesh axis or one twice, or is not such a pair.
    """

    rules: tuple[tuple[str, MeshAxes], ...] = _STANDARD
    replicate_vectors: bool = True
    allow_uneven: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(_checked_rule(rule) for rule in self.rules))
        one_of(self.allow_uneven, ("error", "replicate"), "value of allow_uneven")

    @property
    def logical_axes(self) -> frozenset[str]:
        """The logical axes that have a rule."""
        return frozenset(name for name, _ in self.rules)

    def for_activations(self, logical_axes: Sequence[str | None]) -> tuple[str | None, ...]:
        """Returns the axes with each name replaced by 'activation_<name>' where that has a rule."""
        known = self.logical_axes
        return tuple(
            f"activation_{name}" if name is not None and f"activation_{name}" in known else name
            for name in logical_axes)

    def check_known(self, logical_axes: Sequence[str | None], array: str) -> None:
        """Raises `UserError` if an axis of the array called `array` has no rule."""
        for name in logical_axes:
            if name is not None and name not in self.logical_axes:
                hint = did_you_mean(name, self.logical_axes)
                raise UserError(
                    f"{array} has a logical axis that no rule maps to the mesh",
                    got=f"{name!r} of {tuple(logical_axes)}",
                    fix=(hint + " Otherwise add" if hint else "add") + f" a rule: {RULES_IN_GIN}, "
                    f"standard_logical_axis_rules.additional_rules = (({name!r}, None),)")

    def mesh_axes(self, logical_axes: Sequence[str | None]) -> tuple[tuple[str, ...], ...]:
        """Returns, for each dimension, the mesh axes that split it (none: an empty tuple).

        A rule whose mesh axis already splits another dimension of the array is passed over, and
        the next rule for the same logical axis gets its turn. So is the second of two dimensions
        of the same name: the first one takes the axis.

        Args:
            logical_axes: one name, or None, for each dimension. Every name must have a rule.
        """
        result: list[tuple[str, ...] | None] = [None] * len(logical_axes)
        used: set[str] = set()
        for name, axes in self.rules:
            wanted = _as_tuple(axes)
            for dim, logical in enumerate(logical_axes):
                if logical == name and result[dim] is None and used.isdisjoint(wanted):
                    result[dim] = wanted
                    used.update(wanted)
        return tuple(axes or () for axes in result)

    def spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
        """Returns the `PartitionSpec` of `mesh_axes(logical_axes)`, of the array's full rank."""
        return make_spec(self.mesh_axes(logical_axes))


def make_spec(mesh_axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """Returns the `PartitionSpec` of full rank that splits each dimension over its mesh axes."""
    return PartitionSpec(*(
        axes if len(axes) > 1 else (axes[0] if axes else None) for axes in mesh_axes))


def _checked_rule(rule: object) -> tuple[str, MeshAxes]:
    if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)
            and (rule[1] is None or isinstance(rule[1], (str, tuple, list)))):
        raise UserError("a logical axis rule is a pair (logical axis, mesh axes)", got=repr(rule),
                        fix="e.g. ('embed', 'fsdp'), ('batch', ('data', 'fsdp')) or ('kv', None)")
    name, axes = rule
    axes = tuple(axes) if isinstance(axes, list) else axes
    for axis in _as_tuple(axes):
        one_of(axis, MESH_AXES, f"mesh axis in the rule for {name!r}")
    if len(set(_as_tuple(axes))) != len(_as_tuple(axes)):
        raise UserError(f"the rule for {name!r} uses a mesh axis twice", got=repr(axes),
                        fix="name each mesh axis once")
    return name, axes


def standard_logical_axis_rules(
    additional_rules: Sequence[tuple[str, MeshAxes]] = (),
    replicate_vectors: bool = True,
    allow_uneven: str = "error",
) -> LogicalAxisRules:
    """Returns the standard rules: FSDP over 'embed', Megatron over heads, hidden units and vocab.

    In a gin file: `from vishwam_t5x.parallelism import axis_rules`, then
    `train.logical_axis_rules = @axis_rules.standard_logical_axis_rules()` and bindings of these:

    Args:
        additional_rules: pairs that go before the standard ones and so override them, e.g.
            (('embed', None),) keeps parameters whole (plain data parallelism).
        replicate_vectors: as in `LogicalAxisRules`.
        allow_uneven: as in `LogicalAxisRules`.
    """
    return LogicalAxisRules(
        rules=(*additional_rules, *_STANDARD), replicate_vectors=replicate_vectors,
        allow_uneven=allow_uneven)
