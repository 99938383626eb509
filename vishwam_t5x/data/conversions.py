"""How a task's preprocessors turn files into numbers: noted as they are applied, kept in the
manifest of its cache, and held against what they would do now.

Pixels resized in another way, or a spectrogram of other bins, are other data in the same shapes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

METADATA_KEY = "conversions"
"""Of a manifest's metadata: {'FEATURE: STEP': settings}; caches of before this was kept lack it."""
DIFFERS = "was written with other settings than its preprocessors have now"
"""What is wrong with a cache that `differences` finds some in."""

_noted: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "noted", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Any]]:
    """Collects what is noted while a dataset is built: JSON values by 'FEATURE: STEP'."""
    found: dict[str, Any] = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note(step: str, feature: str, **settings: Any) -> None:
    """Notes what decides the numbers of a feature; a preprocessor says so when it is applied.

    Args:
        step: what is done, e.g. the preprocessor's name.
        feature: what becomes of it.
        settings: JSON values, NumPy's numbers, or dataclasses of them.
    """
    found = _noted.get()
    if found is None:
        return
    key, number = f"{feature}: {step}", 1
    while key in found:
        number += 1
        key = f"{feature}: {step} ({number})"
    found[key] = json.loads(json.dumps(settings, default=_plain))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept in a manifest")


def resized(records: Iterable[Mapping[str, Any] | None]) -> set[str]:
    """Returns in which ways pictures were read (`pictures.PictureConfig.resize`), by records of
    settings; but for those that are targets."""
    return {note["config"]["resize"] for record in records for key, note in (record or {}).items()
            if "target" not in key.partition(":")[0]
            and isinstance(note.get("config"), dict) and "resize" in note["config"]}


def differences(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """Returns in words what differs between two records of settings.

    What the older does not know (it was written before there was such a setting, or before any were
    kept) differs in nothing.

    Args:
        before: of a manifest; None: it has none.
        now: as `recorded` collects them.
    """
    if before is None or now is None:
        return []
    found = []
    for key, value in before.items():
        if key not in now:
            found.append(f"{key}, now not done")
        else:
            found += _differing(key, value, now[key])
    return found


def _differing(name: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [line for key in before.keys() & now.keys() if before[key] != now[key]
                for line in _differing(f"{name}.{key}", before[key], now[key])]
    return [] if before == now else [f"{name} = {before!r}, now {now!r}"]
