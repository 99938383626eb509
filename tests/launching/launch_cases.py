"""The launches that are written down as golden files, and those that users find in launch/."""

from __future__ import annotations

import shlex

QUICKSTART = "-- train --gin_file=gin/recipes/quickstart_cpu.gin --gin.MODEL_DIR='\"{}\"'"
_LOCAL, _REMOTE = QUICKSTART.format("runs/my_run"), QUICKSTART.format("gs://my-bucket/my_run")
_CLOUD = "--project=my-project --zone=us-central2-b"
# Name of the golden file: the words after `vishwam launch`, as in a shell.
_WORDS = {
    "local": f"--on=local --python=python3 --supervise {_LOCAL}",
    "local_evaluate": "--on=local --python=python3 --env=NOTE='two words; $HOME' -- evaluate "
                      "--gin_file=gin/recipes/quickstart_cpu.gin --gin.MODEL_DIR='\"runs/a b\"'",
    "gpu": f"--on=gpu --python=python3 --devices=3 {_LOCAL}",
    "gpu_pair": f"--on=gpu-pair --python=python3 {_LOCAL}",
    "gpu_8": f"--on=gpu-8 --python=python3 {_LOCAL}",
    "slurm": f"--on=slurm --nodes=2 --partition=gpu --setup='source .venv/bin/activate' {_LOCAL}",
    "slurm_one_node": f"--on=slurm --gpus-per-node=2 --env=NCCL_DEBUG=WARN {_LOCAL}",
    "tpu_vm": f"--on=tpu-vm {_CLOUD} --accelerator=v4-8 {_LOCAL}",
    "tpu_pod": f"--on=tpu-pod {_CLOUD} --accelerator=v4-32 --spot --name=my-run {_REMOTE}",
    "tpu_pod_own_files": f"--on=tpu-pod {_CLOUD} --accelerator=v5e-16 --copy=data/words.txt "
                         "--env=NOTE=\"it's\" -- train --gin_file=my/run.gin "
                         "--gin.MODEL_DIR='\"gs://my-bucket/my_run\"'",
    "gke": f"--on=gke --accelerator=v4-32 --image=REGISTRY/vishwam:1 {_REMOTE}",
    "gke_gpu": "--on=gke --accelerator=H100:8 --nodes=2 --spot --namespace=research "
               f"--image=REGISTRY/vishwam:1 --env=NCCL_DEBUG=WARN {_REMOTE}",
    "xpk": f"--on=xpk --cluster=my-cluster {_CLOUD} --accelerator=v4-32 --image=REGISTRY/vishwam:1"
           f" {_REMOTE}",
    "xpk_gpu": f"--on=xpk --cluster=my-cluster {_CLOUD} --accelerator=H100:8 "
               f"--image=REGISTRY/vishwam:1 --spot {_REMOTE}",
    "skypilot": f"--on=skypilot --accelerator=H100:8 --nodes=2 --spot {_REMOTE}",
    "skypilot_tpu": f"--on=skypilot --accelerator=v4-8 --zone=us-central2-b {_LOCAL}",
    "docker": f"--on=docker {_LOCAL}",
    "docker_push": "--on=docker --push --extra=tpu --image=REGISTRY/vishwam:1",
    "docker_tpu": f"--on=docker --extra=tpu --install=vishwam_t5x==0.1.0 {_LOCAL}",
}
CASES = {name: shlex.split(words) for name, words in _WORDS.items()}
# Files of the user's that a case names, made in the folder it runs in.
OWN_FILES = ("my/run.gin", "data/words.txt")
# Files in launch/ that users copy: what a case writes, under the name it has there.
COPIED = {"slurm.sbatch": "slurm", "jobset.yaml": "gke", "jobset_gpu.yaml": "gke_gpu",
          "skypilot.yaml": "skypilot", "Dockerfile": "docker"}
