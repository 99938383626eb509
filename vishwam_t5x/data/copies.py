"""Caches in an object store: written and read in a folder of this machine, copied there and back.

ArrayRecord reads plain files at random, many times over, so a host copies the splits it reads once,
checks them against the manifest's hashes, and keeps them for the next run. A split in the store is
whole once its manifest is there, which is written last. What a task has fitted beside its cache (a
vocabulary) travels with it: paths of such files are written as `$CACHE_DIR/...` in the store.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import Resumable, UserError
from vishwam_t5x.data import directory as cache_directory
from vishwam_t5x.data import records

SPLITS = ("train", "validation", "test")
"""Looked for in the store when no split is named."""

_HERE = "$CACHE_DIR/"
_THREADS = 8  # files copied at a time
_TRIES = 3  # to copy a split that is written again meanwhile

_logger = logging.getLogger(__name__)


def default_base() -> pathlib.Path:
    """Returns the folder of caches on this machine: $VISHWAM_CACHE_DIR or ~/.cache/vishwam_t5x."""
    given = os.environ.get("VISHWAM_CACHE_DIR")
    return (pathlib.Path(given).expanduser() if given and not storage.is_remote(given)
            else pathlib.Path.home() / ".cache" / "vishwam_t5x")


@functools.lru_cache
def folder_of(cache_dir: str) -> str:
    """Returns the folder on this machine in which a cache directory is read and written.

    Args:
        cache_dir: a folder, which is returned, or one in an object store, which has its copy in
            the folder of caches. The first answer holds for the process.
    """
    if not storage.is_remote(cache_dir):
        return str(pathlib.Path(cache_dir).expanduser())
    scheme, rest = cache_dir.rstrip("/").split("://", 1)
    return str(default_base() / "copies" / scheme / rest)


@functools.cache
def _pulled() -> set[tuple[str, str, str]]:
    return set()


def pull(cache_dir: str, name: str, split: str) -> None:
    """Copies what an object store has of a split of a mixture or task, if it is not here already.

    Does nothing for a cache directory that is a folder.

    Args:
        cache_dir: in the object store.
        name: of a mixture or task.
        split: of its tasks.

    Raises:
        UserError: the files there are not those of the manifest.
        Resumable: they are being written again.
        OSError: the store or the disk fails.
    """
    if not storage.is_remote(cache_dir) or (cache_dir, name, split) in _pulled():
        return
    here = folder_of(cache_dir)
    mixture = storage.join(cache_dir, "mixtures", f"{name}.json")
    if storage.is_file(mixture):
        storage.download(mixture, cache_directory.mixture_file(here, name))
    tasks = cache_directory.read_rates(here, name) or {name: 1.0}
    found = [_pull_split(cache_dir, here, task, split) for task in tasks]
    if all(found):
        _pulled().add((cache_dir, name, split))


def _pull_split(cache_dir: str, here: str, task: str, split: str) -> bool:
    source = storage.join(cache_dir, "tasks", task, split)
    text, tries = _manifest(source), 1
    while text is not None:
        try:
            _copy_split(cache_dir, here, task, split, text)
            return True
        except storage.StorageError:
            raise
        except (UserError, FileNotFoundError):
            latest = _manifest(source)
            if latest == text:
                raise
            if latest is None or tries == _TRIES:
                raise Resumable(f"{source} is being written again: start anew when that is done"
                                ) from None
            text, tries = latest, tries + 1
    return False


def _manifest(source: str) -> str | None:
    try:
        return storage.read_text(storage.join(source, records.MANIFEST_NAME))
    except FileNotFoundError:
        return None


def _copy_split(cache_dir: str, here: str, task: str, split: str, text: str) -> None:
    source = storage.join(cache_dir, "tasks", task, split)
    target = cache_directory.task_directory(here, task, split)
    text = text.replace(_HERE, json.dumps(f"{here}/")[1:-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f"{split}.lock")):
        path = target / records.MANIFEST_NAME
        if path.is_file() and path.read_text() == text:
            return
        manifest = records.Manifest.from_json(text)
        size = sum(shard.num_bytes for shard in manifest.shards)
        _logger.info("copying %s (%.1f MB) to %s", source, size / 1e6, target)
        wanted = {shard.file: shard.sha256 for shard in manifest.shards}
        wanted[records.LENGTHS_NAME] = manifest.lengths_sha256
        new = target.with_name(f"{split}.copy")
        shutil.rmtree(new, ignore_errors=True)
        _each(lambda file: _pull_file(storage.join(source, file), new / file, wanted[file]), wanted)
        for file in _beside(manifest.metadata, f"{here}/"):
            folder = os.path.dirname(file)
            for other in storage.names(storage.join(cache_dir, folder)):
                storage.download(storage.join(cache_dir, folder, other),
                                 pathlib.Path(here) / folder / other)
        (new / records.MANIFEST_NAME).write_text(text)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(new, target)


def _pull_file(source: str, target: pathlib.Path, sha256: str) -> None:
    try:
        storage.download(source, target)
        found = records.file_sha256(target)
    except FileNotFoundError:
        found = "not there"
    if found != sha256:
        raise UserError("the cache in the object store is not what its manifest says",
                        got=f"{source}: sha256 {found[:12]}, {sha256[:12]} was written",
                        fix="write it again: vishwam cache --overwrite")


def push(cache_dir: str, name: str, result: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Copies splits that were written here to the object store, each whole or not at all.

    Args:
        cache_dir: in the object store.
        name: of the mixture or task.
        result: {task: {split: {'written': whether just now}}}, what is to be there.

    Raises:
        OSError: the store fails.
    """
    here = folder_of(cache_dir)
    for task, splits in result.items():
        for split, facts in splits.items():
            _push_split(cache_dir, here, task, split, facts["written"])
    mixture = cache_directory.mixture_file(here, name)
    if mixture.is_file():
        storage.upload(mixture, storage.join(cache_dir, "mixtures", f"{name}.json"))


def _push_split(cache_dir: str, here: str, task: str, split: str, written: bool) -> None:
    source = cache_directory.task_directory(here, task, split)
    target = storage.join(cache_dir, "tasks", task, split)
    local_text = (source / records.MANIFEST_NAME).read_text()
    text = local_text.replace(json.dumps(f"{here}/")[1:-1], _HERE)
    there = storage.join(target, records.MANIFEST_NAME)
    with contextlib.suppress(FileNotFoundError):
        if storage.read_text(there) == text or not written:
            return
    _logger.info("copying %s to %s", source, target)
    storage.remove(there)
    manifest = records.Manifest.from_json(local_text)
    files = [*(shard.file for shard in manifest.shards), records.LENGTHS_NAME]
    _each(lambda file: storage.upload(source / file, storage.join(target, file)), files)
    for file in _beside(manifest.metadata, f"{here}/"):
        folder = pathlib.Path(here, file).parent
        for path in sorted(folder.iterdir()):
            storage.upload(path, storage.join(cache_dir, os.path.dirname(file), path.name))
    storage.write_text(there, text)


def _beside(metadata: Any, prefix: str) -> list[str]:
    """Paths below a cache directory that a manifest's metadata names, relative to it."""
    if isinstance(metadata, str):
        return [metadata.removeprefix(prefix)] if metadata.startswith(prefix) else []
    values = (list(metadata.values()) if isinstance(metadata, dict)
              else metadata if isinstance(metadata, list | tuple) else [])
    return sorted({path for value in values for path in _beside(value, prefix)})


def _each(call: Any, files: Any) -> None:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(call, files))


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
