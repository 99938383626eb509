"""Start a run on this machine's GPUs, on a cluster or in a cloud.

usage: vishwam launch --on=PLACE [options] [--dry-run] -- VERB [flags of the verb]

  --on=local      this machine as it is      --supervise
  --on=gpu        one of its GPUs            --devices=0
  --on=gpu-pair   two                        --devices=0,1
  --on=gpu-8      eight in one process       --devices=0,1,2,3,4,5,6,7
  --on=slurm      --nodes=1 --gpus-per-node=8 --partition= --account= --time=24:00:00 --setup=
  --on=tpu-vm     --project= --zone= --accelerator=v4-8 --spot --install= --copy=
                  --runtime-version=
  --on=tpu-pod    the same, for slices of several hosts: v4-32 is 16 chips on 4 hosts
  --on=gke        --accelerator=v4-32|H100:8 --image= --nodes= --spot --namespace= --context=
  --on=xpk        --cluster= --project= --zone= --accelerator= --image= --spot
  --on=skypilot   --accelerator=H100:8|v4-8 --nodes= --spot --zone= --install= --copy=
  --on=docker     --extra=cuda12|cuda13|tpu|cpu --image= --install=; with --push the image goes to
                  its registry and nothing is run

--dry-run prints the bash script that would be run, and does nothing. Everywhere: --name=NAME,
--env=NAME=VALUE, --python=PATH, --restart-on=75,76,SIGKILL,SIGTERM and --give-up-after=3 (the
supervisor's). The preset of gin/hardware/ is added, but for local and docker and unless you give
one; lines of your own gin files for MESH, PRECISION and REMAT stand all the same. Credentials are
neither read nor stored: log in with the tool of the platform first. More: launch/README.md.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vishwam_t5x.core import buckets
from vishwam_t5x.core.errors import EXIT_OK
from vishwam_t5x.launching import docker, kubernetes, local, request, skypilot, slurm, tpu
from vishwam_t5x.launching.script import Script

BUILDERS: Mapping[str, Callable[[request.Request], Script]] = {
    "local": local.build, "gpu": local.build, "gpu-pair": local.build, "gpu-8": local.build,
    "slurm": slurm.build, "tpu-vm": tpu.build, "tpu-pod": tpu.build,
    "gke": kubernetes.build_gke, "xpk": kubernetes.build_xpk, "skypilot": skypilot.build,
    "docker": docker.build,
}


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam launch ARGV`; unless it is a dry run, this process becomes the script."""
    asked = request.parse(argv)
    script = BUILDERS[asked.place](asked)
    print(script, end="")
    if asked.dry_run:
        return EXIT_OK
    check_bucket(asked)
    script.become()


def check_bucket(asked: request.Request, client: Any = None) -> None:
    """Looks whether the bucket of MODEL_DIR will do, where there is one.

    Args:
        asked: the request; a --zone says where the accelerator is.
        client: as of `core.buckets.check_bucket`; None: Google's, if its library is installed.

    Raises:
        UserError: the bucket does not exist, may not be written, or is in another region.
    """
    folder = asked.model_dir or ""
    if not folder.startswith("gs://"):
        return
    if client is None and not _installed("google.cloud.storage"):
        print(f"{folder} was not looked at: pip install 'vishwam_t5x[gcs]'", file=sys.stderr)
        return
    report = buckets.check_bucket(folder, asked.google_zone, client)
    report.raise_first()
    print(f"gs://{report.bucket}: in {report.location}, may be written", file=sys.stderr)
    for what, fix in report.advice:
        print(f"  {what}: {fix}", file=sys.stderr)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False  # A package above it is absent, or it is blocked.
