"""Where each array lives on the mesh: parameters, optimizer state, batches and activations."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names, path_name
from vishwam_t5x.parallelism.axis_rules import (
    RULES_IN_GIN,
    STACKING_AXES,
    LogicalAxisRules,
    make_spec,
)
from vishwam_t5x.parallelism.mesh import AnyMesh

_logger = logging.getLogger(__name__)
_said: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.warning(message)


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """A mesh and the rules that map logical axes to it."""

    mesh: AnyMesh
    rules: LogicalAxisRules


# Part of the key of jax's trace and compilation caches, unlike a plain context variable: a function
# traced without a mesh is never reused with one.
_current = jax.make_user_context(None)


@contextlib.contextmanager
def partitioning(mesh: AnyMesh, rules: LogicalAxisRules | None = None) -> Iterator[Partitioning]:
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


def current_platform() -> str:
    """Returns what this thread traces for: 'cpu', 'gpu' or 'tpu'.

    That of the mesh in `partitioning`, whose devices may be those of an ahead-of-time topology;
    otherwise that of jax's default device.
    """
    here = current_partitioning()
    if here is not None and isinstance(here.mesh, Mesh):
        return here.mesh.devices.flat[0].platform
    return jax.default_backend()


def axes_size(mesh: AnyMesh, axes: Sequence[str]) -> int:
    """Returns the number of parts into which the mesh axes together split a dimension."""
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """Pins how an activation is split over the mesh while it is computed.

    Without such pins XLA may choose to gather whole batches on every device. Does nothing outside
    `partitioning` or on one device. A dimension that its mesh axes do not divide is split over the
    leading ones that do, and this is logged once (not for a size of 1).

    An embedding table is constrained too, as ('vocab', 'embed'), before it is looked up or
    multiplied: that gathers it over 'fsdp' once. Left to itself XLA gathers it in every pass of a
    chunked loss, or gathers the looked-up vectors of the whole batch.

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
    for name, size, axes in zip(logical_axes, x.shape, _split(here.mesh, here.rules, names),
                                strict=True):
        fits = _leading_fit(here.mesh, axes, size)
        if fits != axes and size > 1:  # one row, as in initialization, cannot be split at all
            _log_once(f"activation axis {name!r} of size {size} is not divisible by its mesh axes "
                      f"{axes} ({axes_size(here.mesh, axes)}): split over {fits or 'none'} only")
        kept.append(fits)
    return jax.lax.with_sharding_constraint(x, NamedSharding(here.mesh, make_spec(kept)))


def _split(mesh: AnyMesh, rules: LogicalAxisRules, logical_axes: Sequence[str | None]
           ) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each dimension, without those of size 1: one sharding has one spelling."""
    return tuple(tuple(axis for axis in axes if mesh.shape[axis] > 1)
                 for axes in rules.mesh_axes(logical_axes))


def _leading_fit(mesh: AnyMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The longest beginning of `axes` whose devices divide `size`."""
    while size % axes_size(mesh, axes):
        axes = axes[:-1]
    return axes


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


# ------------------------------------------------------------------------------ parameters


def is_box(leaf: Any) -> bool:
    """Whether a leaf is one of Flax's boxes that carry the names of an array's dimensions."""
    return isinstance(leaf, meta.AxisMetadata)


def logical_axes_by_name(boxed: Any) -> dict[str, tuple[str | None, ...]]:
    """Returns {'/'-joined name: logical axes} of parameters in Flax boxes.

    Args:
        boxed: what `module.init` or `jax.eval_shape` of it returns, leaves made by
            `nn.with_logical_partitioning`. Scalars need no box.

    Raises:
        UserError: an array without a box, or with a number of names that is not its rank.
    """
    result: dict[str, tuple[str | None, ...]] = {}
    for name, leaf in flatten_names(boxed, is_leaf=is_box).items():
        if is_box(leaf):
            axes, rank = tuple(leaf.names), len(leaf.unbox().shape)
        else:
            axes, rank = (), len(leaf.shape)
        if len(axes) != rank:
            raise UserError(
                f"parameter {name!r} has {rank} dimensions and {len(axes)} logical axes",
                got=axes or "no logical axes",
                fix="name every dimension: nn.with_logical_partitioning(init, ('embed', 'mlp'))")
        result[name] = axes
    return result


