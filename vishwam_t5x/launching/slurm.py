"""Slurm: a batch script that restarts the run inside its allocation, and requeues it after."""

from __future__ import annotations

import re

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.launching.request import Request
from vishwam_t5x.launching.script import Script, command_text

_HEAD = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={gpus}
{more}#SBATCH --time={time}
#SBATCH --output={name}-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
# {why}
"""
_TRAP = """
# Slurm sends TERM three minutes before the time is up, to this shell alone. It is passed on, or
# kept until there is a run to pass it to; the run saves, and `wait`, which the signal ends early,
# is called again.
run="" stop=""
trap 'if [ -n "$run" ]; then kill -TERM "$run"; else stop=1; fi' TERM
"""
_WAIT = """
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do
  code=0
  wait "$run" || code=$?
done
# 75: saved; 76: another process was lost. Both are to be gone on with; 70 is not: the supervisor
# saw no progress and gave up.
if [ "$code" -eq 75 ] || [ "$code" -eq 76 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def batch_file(request: Request) -> str:
    """Returns the sbatch script: one task a GPU on several nodes, one task for all on one."""
    nodes, gpus = request.number("nodes", 1), request.number("gpus-per-node", 8)
    if nodes == 1:
        tasks, why = 1, "One process for all GPUs of the node."
    else:
        tasks, why = gpus, "One process a GPU: jax, started by Slurm, takes the GPU of its task."
    # gpu_8 is for several nodes of eight too; for other shapes the run chooses its mesh itself.
    preset = {1: "gpu_1.gin", 2: "gpu_pair.gin", 8: "gpu_8.gin"}.get(gpus, "")
    if nodes > 1 and gpus != 8:
        preset = ""
    request = request.with_preset(preset) if preset else request
    more = "".join(f"#SBATCH --{name}={request.options[name]}\n"
                   for name in ("partition", "account") if name in request.options)
    time = request.options.get("time", "24:00:00")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise UserError("--time is a time limit of Slurm", got=repr(time), fix="e.g. 24:00:00")
    text = _HEAD.format(name=request.name, nodes=nodes, tasks=tasks, gpus=gpus, more=more,
                        time=time, why=why) + "set -uo pipefail\n"
    if setup := request.options.get("setup"):
        # The user's own words for a shell, as in any batch script.
        text += f"{setup}\n"
    hosts = nodes * tasks
    run = ["srun", "--kill-on-bad-exit=1", request.python, "-m", "vishwam_t5x", request.verb,
           *request.arguments]
    if request.verb == "train":
        run = [request.python, "-m", "vishwam_t5x.launching.supervise",
               *request.supervisor_flags(hosts), "--", *run]
    return "".join((text, _TRAP.lstrip("\n"), command_text(run, request.environment), " &\n",
                    'run=$!\n[ -z "$stop" ] || kill -TERM "$run"\n', _WAIT.lstrip("\n")))


def build(request: Request) -> Script:
    """Returns the script that writes the batch file and hands it in."""
    path = f"runs/launch/{request.name}/slurm.sbatch"
    nodes = request.number("nodes", 1)
    script = Script(f"vishwam launch --on=slurm: {nodes} node{'s' if nodes > 1 else ''} of "
                    f"{request.number('gpus-per-node', 8)} GPUs. MODEL_DIR must be on a disk that "
                    "all nodes see.")
    script.section("The supervisor restarts all processes together while the allocation lasts; "
                   "after exit 75 or 76 Slurm queues the job again, which goes on where it "
                   "stopped; not after 70, with which a supervisor gives up.")
    script.write(path, batch_file(request))
    script.command(["sbatch", path])
    script.section(f"Logs: {request.name}-JOBID.log and MODEL_DIR/supervisor.jsonl. "
                   f"Save and stop: scancel --batch --signal=TERM JOBID, then scancel JOBID "
                   "before it is started again.")
    return script
