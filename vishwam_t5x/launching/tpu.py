"""Cloud TPU: one TPU VM, or a pod slice of several hosts as a queued resource."""

from __future__ import annotations

import os
import shlex

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.launching import accelerators
from vishwam_t5x.launching.installing import look, uv_install
from vishwam_t5x.launching.request import Request, check_shared_model_dir
from vishwam_t5x.launching.script import Script, command_text

_POLL_SECONDS = 30
_EXTRAS = "seqio,tpu,gcs"
_ENVIRONMENT = '"$HOME"/vishwam-env'


def build(request: Request) -> Script:
    """Returns the script that asks for the slice, waits for it, installs and starts the run.

    Raises:
        UserError: the slice does not exist, or is of the other kind.
    """
    tpu = accelerators.parse_tpu(request.options["accelerator"])
    pod = request.place == "tpu-pod"
    if pod and tpu.hosts == 1:
        raise UserError(f"{tpu.cloud_name} is one host, not a pod", fix="--on=tpu-vm")
    if not pod and tpu.hosts > 1:
        raise UserError(f"{tpu.cloud_name} has {tpu.hosts} hosts", fix="--on=tpu-pod")
    if pod:
        check_shared_model_dir(request, "the hosts of a pod share no disk")
    elif "spot" in request.options and request.verb == "train":
        check_shared_model_dir(request, "the disk of a spot TPU VM goes with it")
    request = request.with_preset(tpu.preset).with_notice()
    script = Script(f"vishwam launch --on={request.place}: {tpu.describe()}.")
    look(script, request.options.get("install", ""), _EXTRAS)
    if pod:
        _queued_resource(script, request, tpu)
    else:
        _vm(script, request, tpu)
    _install(script, request)
    _start(script, request, tpu)
    _afterwards(script, request)
    return script


def _gcloud(request: Request, *words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", *words, f"--project={request.options['project']}",
            f"--zone={request.options['zone']}"]


def _runtime(request: Request, tpu: accelerators.Tpu) -> str:
    return request.options.get("runtime-version", tpu.family.runtime)


def _vm(script: Script, request: Request, tpu: accelerators.Tpu) -> None:
    spot = ["--spot"] if "spot" in request.options else []
    _state(script, _gcloud(request, "tpu-vm", "describe", request.name), "value(state)")
    script.section("A VM that was taken away does not come back: it is deleted and made again.")
    script.lines('case "$(state)" in\nPREEMPTED | TERMINATED)')
    script.command(_gcloud(request, "tpu-vm", "delete", request.name, "--quiet"))
    script.lines(';;\nesac\nif [ -z "$(state)" ]; then')
    script.command(_gcloud(request, "tpu-vm", "create", request.name,
                           f"--accelerator-type={tpu.cloud_name}",
                           f"--version={_runtime(request, tpu)}", *spot))
    script.lines("fi")


def _queued_resource(script: Script, request: Request, tpu: accelerators.Tpu) -> None:
    spot = ["--spot"] if "spot" in request.options else []
    _state(script, _gcloud(request, "queued-resources", "describe", request.name),
           "value(state.state)")
    script.section("A slice that was taken away does not come back: its request is deleted and "
                   "made again. One that waits or is active is kept.")
    script.lines('case "$(state)" in\nSUSPENDED | FAILED)')
    script.command(_gcloud(request, "queued-resources", "delete", request.name, "--force",
                           "--quiet"))
    script.lines(';;\nesac\nif [ -z "$(state)" ]; then')
    script.command(_gcloud(request, "queued-resources", "create", request.name,
                           f"--node-id={request.name}", f"--accelerator-type={tpu.cloud_name}",
                           f"--runtime-version={_runtime(request, tpu)}", *spot))
    script.lines("fi")
    script.section("Waits for the slice: minutes or days. Ctrl-C leaves the request in the queue; "
                   "the same command goes on waiting.")
    script.lines(f"""
        while now=$(state); [ "$now" != ACTIVE ]; do
          case "$now" in
          SUSPENDED | FAILED)
            echo "the request ended as $now; run the same command again" >&2
            exit 1
            ;;
          esac
          echo "waiting: ${{now:-no answer}}"
          sleep {_POLL_SECONDS}
        done""")


def _state(script: Script, describe: list[str], form: str) -> None:
    script.lines("state() {")
    script.command([*describe, f"--format={form}"])
    # No answer: there is none yet. What else may be wrong, `create` says.
    script.lines("} 2>/dev/null")


def _ssh(request: Request, command: str, worker: str = "all") -> list[str]:
    return _gcloud(request, "tpu-vm", "ssh", request.name, f"--worker={worker}",
                   f"--command={command}")


def _install(script: Script, request: Request) -> None:
    install = request.options.get("install", "")
    local = [install] if install.endswith(".whl") else []
    folders = {os.path.dirname(name) for name in request.copies} | {""}
    made = " ".join(shlex.quote(os.path.join(request.name, folder).rstrip("/"))
                    for folder in sorted(folders))
    script.section("Every host: a folder for the run, and the files that it needs.")
    script.command(_ssh(request, f"mkdir -p {made}"))
    for name in (*local, *request.copies):
        # A wheel must keep its name, and no other folder is needed for it.
        target = os.path.basename(name) if name in local else name
        script.command(_gcloud(request, "tpu-vm", "scp", name,
                               f"{request.name}:{request.name}/{target}", "--worker=all"))
    script.section("Every host: Python 3.12 (the image has an older one) and the package.")
    script.command(_ssh(request, uv_install(install, request.name, _EXTRAS)))


def _start(script: Script, request: Request, tpu: accelerators.Tpu) -> None:
    environment = dict(request.environment)
    if tpu.hosts > 1:
        # Where jax finds the other hosts it must be told to look: a laptop must not wait for them.
        environment = {"VISHWAM_CLUSTER": "1", **environment}
    python = f"{_ENVIRONMENT}/bin/python"
    run = command_text([request.verb, *request.arguments]).replace(" \\\n ", "")
    words = f"{python} -m vishwam_t5x {run}"
    if request.verb == "train":
        flags = " ".join(shlex.quote(word) for word in (
            *request.supervisor_flags(tpu.hosts),
            *(["--ledger=supervisor.jsonl"] if tpu.hosts > 1 else [])))
        words = f"{python} -m vishwam_t5x.launching.supervise {flags} -- {words}"
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    script.section("Every host starts the same command, under a supervisor, and goes on without "
                   "this terminal.")
    script.command(_ssh(request, "; ".join([
        f"cd {request.name} && if [ -f pid ] && kill -0 \"$(cat pid)\" 2>/dev/null",
        "then echo already running >&2", "exit 1", "fi",
        f"{variables}nohup {words} >> log.txt 2>&1 < /dev/null & echo $! > pid"])))


def _afterwards(script: Script, request: Request) -> None:
    name = request.name
    kind = "queued-resources" if request.place == "tpu-pod" else "tpu-vm"
    force = ["--force"] if request.place == "tpu-pod" else []
    script.section("What to do next.")
    hints = {
        "log of a host": _ssh(request, f"tail -n 50 -f {name}/log.txt", "0"),
        "save and stop": _ssh(request, f"kill -TERM $(cat {name}/pid)"),
        "DELETE it when done, it costs money until then": _gcloud(
            request, kind, "delete", name, *force, "--quiet"),
    }
    for what, words in hints.items():
        script.say(f"{what}: {shlex.join(words)}")
