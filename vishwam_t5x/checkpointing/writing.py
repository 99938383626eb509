"""One checkpoint from device memory to a committed directory; the only writer that knows Orbax."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.sharding import Mesh, NamedSharding

from vishwam_t5x.checkpointing import manifest as manifests
from vishwam_t5x.checkpointing.manifest import Leaf, Manifest
from vishwam_t5x.core.trees import unflatten_names

_TIMEOUT = 3600  # seconds a write may take before it counts as failed
_HOST = "pinned_host"


def _says_too_much(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING and "/orbax/" in record.pathname.replace("\\", "/")


@functools.cache
def quiet_orbax() -> None:
    """Keeps Orbax's forty lines of progress a save out of the log; its warnings stay."""
    absl_logging.get_absl_logger().addFilter(lambda record: not _says_too_much(record))


class _Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler, which writes our manifest just before the directory is committed."""

    def __init__(self, compress: bool, before_commit: Callable[[], None] | None) -> None:
        super().__init__(use_ocdbt=True, use_compression=compress)
        self._before_commit = before_commit
        self.manifest: Manifest | None = None
        self._content: tuple[int, dict[str, Leaf], Mapping[str, float]] | None = None

    def announce(self, step: int, leaves: dict[str, Leaf], metrics: Mapping[str, float]) -> None:
        """Says what the next save will hold."""
        self._content, self.manifest = (step, leaves, metrics), None

    def finalize(self, directory: epath.Path) -> None:
        """Called by Orbax in process 0 when all files are written and none is yet committed."""
        super().finalize(directory)
        assert self._content is not None
        if self._before_commit is not None:
            self._before_commit()
        self.manifest = manifests.write(directory, *self._content)


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.PyTreeSave):
    pass


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.PyTreeRestore):
    pass


class Writer:
    """Writes one checkpoint at a time: `begin`, then `finish`.

    `begin` may return before anything is on disk; the arrays may be donated after it all the same.
    """

    def __init__(self, compress: bool, before_commit: Callable[[], None] | None = None) -> None:
        """Writes nothing yet.

        Args:
            compress: whether arrays are compressed.
            before_commit: called in process 0 when all files of a checkpoint are written and it
                is none yet.
        """
        quiet_orbax()
        self._compress, self._before_commit = compress, before_commit
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._handler = _Handler(compress, before_commit)

    def begin(self, directory: epath.Path, step: int, flat: Mapping[str, Any],
              metrics: Mapping[str, float]) -> None:
        """Starts the write of `flat` ('/'-joined name -> array) to `directory`.

        Raises:
            OSError, ValueError: it could not even start.
        """
        if self._checkpointer is None:
            self._handler = _Handler(self._compress, self._before_commit)
            self._checkpointer = ocp.AsyncCheckpointer(
                self._handler, async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT))
        self._handler.announce(step, manifests.describe(flat), metrics)
        self._checkpointer.save(directory, args=_Save(unflatten_names(flat)))

    def finish(self) -> Manifest | None:
        """Waits until the checkpoint is committed; returns its manifest in process 0.

        Raises:
            OSError, ValueError: it was not.
        """
        assert self._checkpointer is not None
        self._checkpointer.wait_until_finished()
        return self._handler.manifest

    def reset(self) -> None:
        """Forgets a failed write, so that the next one starts with nothing of it."""
        self._checkpointer = None

    def close(self) -> None:
        """Waits for the write under way and frees Orbax's threads."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None


def can_snapshot() -> bool:
    """Whether arrays can be copied to host memory without waiting for it.

    Not with several processes: Orbax holds collectives while it starts a save, which must keep
    their place among those of the training steps, so there the save starts in the caller's thread.
    """
    return jax.process_count() == 1 and all(
        any(memory.kind == _HOST for memory in device.addressable_memories())
        for device in jax.local_devices())


def snapshot(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Starts copying the arrays to host memory and returns the copies.

    Of parts that several devices hold alike one is copied. NumPy arrays are copied at once.
    """
    parts = {name: _one_of_each(leaf) for name, leaf in flat.items() if isinstance(leaf, jax.Array)}
    copies = jax.device_put(parts, {name: leaf.sharding.with_memory_kind(_HOST)
                                    for name, leaf in parts.items()})
    return {name: copies[name] if name in copies else np.array(leaf)
            for name, leaf in flat.items()}


def _one_of_each(array: jax.Array) -> jax.Array:
    """The same array on the fewest devices that hold all of it; nothing is copied."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return array
    mesh, spec = sharding.mesh, sharding.spec
    used = {axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
    if used.issuperset(mesh.axis_names):
        return array
    devices = mesh.devices[tuple(slice(None) if axis in used else 0 for axis in mesh.axis_names)]
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    if not used - {None}:
        return by_device[np.asarray(devices).item()]
    smaller = Mesh(devices, [axis for axis in mesh.axis_names if axis in used])
    return jax.make_array_from_single_device_arrays(
        array.shape, NamedSharding(smaller, spec), [by_device[device] for device in devices.flat])
