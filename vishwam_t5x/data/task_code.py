"""Which Python files decided what a cache holds, so that a cache of older code is noticed.

A task's preprocessors can be anything, so no cache can prove that it is up to date. What it can
tell is that the files that registered the task have changed since it was written.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

METADATA_KEY = "code"
"""Of a manifest's metadata: {path of a .py file: sha256 when the cache was written}."""

_logger = logging.getLogger(__name__)


def digests(modules: Iterable[types.ModuleType]) -> dict[str, str]:
    """Returns {path: sha256} of the modules' files, with all of a package for a module of one."""
    files: set[pathlib.Path] = set()
    for module in modules:
        file = getattr(module, "__file__", None)
        if file is None:
            continue
        path = pathlib.Path(file).resolve()
        files |= set(path.parent.glob("*.py")) if "." in module.__name__ else {path}
    return {str(path): _sha256(path) for path in sorted(files) if path.is_file()}


def changed(metadata: Mapping[str, Any]) -> list[str]:
    """Returns which files of a manifest's metadata are still there and hold something else now.

    A cache that was copied from another machine names files that are not here: nothing is known of
    those, and nothing is said.
    """
    then = metadata.get(METADATA_KEY)
    if not isinstance(then, dict):
        return []
    return [path for path, digest in then.items()
            if pathlib.Path(path).is_file() and _sha256(pathlib.Path(path)) != digest]


def warn_of_changes(name: str, metadatas: Iterable[Mapping[str, Any]]) -> None:
    """Logs once which files have changed since the tasks of mixture or task `name` were cached."""
    paths = list(dict.fromkeys(path for metadata in metadatas for path in changed(metadata)))
    if paths:
        _logger.warning(
            "the cache of %s is older than its code: %s changed since; what the cache holds is "
            "used. To write it again: vishwam cache --task_or_mixture=%s --overwrite",
            name, ", ".join(paths), name)


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