def parameter_mesh_axes(axes: Mapping[str, Sequence[str | None]],
                        shapes: Mapping[str, tuple[int, ...]], mesh: AnyMesh,
                        rules: LogicalAxisRules | None = None
                        ) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Returns, by parameter name, the mesh axes that split each dimension.

    Args:
        axes: logical axes by parameter name.
        shapes: shapes by parameter name.
        mesh: mesh of `make_mesh`.
        rules: logical axis rules; the standard ones by default.

    Raises:
        UserError: a logical axis without a rule; or a dimension that its mesh axes do not divide,
            unless `rules.allow_uneven` is 'replicate'.
    """
    rules = rules if rules is not None else LogicalAxisRules()
    result, uneven = {}, []
    for name, shape in shapes.items():
        names = axes[name]
        rules.check_known(names, f"parameter {name!r}")
        split = list(_split(mesh, rules, names))
        own_rank = sum(axis not in STACKING_AXES for axis in names)
        if rules.replicate_vectors and own_rank <= 1:
            split = [()] * len(shape)
        for dim, size in enumerate(shape):
            if size % axes_size(mesh, split[dim]):
                if rules.allow_uneven == "error":
                    uneven.append((name, names, shape, dim, split[dim]))
                    continue
                fits = _leading_fit(mesh, split[dim], size)
                _log_once(f"parameter {name!r}: {names[dim]!r} of size {size} is not divisible by "
                          f"{split[dim]} ({axes_size(mesh, split[dim])}): split over "
                          f"{fits or 'none'} only")
                split[dim] = fits
        result[name] = tuple(split)
    if uneven:
        raise _uneven_error(mesh, uneven)
    return result


def _uneven_error(mesh: AnyMesh, uneven: list[tuple]) -> UserError:
    name, names, shape, dim, axes = uneven[0]
    size, parts = shape[dim], axes_size(mesh, axes)
    wording = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)
    below, above = size // parts * parts, (size // parts + 1) * parts
    sizes = f"{below} or {above}" if below else f"{above}"
    meshes = [d for d in range(1, parts) if size % d == 0 and parts % d == 0][-1]
    others = f"; and {len(uneven) - 1} more parameters" if len(uneven) > 1 else ""
    return UserError(
        f"parameter {name!r} cannot be split evenly over the mesh",
        got=f"shape {shape}, dimension {dim} ({names[dim]!r}) of {size} over {wording}{others}",
        fix=f"make {names[dim]!r} {sizes}; or use {meshes} instead of {parts} devices for "
            f"{' x '.join(axes)}; or {RULES_IN_GIN} with allow_uneven = 'replicate'")


def parameter_shardings(params: Any, mesh: AnyMesh, rules: LogicalAxisRules | None = None,
                        axes: Mapping[str, Sequence[str | None]] | None = None) -> Any:
    """Returns the `NamedSharding` of every parameter, in a tree like the unboxed `params`.

    Args:
        params: arrays or `ShapeDtypeStruct`s in Flax boxes; or without boxes, with `axes` given.
        mesh: mesh of `make_mesh`.
        rules: logical axis rules; the standard ones by default.
        axes: logical axes by '/'-joined parameter name, instead of the boxes.

    Raises:
        UserError: see `logical_axes_by_name` and `parameter_mesh_axes`.
    """
    axes = logical_axes_by_name(params) if axes is None else axes
    plain = meta.unbox(params)
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten_names(plain).items()}
    split = parameter_mesh_axes(axes, shapes, mesh, rules)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, make_spec(split[path_name(path)])), plain)


# --------------------------------------------------------------- state that follows parameters

_Entry = tuple[tuple[int, ...], PartitionSpec]  # a parameter's shape and how it is split


def state_shardings(state: Any, params: Any, shardings: Any, mesh: AnyMesh) -> Any:
    """Returns the `NamedSharding` of every leaf of a training or optimizer state.

    A leaf belongs to a parameter if the parameter's path is part of the leaf's own path, as in
    'opt_state/0/mu/encoder/layers_0/mlp/wi/kernel' or 'param_states/.../kernel/v_row'. It is then
    split as the parameter is: all dimensions when the shapes are equal; the dimensions that are
    left when it lacks some (factored second moments) or has them of size 1. Every other leaf is
    replicated; one that weighs more than 1 MiB is named in the log.

    Args:
        state: arrays or `ShapeDtypeStruct`s, without Flax boxes.
        params: parameters (arrays or `ShapeDtypeStruct`s), without boxes.
        shardings: `parameter_shardings` of them.
        mesh: mesh of `make_mesh`.
    """
    flat_params, flat_shardings = flatten_names(params), flatten_names(shardings)
    known = {tuple(name.split("/")): (tuple(leaf.shape), flat_shardings[name].spec)
             for name, leaf in flat_params.items()}

    def leaf_sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        shape = tuple(leaf.shape)
        if not shape:
            return replicated(mesh)
        match = _find_parameter(name.split("/"), known)
        spec = None if match is None else _follow(shape, match[0], match[1], "v_row" in name)
        if spec is None:
            size = int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
            if size > 1 << 20:
                _log_once(f"state {name!r} of shape {shape} ({size >> 20} MiB) is like no "
                          "parameter: every device holds all of it")
            return replicated(mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, state)


def _find_parameter(parts: list[str], known: Mapping[tuple[str, ...], _Entry]) -> _Entry | None:
    """The entry of the longest parameter path that is a contiguous part of `parts`."""
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length + 1):
            entry = known.get(tuple(parts[start:start + length]))
            if entry is not None:
                return entry
    return None


def _follow(shape: tuple[int, ...], parameter: tuple[int, ...], spec: PartitionSpec, last: bool
            ) -> PartitionSpec | None:
    """The spec of a leaf that mirrors or reduces a parameter, or None if it does neither.

    Where several dimensions may be the reduced one (a square kernel) it is taken to be the last if
    `last`, else the first, as optax's Adafactor has it; a wrong guess moves a vector, no number.
    """
    parts = (*spec, *(None,) * (len(parameter) - len(spec)))
    if len(shape) == len(parameter):
        if all(size in (1, whole) for size, whole in zip(shape, parameter, strict=True)):
            return PartitionSpec(*(part if size == whole else None for size, whole, part in
                                   zip(shape, parameter, parts, strict=True)))
        return None
    kept = [dims for dims in itertools.combinations(range(len(parameter)), len(shape))
            if tuple(parameter[dim] for dim in dims) == shape]
    if not kept:
        return None
    return PartitionSpec(*(parts[dim] for dim in kept[0 if last else -1]))


# ----------------------------------------------------------------------------------- batches


def batch_sharding(mesh: AnyMesh, rules: LogicalAxisRules | None = None) -> NamedSharding:
    """Returns the sharding of any batch array: rows over 'batch', other dimensions whole."""
    rules = rules if rules is not None else LogicalAxisRules()
    return NamedSharding(mesh, make_spec(_split(mesh, rules, ("batch",))))


def batch_parts(mesh: AnyMesh, rules: LogicalAxisRules | None = None) -> int:
    """Returns the number of parts into which the rows of a batch are split."""
    rules = rules if rules is not None else LogicalAxisRules()
    return axes_size(mesh, _split(mesh, rules, ("batch",))[0])


def check_batch_size(batch_size: int, mesh: AnyMesh, rules: LogicalAxisRules | None = None,
                     num_microbatches: int = 1) -> None:
    """Checks that every device gets equally many rows of every microbatch.

    Raises:
        UserError: it does not; names the nearest sizes that do.
    """
    parts = batch_parts(mesh, rules)
    unit = parts * num_microbatches
    if batch_size > 0 and batch_size % unit == 0:
        return
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    each = f" in each of {num_microbatches} microbatches" if num_microbatches > 1 else ""
    raise UserError(
        f"a batch of {batch_size} rows cannot be shared equally by {parts} "
        f"device{'s' if parts != 1 else ''}{each}",
        got=f"BATCH_SIZE = {batch_size}, mesh "
            + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        fix="BATCH_SIZE = " + (f"{below} or {above}" if below > 0 else f"{above}"))


def batch_shardings(arrays: Mapping[str, Any], mesh: AnyMesh, rules: LogicalAxisRules | None = None,
                    num_microbatches: int = 1) -> dict[str, NamedSharding]:
    """Returns the sharding of each array of a batch; the first dimension of each is its rows.

    Args:
        arrays: by key, (shape, dtype) as `BatchSpec.arrays()` has it, or anything with `.shape`.
        mesh: mesh of `make_mesh`.
        rules: logical axis rules; the standard ones by default.
        num_microbatches: parts into which the step cuts the batch.

    Raises:
        UserError: the rows cannot be shared equally.
    """
    for value in arrays.values():
        shape = value.shape if hasattr(value, "shape") else value[0]
        check_batch_size(shape[0], mesh, rules, num_microbatches)
    return dict.fromkeys(arrays, batch_sharding(mesh, rules))
