"""Which model file of gin/models/ fits the parameters of a checkpoint."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vishwam_t5x import gin_files
from vishwam_t5x.core.errors import UserError

if TYPE_CHECKING:
    from vishwam_t5x.checkpointing.convert.t5_network import T5Network
    from vishwam_t5x.checkpointing.manifest import Leaf

_SHOWN = 4  # settings in which the nearest preset differs
# The activation is in no parameter, so a preset is not told from its twin by it.
_UNTOLD = "config.EncoderDecoderConfig.mlp_activations"


@functools.cache
def texts() -> Mapping[str, str]:
    """Returns the text of each model file of the T5 family, by the name gin knows it by."""
    root = gin_files.checkout()
    folder = root / "gin" / "models" if root else gin_files.INSTALLED / "models"
    return {f"gin/models/{path.relative_to(folder).as_posix()}": path.read_text(encoding="utf-8")
            for path in sorted(folder.glob("*/*.gin"))
            if "EncoderDecoderConfig.num_encoder_layers" in path.read_text(encoding="utf-8")}


def nearest(network: T5Network) -> tuple[str, list[str]]:
    """Returns the model file that comes nearest, and the settings in which it differs."""
    found = {name: network.differences(text) for name, text in texts().items()}
    name = min(found, key=lambda name: (len(found[name]), _distance(found[name], texts()[name])))
    lines = found[name]
    told = [line for line in lines if not (network.assumed and line.startswith(_UNTOLD)
                                           and _gated(texts()[name]) == _gated(line))]
    return name, told


def _distance(lines: Sequence[str], text: str) -> float:
    """How far numbers are from those of a model file, in powers of e; other settings count one."""
    total = 0.0
    for line in lines:
        setting, _, value = line.partition(" = ")
        theirs = re.search(rf"(?m)^{re.escape(setting)} = ([1-9]\d*)$", text)
        total += abs(math.log(int(value) / int(theirs[1]))) if (
            theirs and value.isdigit() and int(value)) else 1.0
    return total


def _gated(text: str) -> bool:
    (line,) = [line for line in text.splitlines() if line.startswith(_UNTOLD)]
    return "'linear'" in line


def advice(leaves: Mapping[str, Leaf]) -> str:
    """Returns which model file these parameters fit, in a sentence; '' if they are no T5's.

    Args:
        leaves: of a checkpoint, under our names.
    """
    from vishwam_t5x.checkpointing.convert import t5_network

    try:
        name, lines = nearest(t5_network.from_leaves(leaves))
    except UserError:
        return ""
    if not lines:
        return f"the checkpoint's shapes are those of {name}: --gin_file={name}"
    settings = "; ".join(line.removeprefix("config.") for line in lines[:_SHOWN])
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return f"the nearest model file is {name}, with {settings}{more}"
