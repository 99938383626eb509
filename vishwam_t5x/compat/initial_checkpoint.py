"""The checkpoint that a run of T5X's begins with: its step, which TRAIN_STEPS counts too."""

from __future__ import annotations

import re

from vishwam_t5x.compat.t5x_utils import RestoreCheckpointConfig

_NAME = re.compile(r"(?:.*/)?(?:checkpoint_|checkpoints/)(\d+)")


def steps_before(restore: RestoreCheckpointConfig | None) -> int:
    """Returns the step of the checkpoint that a run begins with; 0 without one.

    It is what the checkpoint says of itself; its name counts where it says nothing.

    Raises:
        UserError: nothing is there that is known.
    """
    place = restore and restore.place()
    if not place:
        return 0
    from vishwam_t5x.checkpointing.restore import open_source

    _, step, path = open_source(place, checksums=False)
    if step is None and (named := _NAME.fullmatch(path)):
        step = int(named[1])
    return step or 0
