"""Where caches lie in a cache directory, and which there are.

    CACHE_DIR/tasks/<task>/<split>/   records and manifest of a split (`records`)
    CACHE_DIR/mixtures/<name>.json    {"tasks": {task: rate}}
"""

from __future__ import annotations

import json
import os
import pathlib

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.records import MANIFEST_NAME, FeatureInfo, Manifest


def task_directory(cache_dir: str | os.PathLike, task: str, split: str) -> pathlib.Path:
    """Returns where a split of a task is cached."""
    return pathlib.Path(cache_dir) / "tasks" / task / split


def mixture_file(cache_dir: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns where the tasks and rates of a mixture are written down."""
    return pathlib.Path(cache_dir) / "mixtures" / f"{name}.json"


def cached_names(cache_dir: str | os.PathLike) -> list[str]:
    """Returns the names of the mixtures and tasks found in a cache directory."""
    root = pathlib.Path(cache_dir)
    mixtures = [path.stem for path in (root / "mixtures").glob("*.json")]
    tasks = [path.parent.parent.name for path in (root / "tasks").glob(f"*/*/{MANIFEST_NAME}")]
    return sorted({*mixtures, *tasks})


def read_rates(cache_dir: str | os.PathLike, name: str) -> dict[str, float] | None:
    """Returns {task: rate} of a cached mixture, {name: 1.0} of a cached task, None of neither.

    Raises:
        UserError: the mixture's file is not what `vishwam cache` writes.
    """
    path = mixture_file(cache_dir, name)
    if path.is_file():
        try:
            return {task: float(rate)
                    for task, rate in json.loads(path.read_text())["tasks"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the mixture file cannot be read: {error}", got=path,
                            fix=f"vishwam cache --task_or_mixture={name} --overwrite") from error
    if any((pathlib.Path(cache_dir) / "tasks" / name).glob(f"*/{MANIFEST_NAME}")):
        return {name: 1.0}
    return None


def available_splits(cache_dir: str | os.PathLike, task: str) -> list[str]:
    """Returns the splits of a task whose cache is finished."""
    root = pathlib.Path(cache_dir) / "tasks" / task
    return sorted(path.parent.name for path in root.glob(f"*/{MANIFEST_NAME}"))


def read_features(cache_dir: str | os.PathLike, name: str, split: str
                  ) -> dict[str, dict[str, FeatureInfo]]:
    """Returns the features of each task of a mixture, by its manifests; {} if one is missing.

    What cannot be read counts as missing: who opens the caches says what is wrong with them.
    """
    try:
        rates = read_rates(cache_dir, name) or {}
        return {task: Manifest.from_json((task_directory(cache_dir, task, split) / MANIFEST_NAME)
                                         .read_text()).features for task in rates}
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return {}
