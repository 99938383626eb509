"""SkyPilot: whichever cloud has the accelerator, spot with recovery where it is asked for."""

from __future__ import annotations

import shlex
from typing import Any

from vishwam_t5x.launching import accelerators, yaml_text
from vishwam_t5x.launching.installing import look, uv_install
from vishwam_t5x.launching.request import Request, check_shared_model_dir
from vishwam_t5x.launching.script import Script, command_text

_PORT = 8476
_PYTHON = '"$HOME"/vishwam-env/bin/python'


def task(request: Request) -> tuple[dict[str, Any], str]:
    """Returns the task as SkyPilot reads it, and its accelerator in words.

    Raises:
        UserError: there is no such accelerator, or MODEL_DIR would be lost.
    """
    name, nodes = request.options["accelerator"], request.number("nodes", 1)
    resources: dict[str, Any]
    if accelerators.is_tpu(name):
        tpu = accelerators.parse_tpu(name)
        request, hosts = request.with_preset(tpu.preset).with_notice(), tpu.hosts * nodes
        described, extra = tpu.describe(), "tpu"
        resources = {"accelerators": f"tpu-{tpu.cloud_name}",
                     "accelerator_args": {"runtime_version": tpu.family.runtime}}
    else:
        gpus = accelerators.parse_gpus(name)
        preset = {1: "gpu_1.gin", 2: "gpu_pair.gin", 8: "gpu_8.gin"}.get(gpus.count, "")
        if preset and (nodes == 1 or gpus.count == 8):
            request = request.with_preset(preset)
        hosts, extra = nodes, "cuda12"
        described = (f"{nodes} machine{'s' if nodes > 1 else ''} of {gpus.count} "
                     f"{name.partition(':')[0]}")
        resources = {"accelerators": f"{name.partition(':')[0]}:{gpus.count}"}
    if hosts > 1 or "spot" in request.options:
        check_shared_model_dir(request, "the machines share no disk, and a spot machine's goes "
                               "with it")
    if "zone" in request.options:
        resources["zone"] = request.options["zone"]
    if "spot" in request.options:
        resources["use_spot"] = True
    folder = f"~/{request.name}"
    mounts = {f"{folder}/{file}": file for file in request.copies}
    install = request.options.get("install", "")
    if install.endswith(".whl"):
        mounts[f"{folder}/{install.rpartition('/')[2]}"] = install
    return {
        "name": request.name,
        "resources": resources,
        **({"num_nodes": nodes} if nodes > 1 else {}),
        **({"envs": dict(request.environment)} if request.environment else {}),
        **({"file_mounts": mounts} if mounts else {}),
        "setup": f"cd \"$HOME\"\n{uv_install(install, request.name, f'seqio,{extra},gcs')}\n",
        "run": _run(request, hosts, extra == "tpu"),
    }, described


def _run(request: Request, hosts: int, tpu: bool) -> str:
    words = [_PYTHON, "-m vishwam_t5x", command_text([request.verb, *request.arguments]).replace(
        " \\\n ", "")]
    if hosts > 1 and not tpu:
        # SkyPilot says who is who; jax does not know SkyPilot.
        words += [f'--coordinator_address="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{_PORT}"',
                  '--process_count="$SKYPILOT_NUM_NODES"',
                  '--process_index="$SKYPILOT_NODE_RANK"']
    if request.verb == "train":
        ledger = ["--ledger=supervisor.jsonl"] if hosts > 1 else []
        words = [_PYTHON, "-m vishwam_t5x.launching.supervise",
                 *map(shlex.quote, [*request.supervisor_flags(hosts), *ledger]), "--", *words]
    joined = "exec " + " \\\n  ".join(words)
    join_cluster = "export VISHWAM_CLUSTER=1\n" if hosts > 1 and tpu else ""
    folder = f'"$HOME"/{request.name}'
    return f"mkdir -p {folder} && cd {folder}\n{join_cluster}{joined}\n"


def build(request: Request) -> Script:
    """Returns the script that writes the task and hands it to SkyPilot."""
    data, described = task(request)
    script = Script(f"vishwam launch --on=skypilot: {described}.")
    path = f"runs/launch/{request.name}/skypilot.yaml"
    extra = "tpu" if accelerators.is_tpu(request.options["accelerator"]) else "cuda12"
    look(script, request.options.get("install", ""), f"seqio,{extra},gcs")
    script.section("What SkyPilot is asked for.")
    script.write(path, yaml_text.dump(data))
    if "spot" in request.options:
        script.section("A managed job: when the machines are taken away it finds others, and the "
                       "run goes on.")
        script.command(["sky", "jobs", "launch", f"--name={request.name}", "--yes",
                        "--detach-run", path])
        hints = {"state": ["sky", "jobs", "queue"],
                 "log": ["sky", "jobs", "logs", "--name", request.name],
                 "stop and free the machines": ["sky", "jobs", "cancel", f"--name={request.name}"]}
    else:
        script.section("A cluster that stays until it is taken down.")
        script.command(["sky", "launch", f"--cluster={request.name}", "--yes",
                        "--detach-run", path])
        hints = {"state": ["sky", "status"], "log": ["sky", "logs", request.name],
                 "DELETE it when done, it costs money until then": ["sky", "down", request.name]}
    script.section("What to do next.")
    for what, words in hints.items():
        script.say(f"{what}: {shlex.join(words)}")
    return script
