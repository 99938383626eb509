"""Where each array lives on the mesh: parameters, optimizer state, batches and activations."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules, make_spec

_logger = logging.getLogger(__name__)
_said: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.warning(message)


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """A mesh and the rules that map logical axes to it."""

    mesh: Mesh
    rules: LogicalAxisRules


# Part of the key of jax's trace and compilation caches, unlike a plain context variable: a function
# traced without a mesh is never reused with one.
_current = jax.make_user_context(None)


@contextlib.contextmanager
def partitioning(mesh: Mesh, rules: LogicalAxisRules | None = None) -> Iterator[Partitioning]:
    """Makes `constrain` act, for what this thread traces inside the `with`.

    A jitted function called inside and outside is traced and compiled twice: stay inside for every
    call, or call the result of `.lower(...).compile()`, which may be done anywhere.

    Args:
        mesh: mesh of `make_mesh`.
        rules: logical axis rules; the standard ones by default.
    """
    here = Partitioning(mesh, rules if rules is not None else LogicalAxisRules())
    with _current(here):
        yield here


def current_partitioning() -> Partitioning | None:
    """Returns what the innermost `partitioning` of this thread was given, or None."""
    return _current.value


def axes_size(mesh: Mesh, axes: Sequence[str]) -> int:
    """Returns the number of parts into which the mesh axes together split a dimension."""
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """Pins how an activation is split over the mesh while it is computed.

    Without such pins XLA may choose to gather whole batches on every device. Does nothing outside
    `partitioning` or on one device. A dimension that its mesh axes do not divide is split over the
    leading ones that do, and this is logged once.

    Args:
        x: activation of any shape.
        logical_axes: one name (see `axis_rules`) for each dimension; None leaves that one whole.
            Names are looked up as 'activation_<name>' first.

    Raises:
        UserError: a name has no rule.
    """
    here = current_partitioning()
    if here is None or here.mesh.size == 1:
        return x
    assert len(logical_axes) == x.ndim, (logical_axes, x.shape)
    names = here.rules.for_activations(logical_axes)
    here.rules.check_known(names, f"an activation of shape {x.shape}")
    kept = []
    for name, size, axes in zip(logical_axes, x.shape, here.rules.mesh_axes(names), strict=True):
        axes = tuple(axis for axis in axes if here.mesh.shape[axis] > 1)
        fits = axes
        while size % axes_size(here.mesh, fits):
            fits = fits[:-1]
        if fits != axes:
            _log_once(f"activation axis {name!r} of size {size} is not divisible by its mesh axes "
                      f"{axes} ({axes_size(here.mesh, axes)}): split over {fits or 'none'} only")
        kept.append(fits)
    return jax.lax.with_sharding_constraint(x, NamedSharding(here.mesh, make_spec(kept)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
