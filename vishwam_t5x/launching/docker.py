"""Docker: an image for GPUs, TPUs or CPUs, for a run on this machine or for a registry."""

from __future__ import annotations

import os
import re

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.launching.installing import requirement
from vishwam_t5x.launching.request import Request
from vishwam_t5x.launching.script import Raw, Script

EXTRAS = ("cuda12", "cuda13", "tpu", "cpu")
# CUDA comes from jax's wheels, libtpu from its own: no vendor's image is needed.
DOCKERFILE = """\
# syntax=docker/dockerfile:1
# An image for GPUs, TPUs or CPUs. Extras: cuda12 or cuda13 for GPUs, tpu, or none of them.
#   docker build --build-arg='PACKAGE=vishwam_t5x[seqio,gcs,cuda12]' --tag=vishwam .
# PACKAGE is what pip is asked for: the released package, "vishwam_t5x[...] @ ADDRESS", or
# "./WHEEL[...]" with the wheel beside this file. CUDA comes from jax's wheels and libtpu from its
# own; a GPU's driver is the machine's, through NVIDIA's container toolkit.
FROM python:3.12-slim
ARG PACKAGE=vishwam_t5x[seqio,gcs,cuda12]
ENV PYTHONUNBUFFERED=1 EPATH_USE_TF=false
# git: for addresses that begin with git+.
RUN apt-get update \\
    && apt-get install --yes --no-install-recommends git \\
    && rm -rf /var/lib/apt/lists/*
# The folder is seen while it is built, and does not stay in the image.
RUN --mount=type=bind,target=/build cd /build && pip install --no-cache-dir "$PACKAGE"
WORKDIR /workspace
ENTRYPOINT ["vishwam"]
CMD ["doctor"]
"""


def build(request: Request) -> Script:
    """Returns the script that builds the image and runs in it, or pushes it.

    Raises:
        UserError: the extra does not exist, an image to push has no name, or MODEL_DIR lies outside
            the folder that is mounted.
    """
    extra = one_of(request.options.get("extra", "cuda12"), EXTRAS, "extra (--extra=)")
    extras = ",".join(["seqio", "gcs", *([extra] if extra != "cpu" else [])])
    folder = f"runs/launch/{request.name}"
    image = request.options.get("image", f"{request.name}:latest")
    push = "push" in request.options
    if push and "image" not in request.options:
        raise UserError("--push needs the name of the image",
                        fix="--image=REGISTRY/vishwam:TAG, which the cluster can pull")
    if not push:
        _check_model_dir(request)
    script = Script(f"vishwam launch --on=docker: an image with {extra}, for machines of the "
                    "registry's." if push else
                    f"vishwam launch --on=docker: this machine, in a container ({extra}).")
    install = request.options.get("install", "")
    script.section("The image. The folder it is built in holds what it needs and nothing else.")
    script.write(f"{folder}/Dockerfile", DOCKERFILE)
    if install.endswith(".whl"):
        script.command(["cp", install, f"{folder}/"])
    script.command(["docker", "build", f"--build-arg=PACKAGE={requirement(install, extras, '.')}",
                    f"--tag={image}", folder])
    if push:
        script.section("To the registry: log in to it first. Nothing is run.")
        script.command(["docker", "push", image])
    else:
        _run(script, request, extra, image)
    return script


def _run(script: Script, request: Request, extra: str, image: str) -> None:
    script.section("The run: this folder is /workspace, and what it writes there belongs to you. "
                   "Ctrl-C saves and stops.")
    devices = {"tpu": ["--privileged", "--net=host"], "cpu": []}.get(
        extra, ["--gpus=all", "--shm-size=8g"])
    words = ["vishwam", request.verb, *request.arguments]
    if request.verb == "train":
        words = ["python", "-m", "vishwam_t5x.launching.supervise", *request.supervisor_flags(),
                 "--", *words]
    script.lines("user=$(id -u):$(id -g)")
    script.command(
        ["docker", "run", "--rm", "--init", f"--name={request.name}", "--stop-timeout=300",
         *devices, Raw('--user="$user"'), "--env=HOME=/workspace",
         *(f"--env={name}={value}" for name, value in request.environment.items()),
         Raw('--volume="$PWD":/workspace'), f"--entrypoint={words[0]}", image, *words[1:]],
        exec_=True)


def _check_model_dir(request: Request) -> None:
    folder = request.model_dir or ""
    if os.path.isabs(folder) or re.match(r"~|(.*/)?\.\.(/|$)", folder):
        raise UserError("MODEL_DIR is outside the folder that the container sees", got=folder,
                        fix="name it from the current folder down, e.g. runs/my_run, or a bucket")

