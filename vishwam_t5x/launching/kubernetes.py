"""Google Kubernetes Engine: a JobSet of our own making, or a workload of XPK."""

from __future__ import annotations

import shlex
from typing import Any

from vishwam_t5x.core.errors import EXIT_ABORTED, EXIT_PREEMPTED, UserError, did_you_mean
from vishwam_t5x.launching import accelerators, yaml_text
from vishwam_t5x.launching.request import Request, check_shared_model_dir
from vishwam_t5x.launching.script import Script, command_text

_JOB = "workers"
_PORT = 8476
_GRACE_SECONDS = 300
_RESTARTS = 100
# Saved; another process lost; killed by SIGABRT, as jax does to the others, SIGKILL or SIGTERM.
_RESUMABLE = [EXIT_PREEMPTED, EXIT_ABORTED, 134, 137, 143]


def jobset(request: Request) -> dict[str, Any]:
    """Returns the JobSet: all pods are started, and after a failure restarted, together.

    Raises:
        UserError: GKE has no such accelerator.
    """
    if accelerators.is_tpu(request.options["accelerator"]):
        hosts, selector, resources = _tpu(request)
    else:
        hosts, selector, resources = _gpu(request)
    if "spot" in request.options:
        selector = {**selector, "cloud.google.com/gke-spot": "true"}
    # Kubernetes would put a variable in the place of $(NAME).
    arguments = [word.replace("$(", "$$(") for word in request.arguments]
    if not accelerators.is_tpu(request.options["accelerator"]) and hosts > 1:
        # For TPUs GKE says who is who; for GPUs the names of the JobSet's pods do.
        arguments += [f"--coordinator_address={request.name}-{_JOB}-0-0.{request.name}:{_PORT}",
                      f"--process_count={hosts}", "--process_index=$(JOB_COMPLETION_INDEX)"]
    environment = [{"name": name, "value": value} for name, value in request.environment.items()]
    container = {
        "name": "vishwam",
        "image": request.options["image"],
        "command": ["vishwam", request.verb],
        "args": arguments,
        **({"env": environment} if environment else {}),
        "ports": [{"containerPort": _PORT}, {"containerPort": 8471}],
        "resources": {"limits": resources, "requests": resources},
    }
    pod = {
        "restartPolicy": "Never",
        # A spot machine gives 25 s; a drained one as long as it takes to save.
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "nodeSelector": selector,
        "tolerations": [{"key": key, "operator": "Exists", "effect": "NoSchedule"}
                        for key in resources],
        "containers": [container],
    }
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # A pod that went with its node has no exit code, and is not meant either.
        "podFailurePolicy": {"rules": [{
            "action": "FailJob",
            "onExitCodes": {"containerName": container["name"], "operator": "NotIn",
                            "values": _RESUMABLE}}]},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": request.name,
            **({"namespace": request.options["namespace"]}
               if "namespace" in request.options else {}),
            # One slice, one node pool: among several alike the pods must not be spread.
            **({"annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology":
                                "cloud.google.com/gke-nodepool"}}
               if hosts > 1 and "google.com/tpu" in resources else {}),
        },
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": _RESTARTS,
                # What no restart mends: a mistake of the user's, an error of the program.
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _tpu(request: Request) -> tuple[int, dict[str, str], dict[str, int]]:
    tpu = accelerators.parse_tpu(request.options["accelerator"])
    if not tpu.family.gke or tpu.chips not in tpu.family.topologies:
        raise UserError(f"no node pool of GKE is known here for {tpu.cloud_name}",
                        fix="v4, v5e, v5p and v6e slices are")
    if request.number("nodes", 1) > 1:
        raise UserError("--nodes is for GPUs: the name of a slice says how many hosts it has",
                        got=f"--nodes={request.options['nodes']}", fix="leave --nodes out")
    selector = {"cloud.google.com/gke-tpu-accelerator": tpu.family.gke,
                "cloud.google.com/gke-tpu-topology": tpu.family.topologies[tpu.chips]}
    return tpu.hosts, selector, {"google.com/tpu": tpu.chips_per_host}


def _gpu(request: Request) -> tuple[int, dict[str, str], dict[str, int]]:
    gpus = accelerators.parse_gpus(request.options["accelerator"])
    if gpus.kind not in accelerators.GKE_GPUS:
        raise UserError("no node pool of GKE is known here for this GPU", got=gpus.kind,
                        fix=did_you_mean(gpus.kind, accelerators.GKE_GPUS)
                        or f"one of: {', '.join(accelerators.GKE_GPUS)}")
    selector = {"cloud.google.com/gke-accelerator": accelerators.GKE_GPUS[gpus.kind]}
    return request.number("nodes", 1), selector, {"nvidia.com/gpu": gpus.count}


