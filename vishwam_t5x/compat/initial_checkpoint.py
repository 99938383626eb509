"""The checkpoint that a run of T5X's begins with: its step, which TRAIN_STEPS counts too.

The step is kept in MODEL_DIR: a run that goes on asks for nothing else, whatever has become of the
initial checkpoint since.
"""

from __future__ import annotations

import json
import re

from absl import logging

from vishwam_t5x.compat.t5x_utils import RestoreCheckpointConfig
from vishwam_t5x.core import storage
from vishwam_t5x.core.distributed import from_primary, is_primary, refuse_together
from vishwam_t5x.core.errors import UserError

FILE = "initial_checkpoint.json"
_NAME = re.compile(r"(?:.*/)?(?:checkpoint_|checkpoints/)(\d+)")


def steps_before(restore: RestoreCheckpointConfig | None, model_dir: str) -> int:
    """Returns the step of the checkpoint that a run begins with; 0 without one.

    Process 0 finds it out for all. It is what the checkpoint says of itself; its name counts where
    it says nothing. Only parameters are taken from it: a warning says so when the run begins.

    Args:
        restore: what the run begins with.
        model_dir: of the run.

    Raises:
        UserError: nothing is there that is known, or what MODEL_DIR says of it cannot be read.
    """
    steps: list[int] = []

    def look() -> None:
        if is_primary():
            steps.append(_steps_before(restore, model_dir))

    refuse_together("initial checkpoint", look)
    return int(from_primary("steps before the run", str(steps[0]) if steps else ""))


def _steps_before(restore: RestoreCheckpointConfig | None, model_dir: str) -> int:
    file = storage.join(storage.expanded(model_dir), FILE)
    begun = any(name.isdigit() for name in storage.names(
        storage.join(storage.expanded(model_dir), "checkpoints")))
    if begun:  # without the file: with a converted checkpoint, whose steps are the run's own
        return _read(file) if storage.exists(file) else 0
    place = restore and restore.place()
    if not place:
        storage.remove(file)  # of a try that began with one
        return 0
    step = _step_of(place)
    storage.write_text(file, json.dumps({"path": place, "step": step}) + "\n")
    logging.warning(
        "%s: only its parameters are restored. The optimizer's state, its moments and its own "
        "count of steps (Adafactor's decay), starts afresh, where T5X restores it too. To go on "
        "with it convert the checkpoint to MODEL_DIR itself: vishwam convert --from=%s --to=%s",
        place, place, model_dir)
    return step


def _step_of(place: str) -> int:
    from vishwam_t5x.checkpointing.restore import open_source

    _, step, path = open_source(place, checksums=False)
    if step is None and (named := _NAME.fullmatch(path)):
        step = int(named[1])
    return step or 0


def _read(file: str) -> int:
    try:
        return int(json.loads(storage.read_text(file))["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("what the run began with cannot be read", got=f"{file}: {error!r}",
                        fix='write {"path": …, "step": N} there, N the step of its initial '
                            "checkpoint") from error
