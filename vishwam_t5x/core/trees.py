"""Trees of arrays as flat dictionaries of '/'-joined names, and what they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vishwam_t5x.core.errors import UserError


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_name(path: tuple) -> str:
    """Returns the '/'-joined name of a `jax.tree_util` key path."""
    return "/".join(_key_name(key) for key in path)


def flatten_names(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Returns {'a/b/c': leaf} in the order of `jax.tree`; sequences and dataclasses too."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def unflatten_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dictionary of `{'a/b/c': leaf}`.

    Raises:
        UserError: a name is both a leaf and a branch ('a' and 'a/b').
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *branches, last = name.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise UserError("a name is both an array and a folder of arrays", got=name)
        if last in node:
            raise UserError("a name is both an array and a folder of arrays", got=name)
        node[last] = leaf
    return tree


def count_parameters(tree: Any) -> int:
    """Returns the number of scalars in the tree (arrays or `ShapeDtypeStruct`s)."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def count_bytes(tree: Any) -> int:
    """Returns the bytes of the tree's arrays, all devices together counted once."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
               for leaf in jax.tree.leaves(tree))
