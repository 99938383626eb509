"""Writes plain data as YAML: what Kubernetes and SkyPilot read, without a library for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What YAML 1.1 would take for something other than a string.
_SPECIAL = re.compile(r"(?i)true|false|yes|no|on|off|y|n|null|[-+.\d].*")
_PLAIN = re.compile(r"[A-Za-z0-9_./][\w./-]*(:[\w./-]+)*")


def dump(data: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """Returns `data` as a YAML document.

    Args:
        data: mappings, lists, strings, whole numbers and booleans; a string of several lines
            becomes a literal block.
        comments: lines above it.
    """
    return "\n".join([*(f"# {line}" for line in comments), *_block(data, 0)]) + "\n"


def _block(value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    lines = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            lines += _entry(f"{pad}{_scalar(str(key))}:", item, depth)
        return lines
    for item in value:
        if isinstance(item, Mapping) and item:
            first, *rest = _block(item, depth + 1)
            lines += [f"{pad}- {first.lstrip()}", *rest]
        else:
            lines += _entry(f"{pad}-", item, depth)
    return lines


def _entry(head: str, item: Any, depth: int) -> list[str]:
    if isinstance(item, Mapping | list | tuple):
        if not item:
            return [f"{head} {'{}' if isinstance(item, Mapping) else '[]'}"]
        return [head, *_block(item, depth + 1)]
    # Of several lines, the last one ended: a literal block reads back as it was.
    if isinstance(item, str) and re.fullmatch(r"(?!\s)([^\n]+\n+)*[^\n]+\n", item):
        pad = "  " * (depth + 1)
        return [f"{head} |", *(pad + line if line else "" for line in item.rstrip().split("\n"))]
    return [f"{head} {_scalar(item)}"]


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if _PLAIN.fullmatch(value) and not _SPECIAL.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)
