"""`manifest.json` of a checkpoint: what it holds and the checksum of every file of it.

It is written last, inside the temporary directory that becomes the checkpoint by being renamed:
a directory without a manifest is not a checkpoint, and one whose files differ from it is damaged.
In an object store nothing is renamed: Orbax's commit_success.txt follows the manifest, and the
checksums are the store's own, so that nothing written has to be read back.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from vishwam_t5x.core import storage

FILE_NAME = "manifest.json"
COMMITTED = "commit_success.txt"
"""What Orbax writes last of all where a folder cannot be renamed."""
_FORMAT = 1
_CHUNK = 1 << 22  # bytes read at once
_THREADS = 4  # zlib lets go of the interpreter lock

# Orbax goes on writing these after the manifest; nothing is restored from them.
_NOT_COUNTED = frozenset({FILE_NAME, "_CHECKPOINT_METADATA", COMMITTED})


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a checkpoint.

    Attributes:
        shape: its shape.
        dtype: name of its dtype, e.g. 'bfloat16'.
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was written.

    Attributes:
        path: the checkpoint's directory.
        why: which file, and what is wrong with it.
    """

    def __init__(self, path: Any, why: str) -> None:
        self.path, self.why = str(path), why
        super().__init__(f"checkpoint {path} is damaged: {why}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds.

    Attributes:
        step: training steps done.
        leaves: '/'-joined name -> shape and dtype of every array.
        files: path below the checkpoint -> (bytes, checksum): CRC-32, or in an object store the
            checksum that the store keeps, named.
        metrics: metrics given when it was saved.
        packages: version of each package that wrote it.
        created: when, ISO 8601 in UTC.
    """

    step: int
    leaves: Mapping[str, Leaf]
    files: Mapping[str, tuple[int, int | str]]
    metrics: Mapping[str, float]
    packages: Mapping[str, str]
    created: str


def describe(flat: Mapping[str, Any]) -> dict[str, Leaf]:
    """Returns shape and dtype of each array of a flat tree."""
    return {name: Leaf(tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in flat.items()}


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("vishwam_t5x", "jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def _checksum(path: epath.Path) -> tuple[int, int | str]:
    if storage.is_remote(path):
        return storage.fingerprint(path)
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _files(directory: epath.Path) -> list[str]:
    """Returns the paths below `directory`, '/'-joined, of the files that count."""
    if storage.is_remote(directory):
        return [name for name in storage.files_below(directory) if name not in _NOT_COUNTED]
    found, folders = [], [""]
    while folders:
        folder = folders.pop()
        for entry in (directory / folder if folder else directory).iterdir():
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                folders.append(name)
            elif name not in _NOT_COUNTED:
                found.append(name)
    return sorted(found)


def write(directory: epath.Path, step: int, leaves: Mapping[str, Leaf],
          metrics: Mapping[str, float]) -> Manifest:
    """Reads all files below `directory` once and writes its manifest, last and whole.

    Raises:
        OSError: it cannot be written.
    """
    names = _files(directory)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        checksums = pool.map(lambda name: _checksum(directory / name), names)
        files = dict(zip(names, checksums, strict=True))
    manifest = Manifest(step, leaves, files, dict(metrics), _versions(),
                        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    body = {
        "format": _FORMAT, "step": step, "created": manifest.created,
        "packages": manifest.packages, "metrics": manifest.metrics,
        "leaves": {name: [list(leaf.shape), leaf.dtype] for name, leaf in leaves.items()},
        "files": {name: list(entry) for name, entry in files.items()}}
    text = json.dumps({"crc32": _body_crc(body), **body}, indent=1)
    target = directory / FILE_NAME
    if storage.is_remote(directory):
        storage.write_text(target, text)
        return manifest
    with open(os.fspath(target), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _body_crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def exists(directory: epath.Path) -> bool:
    """Returns whether `directory` is a finished checkpoint."""
    if storage.is_remote(directory):
        return {FILE_NAME, COMMITTED}.issubset(storage.names(directory))
    return (directory / FILE_NAME).exists()


def read(directory: epath.Path) -> Manifest:
    """Reads the manifest of a checkpoint.

    Raises:
        DamagedCheckpoint: there is none, or it is not what was written.
    """
    try:
        content = json.loads(storage.read_text(directory / FILE_NAME))
    except FileNotFoundError:
        raise DamagedCheckpoint(directory, f"it has no {FILE_NAME}") from None
    except storage.StorageError:
        raise  # a storage that does not answer damages nothing
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(directory, f"{FILE_NAME} cannot be read ({error})") from error
    body = {key: value for key, value in content.items() if key != "crc32"} if isinstance(
        content, dict) else {}
    if not body or content.get("crc32") != _body_crc(body):
        raise DamagedCheckpoint(directory, f"{FILE_NAME} differs from what was written")
    if body["format"] != _FORMAT:
        raise DamagedCheckpoint(
            directory, f"its format is {body['format']}, this version reads {_FORMAT}")
    return Manifest(
        body["step"],
        {name: Leaf(tuple(shape), dtype) for name, (shape, dtype) in body["leaves"].items()},
        {name: (size, crc) for name, (size, crc) in body["files"].items()},
        body["metrics"], body["packages"], body["created"])


def _found(path: epath.Path, written: int | str, checksums: bool) -> tuple[int, int | str]:
    """Bytes and checksum of a file, of the kind that was written down; the latter if not wanted."""
    size, checksum = _checksum(path) if checksums or storage.is_remote(path) else (
        path.stat().length, written)
    # Copied from a store to a folder, or back: the two kinds cannot be compared, sizes can.
    comparable = isinstance(checksum, int) == isinstance(written, int) and checksums
    return size, checksum if comparable else written


def verify(directory: epath.Path, checksums: bool = True) -> Manifest:
    """Compares the files of a checkpoint with its manifest and returns that.

    Args:
        directory: the checkpoint.
        checksums: read every byte; False: only names and sizes.

    Raises:
        DamagedCheckpoint: a file is missing, shorter, longer, or has other bytes.
    """
    manifest = read(directory)

    def fault(name: str) -> str | None:
        size, crc = manifest.files[name]
        path = directory / name
        try:
            found = _found(path, crc, checksums)
        except FileNotFoundError:
            return f"file '{name}' is missing"
        except storage.StorageError:
            raise
        except OSError as error:
            return f"file '{name}' cannot be read ({error})"
        if found[0] != size:
            return f"file '{name}' has {found[0]:,} bytes, {size:,} were written"
        if found[1] != crc:
            return f"file '{name}' differs from what was written"
        return None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        faults = [why for why in pool.map(fault, manifest.files) if why]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DamagedCheckpoint(directory, faults[0] + more)
    return manifest

