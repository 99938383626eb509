"""Which checkpoints of a run are to be evaluated: one, some, all, or each as it is written."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator

from absl import logging

from vishwam_t5x.core import storage
from vishwam_t5x.core.distributed import from_primary, is_primary, refuse_together
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation import restoring

ALL, WATCH = "all", "watch"


def is_several(checkpoint: str | None) -> bool:
    """Whether `--checkpoint` means more than one, so that those evaluated already are skipped."""
    return checkpoint in (ALL, WATCH) or bool(checkpoint and _steps_of(checkpoint))


def places(checkpoint: str | None, model_dir: str, skip: Callable[[int], bool],
           run_is_finished: Callable[[], bool], poll_seconds: float = 10.0,
           timeout: float | None = None) -> Iterator[str]:
    """Yields the path of each checkpoint that is to be evaluated, rising by step.

    Process 0 looks, and all processes get the same.

    Args:
        checkpoint: 'latest', a step or a path: that one. '1000,2000': these, 'all': those that are
            there now, 'watch': those too, and then each as it is written.
        model_dir: of the run.
        skip: whether a step is evaluated already.
        run_is_finished: whether no further checkpoint will come; asked in process 0.
        poll_seconds: between two looks of 'watch'.
        timeout: seconds without a new checkpoint after which 'watch' ends; None: never.

    Raises:
        UserError: there is no such checkpoint.
    """
    if not is_several(checkpoint):
        named: list[str] = []
        refuse_together("checkpoint named", lambda: named.append(
            restoring.checkpoint_place(checkpoint, model_dir)))
        yield named[0]
        return
    assert checkpoint is not None
    given = _steps_of(checkpoint)
    for step in given:
        # Refused before the first is evaluated.
        refuse_together("checkpoint named", functools.partial(
            restoring.checkpoint_place, str(step), model_dir))
    seen: set[int] = set()
    since = time.monotonic()
    while True:
        # First whether it is finished, then what is there: the last checkpoint is not missed.
        over = checkpoint != WATCH or _agreed(lambda: [int(run_is_finished())]) == [1]
        there = given or _agreed(lambda: _steps_in(model_dir))
        if checkpoint == ALL and not there:
            raise UserError(f"{model_dir} has no checkpoints", fix="give the MODEL_DIR of a run "
                            "that has saved, or --checkpoint=watch to wait for the first")
        for step in there:
            if step in seen:
                continue
            seen.add(step)
            if _agreed(functools.partial(_as_list, skip, step)) == [1]:
                logging.info("step %d is evaluated already", step)
                continue
            yield storage.join(_folder(model_dir), str(step))
            since = time.monotonic()
        waited = time.monotonic() - since
        ended = [int(over or (timeout is not None and waited >= timeout))]
        if _agreed(functools.partial(list, ended)) == [1]:
            if not over:
                logging.info("no new checkpoint for %.0f seconds", waited)
            return
        time.sleep(poll_seconds)


def is_gone(place: str) -> bool:
    """Whether a checkpoint that was there is not any more: the run's keep rules deleted it.

    Every process must ask together. In a bucket one is gone as soon as its deletion has begun.
    """
    def look() -> list[int]:
        if not storage.is_remote(place):
            return [int(not storage.exists(place))]
        return [int(int(pathlib.PurePosixPath(place).name) not in _steps_in_folder(
            storage.parent(place)))]

    return _agreed(look) == [1]


def _steps_of(checkpoint: str) -> list[int]:
    """The steps of a list like '1000,2000'; [] of anything else, a single step included."""
    parts = [part.strip() for part in checkpoint.split(",")]
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        return []
    return sorted(set(map(int, parts)))


def _folder(model_dir: str) -> str:
    return storage.join(os.path.expanduser(model_dir), "checkpoints")


def _steps_in(model_dir: str) -> list[int]:
    return _steps_in_folder(_folder(model_dir))


def _steps_in_folder(folder: str) -> list[int]:
    from vishwam_t5x.checkpointing import directory

    return directory.steps_in(directory.absolute(folder))


def _as_list(skip: Callable[[int], bool], step: int) -> list[int]:
    return [int(skip(step))]


def _agreed(look: Callable[[], list[int]]) -> list[int]:
    """What process 0 sees, on every process; what it raises, all do."""
    seen: list[int] = []
    refuse_together("checkpoints looked at",
                    lambda: seen.extend(look()) if is_primary() else None)
    return json.loads(from_primary("checkpoints to evaluate", json.dumps(seen)))
