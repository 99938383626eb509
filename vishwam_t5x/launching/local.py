"""This machine: as it is, or with one, two or eight of its GPUs."""

from __future__ import annotations

import re

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.launching.request import Request
from vishwam_t5x.launching.script import Script

_GPUS = {"gpu": (1, "gpu_1.gin"), "gpu-pair": (2, "gpu_pair.gin"), "gpu-8": (8, "gpu_8.gin")}


def build(request: Request) -> Script:
    """Returns the script that becomes the run, supervised if it is training."""
    if request.place == "local":
        script = Script("vishwam launch --on=local: this machine, the devices that jax finds.")
        supervised = "supervise" in request.options
        environment = dict(request.environment)
    else:
        count, preset = _GPUS[request.place]
        request = request.with_preset(preset)
        devices = _devices(request, count)
        script = Script(f"vishwam launch --on={request.place}: one process, "
                        f"{count} GPU{'s' if count > 1 else ''} of this machine ({devices}).")
        supervised = request.verb == "train"
        environment = {"CUDA_VISIBLE_DEVICES": devices, **request.environment}
    words = [request.python, "-m", "vishwam_t5x", request.verb, *request.arguments]
    if supervised:
        script.section("The supervisor restarts it after exit 75 and 76 and after a kill, and "
                       "keeps MODEL_DIR/supervisor.jsonl. Ctrl-C saves and stops.")
        words = [request.python, "-m", "vishwam_t5x.launching.supervise",
                 *request.supervisor_flags(), "--", *words]
    script.command(words, environment, exec_=True)
    return script


def _devices(request: Request, count: int) -> str:
    devices = request.options.get("devices", ",".join(map(str, range(count))))
    if not re.fullmatch(r"\d+(,\d+)*", devices) or len(set(devices.split(","))) != count:
        raise UserError(f"--devices of --on={request.place} are {count} numbers of GPUs",
                        got=repr(devices),
                        fix=f"e.g. --devices={','.join(map(str, range(count)))}; nvidia-smi -L "
                        "lists them")
    return devices
