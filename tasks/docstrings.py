"""Which package does this come from: a small real task to fine-tune a text-to-text model on.

`docstring_package`: "Return a coroutine's result ..." -> "asyncio", on the first paragraphs of the
docstrings in the Python that runs this: real text that is already on the machine. Tickets and
messages are sorted likewise. The examples depend on the Python version.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any

import seqio
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.tf.features import text_feature
from vishwam_t5x.evaluation.metrics.text import exact_match
from vishwam_t5x_tasks.quickstart import VOCABULARY, remembered

PACKAGES = {"asyncio": "asyncio", "decimal": "_pydecimal.py", "email": "email", "http": "http",
            "importlib": "importlib", "logging": "logging", "multiprocessing": "multiprocessing",
            "unittest": "unittest", "xml": "xml"}
"""Name -> file or folder in the standard library."""
SPLITS = ("train", "validation", "test")
MIN_WORDS, MAX_WORDS = 4, 32
_SHARES = (0.75, 0.85)  # up to which train, and validation


def first_paragraphs(path: pathlib.Path) -> Iterator[str]:
    """Yields the first paragraph of each docstring of a file's classes and functions.

    White space is made single; of more than MAX_WORDS words the first are taken, and fewer than
    MIN_WORDS say too little.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
            if len(words) >= MIN_WORDS:
                yield " ".join(words[:MAX_WORDS])


@functools.lru_cache
def examples() -> dict[str, dict[str, str]]:
    """Returns {split: {text: package}}; text that several packages share is in none.

    Raises:
        UserError: this Python comes without the sources of its library.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    packages: dict[str, set[str]] = {}
    for name, place in PACKAGES.items():
        path = root / place
        files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
        if not files or not all(file.exists() for file in files):
            raise UserError(f"the sources of Python's {name} are not there", got=str(path),
                            fix="use a Python that comes with its standard library's files")
        for file in files:
            for text in first_paragraphs(file):
                packages.setdefault(text, set()).add(name)
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for text in sorted(packages):
        if len(packages[text]) == 1:
            draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64
            split = SPLITS[sum(draw >= share for share in _SHARES)]
            found[split][text] = next(iter(packages[text]))
    return found


def _dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # one in-memory source: there are no files to shuffle
    found = examples()[split]
    return tf.data.Dataset.from_tensor_slices({
        "text_inputs": list(found), "text_targets": list(found.values())})


seqio.TaskRegistry.add(
    "docstring_package",
    source=seqio.FunctionDataSource(_dataset, splits=SPLITS),
    preprocessors=[functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)],
    output_features={"text_inputs": text_feature(VOCABULARY),
                     "text_targets": text_feature(VOCABULARY)},
    metric_fns=[exact_match])


def task_metadata(task_name: str) -> dict[str, Any]:
    """Returns what a cache's manifest records of the Task: its vocabulary and its metrics.

    Raises:
        UserError: it is another Task.
    """
    return remembered(task_name, ("docstring_package",))