def build_gke(request: Request) -> Script:
    """Returns the script that writes the JobSet and hands it to the cluster."""
    request, described = _prepared(request)
    script = Script(f"vishwam launch --on=gke: {described}. The cluster has the JobSet controller; "
                    f"{_made(request)}")
    path = f"runs/launch/{request.name}/jobset.yaml"
    script.section("All pods restart together: a process of jax cannot join a run that goes on. "
                   "They do so after exit 75 and 76 and after a kill; another exit ends it.")
    data = jobset(request)
    script.write(path, yaml_text.dump(data))
    kubectl = ["kubectl", *([f"--context={request.options['context']}"]
                            if "context" in request.options else [])]
    space = ([f"--namespace={request.options['namespace']}"]
             if "namespace" in request.options else [])
    delete = [*kubectl, "delete", "jobset", request.name, *space]
    script.section("A JobSet cannot be changed: one of this name must be deleted first, running or "
                   "not.")
    script.lines(command_text([*kubectl, "create", f"--filename={path}"]) + " || {")
    script.say(f"if there is one of this name, delete it first: {shlex.join(delete)}")
    script.lines("exit 1\n}")
    script.section("What to do next.")
    # More pods than it follows unasked are an error.
    pods = data["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"]
    label = f"jobset.sigs.k8s.io/jobset-name={request.name}"
    for what, words in {
        "pods": [*kubectl, "get", "pods", *space, f"--selector={label}"],
        "log": [*kubectl, "logs", *space, f"--selector={label}", "--follow", "--prefix",
                f"--max-log-requests={pods}"],
        "save, stop and free the machines": delete,
    }.items():
        script.say(f"{what}: {shlex.join(words)}")
    return script


def build_xpk(request: Request) -> Script:
    """Returns the script that hands a workload to XPK."""
    request, described = _prepared(request)
    options = request.options
    tpu = accelerators.is_tpu(options["accelerator"])
    if tpu:
        kind = f"--tpu-type={accelerators.parse_tpu(options['accelerator']).cloud_name}"
        count = []
        if "nodes" in options:
            raise UserError("--nodes is for GPUs: the name of a slice says how many hosts it has",
                            fix="leave --nodes out")
    else:
        gpus = accelerators.parse_gpus(options["accelerator"])
        if request.number("nodes", 1) > 1:
            raise UserError("several GPU machines under XPK are not prepared for here",
                            got=f"--nodes={options['nodes']}", fix="--on=gke")
        kind, count = f"--device-type={accelerators.xpk_gpus(gpus)}", ["--num-nodes=1"]
    script = Script(f"vishwam launch --on=xpk: {described}, on the cluster {options['cluster']}; "
                    f"{_made(request)}")
    place = [f"--cluster={options['cluster']}", f"--project={options['project']}",
             f"--zone={options['zone']}"]
    script.section(f"XPK restarts the pods together, at most {_RESTARTS} times: after exit 75 and "
                   "76, and of its own accord after 42 and a kill.")
    script.command([
        "xpk", "workload", "create", f"--workload={request.name}", *place, kind, *count,
        f"--docker-image={options['image']}", f"--max-restarts={_RESTARTS}",
        "--restart-on-exit-codes=75,76",
        f"--termination-grace-period-seconds={_GRACE_SECONDS}",
        *(["--spot"] if "spot" in options else []),
        *(f"--env={name}={value}" for name, value in request.environment.items()),
        f"--command={shlex.join(['vishwam', request.verb, *request.arguments])}"])
    script.section("What to do next.")
    for what, words in {
        "state": ["xpk", "workload", "list", *place, f"--filter-by-job={request.name}"],
        "save, stop and free the machines": ["xpk", "workload", "delete",
                                             f"--workload={request.name}", *place],
    }.items():
        script.say(f"{what}: {shlex.join(words)}")
    return script


def _made(request: Request) -> str:
    extra = "tpu" if accelerators.is_tpu(request.options["accelerator"]) else "cuda12"
    return ("the image is made by vishwam launch --on=docker --push "
            f"--extra={extra} --image={request.options['image']}")


def _prepared(request: Request) -> tuple[Request, str]:
    """The request with its preset, checked, and the accelerator in words."""
    if not request.options["image"].strip() or " " in request.options["image"]:
        raise UserError("--image is REGISTRY/NAME:TAG", got=repr(request.options["image"]))
    check_shared_model_dir(request, "the disk of a pod goes with it")
    name = request.options["accelerator"]
    if accelerators.is_tpu(name):
        tpu = accelerators.parse_tpu(name)
        return request.with_preset(tpu.preset), tpu.describe()
    gpus = accelerators.parse_gpus(name)
    nodes = request.number("nodes", 1)
    preset = {1: "gpu_1.gin", 2: "gpu_pair.gin", 8: "gpu_8.gin"}.get(gpus.count, "")
    if preset and (nodes == 1 or gpus.count == 8):
        request = request.with_preset(preset)
    return request, f"{nodes} machine{'s' if nodes > 1 else ''} of {gpus.count} {gpus.kind.upper()}"
