"""Whether a resumed run reads what it read before: `MODEL_DIR/data.json`.

The configuration names a mixture; its rates are Python and its examples are files, and both may
have changed since. Then example number i is another one, and the position in the checkpoint means
nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from absl import logging

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import conversions
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.records import TaskCache
from vishwam_t5x.training.run_dir import RunDir

# What decides which example has which number, and how it is packed. Their content may differ in the
# last bit where another machine has written the cache again: said, and not refused.
_ORDER = ("rate", "records", "lengths")
_SETTINGS = conversions.METADATA_KEY  # of whatever made numbers of files: other ones, other data


def describe(examples: Any) -> dict[str, dict[str, Any]]:
    """Returns {task: its rate, number of records, hash of their lengths, hash of their content}.

    And the hash of its vocabulary, and the settings that files were converted with, if its cache
    knows them. Empty for a live stream, whose resume is
    approximate anyway.
    """
    if not isinstance(examples, Mixture):
        return {}
    found = {}
    for task, rate in zip(examples.tasks, examples.rates, strict=True):
        if isinstance(task, TaskCache):
            shards = "".join(shard.sha256 for shard in task.manifest.shards)
            found[task.name] = {
                "rate": rate, "records": task.num_records,
                "lengths": task.manifest.lengths_sha256,
                "content": hashlib.sha256(shards.encode()).hexdigest()}
            words = task.metadata.get("vocabulary")
            if isinstance(words, dict) and words.get("sha256"):
                found[task.name]["vocabulary"] = words["sha256"]
            if _SETTINGS in task.metadata:
                found[task.name][_SETTINGS] = task.metadata[_SETTINGS]
    return found


def order(examples: Any) -> dict[str, dict[str, Any]]:
    """Returns `describe` without what may differ where a cache was written on each host."""
    return {task: {name: value for name, value in facts.items() if name in (*_ORDER, _SETTINGS)}
            for task, facts in describe(examples).items()}


def check(run_dir: RunDir, examples: Any, resuming: bool) -> None:
    """Compares the examples with those of the run so far, and writes down what they are.

    In process 0 alone: of what it writes another may see nothing, or half, or what was before.

    Args:
        run_dir: of the run.
        examples: `Dataset.examples`.
        resuming: whether the run has taken steps.

    Raises:
        UserError: other tasks, rates, or records than those the run has read, or files converted
            with other settings.
    """
    now = describe(examples)
    if resuming and run_dir.data.exists():
        before = json.loads(run_dir.data.read_text())
        changes = [f"{task}: {name} {_value(before, task, name)} -> {_value(now, task, name)}"
                   for task in sorted({*before, *now}) for name in _ORDER
                   if _value(before, task, name) != _value(now, task, name)]
        changes += [f"{task}: {line}" for task in now for line in conversions.differences(
            before.get(task, {}).get(_SETTINGS), now[task].get(_SETTINGS))]
        if changes:
            raise UserError(
                "the examples are not those this run has read", got="\n       ".join(changes),
                fix=f"bring back the cache and the mixture, or, if the change is meant, remove "
                    f"{run_dir.shown(run_dir.data)}")
        for task in now:
            if (settings := before.get(task, {}).get(_SETTINGS)) is not None:
                now[task].setdefault(_SETTINGS, settings)  # an older cache must not unsay them
            if _value(before, task, "content") != now[task]["content"]:
                logging.warning("the cache of %s was written again since the run began: the same "
                                "examples in the same order, not the same bits", task)
    run_dir.write(run_dir.data, json.dumps(now, indent=1) + "\n")


def _value(tasks: dict[str, dict[str, Any]], task: str, name: str) -> Any:
    return tasks.get(task, {}).get(name, "(not there)")
