"""`vishwam launch`: what a dry run prints, what a run does, and which mistakes are named."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import psutil
import pytest

from helpers import ROOT, environment, run, vishwam

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import regenerate
from fake_tools import calls, launched, tools
from launch_cases import CASES, COPIED
from started import started

from vishwam_t5x import launch
from vishwam_t5x.core import buckets
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.launching import accelerators, request

GOLDEN = pathlib.Path(__file__).parent / "golden"
RUN = ["--", "train", "--gin_file=gin/recipes/quickstart_cpu.gin"]
CLOUD = ["--project=p", "--zone=us-central2-b"]
BUCKET = "--gin.MODEL_DIR='gs://b/r'"


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_prints_the_golden_script(case):
    """After a change that is meant: python tests/launching/regenerate.py."""
    assert regenerate.printed(CASES[case]) == (GOLDEN / f"{case}.txt").read_text()


@pytest.mark.parametrize("case", CASES)
def test_the_script_is_bash(case):
    done = subprocess.run(["bash", "-n", str(GOLDEN / f"{case}.txt")], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("file", COPIED)
def test_the_files_in_launch_are_those_that_the_verb_writes(file):
    assert (ROOT / "launch" / file).read_text() == regenerate.written(
        (GOLDEN / f"{COPIED[file]}.txt").read_text())


def test_every_place_has_a_golden_and_a_builder():
    assert set(launch.BUILDERS) == set(request.PLACES)
    asked = {words[0].removeprefix("--on=") for words in CASES.values()}
    assert asked == set(request.PLACES)


@pytest.mark.parametrize("words, problem, fix", [
    (["--on=gpus", *RUN], "unknown place", "gpu"),
    (["--on=local"], "what to run is missing", "-- train"),
    (["--on=local", "--"], "what to run is missing", "train"),
    (["--on=local", "--", "trian"], "unknown verb", "train"),
    (["--on=local", "--spott", *RUN], "does not know '--spott'", "spot"),
    (["--on=local", "--gin_file=x", *RUN], "does not know", "after --"),
    (["--on=local", "--spot", *RUN], "--spot means nothing for --on=local", "tpu-pod"),
    (["--on=local", "--name", *RUN], "--name needs a value", "--name=VALUE"),
    (["--on=local", "--dry-run=yes", *RUN], "takes no value", "--dry-run"),
    (["--on=local", "--name=A b", *RUN], "--name is", ""),
    (["--on=local", "--restart-on=2", *RUN], "--restart-on", "75"),
    (["--on=local", "--supervise", "--give-up-after=0", *RUN], "--give-up-after", ""),
    (["--on=local", "--env=HF_TOKEN=abcdef", *RUN], "does not carry secrets", "secret store"),
    (["--on=local", "--env=a b=c", *RUN], "--env is NAME=VALUE", ""),
    (["--on=gpu-pair", "--devices=0", *RUN], "2 numbers of GPUs", "0,1"),
    (["--on=gpu", "--devices=0;reboot", *RUN], "1 numbers of GPUs", ""),
    (["--on=slurm", "--nodes=two", *RUN], "--nodes is a whole number", ""),
    (["--on=slurm", "--time=long", *RUN], "--time", "24:00:00"),
    (["--on=slurm", "--partition=a\nb", *RUN], "--partition is one word", ""),
    (["--on=tpu-pod", "--accelerator=v4-32", *RUN], "needs --project, --zone", "--zone=us-"),
    (["--on=tpu-pod", "--accelerator=v4-32", "--project=p", "--zone=us-central2", *RUN, BUCKET],
     "ends in a letter", "us-central2-b"),
    (["--on=tpu-pod", *CLOUD, "--accelerator=v4-32", *RUN], "MODEL_DIR must be in a bucket",
     "gs://"),
    (["--on=tpu-pod", *CLOUD, "--accelerator=v4-8", *RUN, BUCKET], "one host", "tpu-vm"),
    (["--on=tpu-vm", *CLOUD, "--accelerator=v4-32", *RUN], "has 4 hosts", "tpu-pod"),
    (["--on=tpu-vm", *CLOUD, "--accelerator=v4-8", "--spot", *RUN], "must be in a bucket", "gs:"),
    (["--on=tpu-vm", *CLOUD, "--accelerator=v4-12", *RUN], "TensorCores", "v4-16"),
    (["--on=tpu-vm", *CLOUD, "--accelerator=v5lite-8", *RUN], "unknown TPU", "v5litepod"),
    (["--on=tpu-vm", *CLOUD, "--accelerator=v4-8", "--copy=nothing.txt", *RUN], "names no file",
     ""),
    (["--on=tpu-vm", *CLOUD, "--accelerator=v4-8", "--install=no.whl", *RUN], "names no wheel",
     "pip wheel"),
    (["--on=tpu-vm", *CLOUD, "--accelerator=v4-8", "--install=x;y", *RUN], "--install is", "git+"),
    (["--on=gke", "--accelerator=v3-8", "--image=i", *RUN, BUCKET], "no node pool", "v4"),
    (["--on=gke", "--accelerator=h10:8", "--image=i", *RUN, BUCKET], "no node pool", "h100"),
    (["--on=gke", "--accelerator=v4-8", "--image=i", "--nodes=2", *RUN, BUCKET], "--nodes is for",
     "leave"),
    (["--on=xpk", "--cluster=c", *CLOUD, "--accelerator=H100:4", "--image=i", *RUN, BUCKET],
     "XPK has no machine", "h100:8"),
    (["--on=xpk", "--cluster=c", *CLOUD, "--accelerator=T4", "--image=i", *RUN, BUCKET],
     "XPK has no machine", "--on=gke"),
    (["--on=docker", "--push"], "needs the name of the image", "--image="),
    (["--on=skypilot", "--accelerator=H100", "--zone=a b", *RUN], "zone of the cloud", ""),
    (["--on=skypilot", "--accelerator=H100:8:1", *RUN], "KIND:COUNT", "H100:8"),
    (["--on=skypilot", "--accelerator=H100:8", "--spot", *RUN], "must be in a bucket", "gs://"),
    (["--on=docker", "--extra=cuda", *RUN], "unknown extra", "cuda12"),
    (["--on=docker", *RUN, "--gin.MODEL_DIR='/data/run'"], "outside the folder", "runs/"),
])
def test_mistakes_are_named_with_their_fix(words, problem, fix):
    with pytest.raises(UserError) as caught:
        launch.main([*words[:1], *([] if "--dry-run=yes" in words else ["--dry-run"]), *words[1:]])
    assert problem in caught.value.problem
    assert fix in (caught.value.fix or "")
    assert "abcdef" not in str(caught.value)  # A secret is not repeated.


def test_a_mistake_is_one_screen_and_exit_2():
    done = vishwam("launch", "--on=moon", *RUN)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 4 and not done.stdout


@pytest.mark.parametrize("name, chips, hosts, cloud", [
    ("v3-8", 4, 1, "v3-8"), ("v3-32", 16, 4, "v3-32"), ("v4-8", 4, 1, "v4-8"),
    ("v4-32", 16, 4, "v4-32"), ("v4-512", 256, 64, "v4-512"), ("v5e-16", 16, 4, "v5litepod-16"),
    ("v5litepod-8", 8, 1, "v5litepod-8"), ("v5p-16", 8, 2, "v5p-16"), ("v6e-1", 1, 1, "v6e-1"),
    ("tpu-v4-32", 16, 4, "v4-32"),
])
def test_what_the_names_of_slices_count(name, chips, hosts, cloud):
    tpu = accelerators.parse_tpu(name)
    assert (tpu.chips, tpu.hosts, tpu.cloud_name) == (chips, hosts, cloud)


def test_every_tpu_preset_belongs_to_a_slice():
    presets = {path.name for path in (ROOT / "gin" / "hardware").glob("tpu_*.gin")}
    found = {accelerators.Tpu(family, chips).preset for family in accelerators.FAMILIES
             for chips in family.chips}
    assert presets <= found


def test_a_preset_of_the_users_own_is_kept():
    text = regenerate.printed(["--on=gpu", *RUN, "--gin_file=gin/hardware/cpu.gin"])
    assert "gpu_1.gin" not in text and "hardware/cpu.gin" in text


def test_nothing_heavy_is_imported():
    done = run(["-X", "importtime", "-m", "vishwam_t5x", "launch", "--dry-run",
                *CASES["tpu_pod"]])
    assert done.returncode == 0, done.stderr[-2000:]
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not modules & {"jax", "numpy", "gin", "absl", "etils", "yaml"}


NASTY = ["a'b", 'c"d', "$(touch pwned)", "`touch pwned`", "; touch pwned", "x\ny", "-n", "*", "ü"]


def test_nothing_a_user_gives_is_taken_for_shell(tmp_path):
    env = tools(tmp_path, "python3")
    words = list(NASTY)
    done = run(["-m", "vishwam_t5x", "launch", "--on=local", "--python=python3", "--supervise",
                f"--env=NOTE={NASTY[2]}", "--", "train", *words], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    (call,) = calls(tmp_path)
    assert call[-len(words):] == words
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("case", ["slurm", "gke", "xpk", "skypilot", "tpu_vm", "tpu_pod", "docker",
                                  "docker_push"])
def test_a_run_calls_the_tools(case, tmp_path):
    """The tools are fakes: no cloud is ever called from here."""
    body = ("if 'describe' in sys.argv:\n"
            f"    made = 'create' in open({str(tmp_path / 'calls')!r}).read()\n"
            "    print('ACTIVE' if made else '')\n")
    env = tools(tmp_path, "gcloud", "kubectl", "xpk", "sky", "docker", "sbatch", body=body)
    done = launched(*CASES[case], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (GOLDEN / f"{case}.txt").read_text() in done.stdout  # Printed before it is done.
    # The first look for the package, where machines are to install it.
    made = [call for call in calls(tmp_path) if call[0] != "python3"]
    looked = len(calls(tmp_path)) - len(made)
    assert looked == (2 if case.startswith(("tpu", "sky")) else 0)
    if case.startswith("tpu"):
        assert sum("create" in call for call in made) == 1
        (started,) = [call for call in made if any("nohup" in word for word in call)]
        assert "--worker=all" in started
        again = launched(*CASES[case], cwd=tmp_path, env=env)
        assert again.returncode == 0
        assert sum("create" in call for call in calls(tmp_path)) == 1  # What is there is used.
    else:
        assert len(made) == (2 if case.startswith("docker") else 1)


@pytest.mark.parametrize("case", ["tpu_pod", "skypilot"])
def test_nothing_is_asked_for_that_could_not_install_the_package(case, tmp_path):
    env = tools(tmp_path)
    with (tmp_path / "bin" / "python3").open("a") as file:
        file.write("sys.exit('install' in sys.argv)\n")
    done = launched(*CASES[case], cwd=tmp_path, env=env)
    assert done.returncode == 1 and "fix: --install=WHEEL" in done.stderr
    assert {call[0] for call in calls(tmp_path)} == {"python3"}
    (asked,) = [call[-1] for call in calls(tmp_path) if "install" in call]
    assert asked.startswith("vishwam_t5x[seqio,")


def test_a_jobset_of_the_same_name_is_not_replaced(tmp_path):
    env = tools(tmp_path, body="sys.exit(1)\n")
    done = launched(*CASES["gke_gpu"], cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert done.stdout.endswith("delete it first: kubectl delete jobset vishwam "
                                "--namespace=research\n")
    assert len(calls(tmp_path)) == 1


def test_zones_of_other_clouds_and_names_of_tokenizers_are_taken():
    asked = request.parse(["--on=skypilot", "--accelerator=H100", "--zone=us-east-1a",
                           "--env=TOKENIZERS_PARALLELISM=false", *RUN, BUCKET])
    assert asked.environment and asked.google_zone is None
    assert request.parse(CASES["skypilot_tpu"]).google_zone == "us-central2-b"


def test_a_slice_that_was_taken_away_is_asked_for_again(tmp_path):
    log = str(tmp_path / "calls")
    body = ("if 'describe' in sys.argv:\n"
            f"    text = open({log!r}).read()\n"
            "    print('ACTIVE' if 'create' in text else '' if 'delete' in text "
            "else 'SUSPENDED')\n")
    env = tools(tmp_path, "gcloud", body=body)
    done = launched(*CASES["tpu_pod"], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    order = [word for call in calls(tmp_path) for word in call if word in ("delete", "create")]
    assert order == ["delete", "create"]


def test_the_remote_command_runs_in_a_shell(tmp_path):
    """What ssh would hand to the host's shell starts the training with the user's arguments."""
    env = tools(tmp_path, "gcloud", body="if 'describe' in sys.argv: print('ACTIVE')\n")
    words = ["--on=tpu-pod", *CLOUD, "--accelerator=v4-32", "--env=NOTE=$(touch pwned)", *RUN,
             BUCKET, *(f"--gin.x={word}" for word in NASTY)]
    assert launched(*words, cwd=tmp_path, env=env).returncode == 0
    (command,) = [word.removeprefix("--command=") for call in calls(tmp_path) for word in call
                  if "nohup" in word]
    (tmp_path / "calls").unlink()
    (tmp_path / "vishwam").mkdir()
    tools(tmp_path, "python")
    (tmp_path / "vishwam-env").mkdir()
    (tmp_path / "bin").rename(tmp_path / "vishwam-env" / "bin")
    subprocess.run(["bash", "-c", command + "; wait"], cwd=tmp_path, check=True,
                   env={**os.environ, "HOME": str(tmp_path)})
    (call,) = calls(tmp_path)
    assert call[-len(NASTY) - 1:-1] == [f"--gin.x={word}" for word in NASTY]
    assert call[-1] == "--gin_file=gin/hardware/tpu_v4_32.gin"
    assert not (tmp_path / "vishwam" / "pwned").exists()
    assert int((tmp_path / "vishwam" / "pid").read_text()) > 0


class Buckets:
    """A client of Google Cloud Storage that knows one bucket."""

    def __init__(self, location: str, granted: tuple[str, ...] = buckets.NEEDED) -> None:
        self.location, self.granted = location, granted

    def get_bucket(self, name, timeout):
        if name != "my-bucket":
            raise type("NotFound", (Exception,), {"code": 404})
        return self

    def test_iam_permissions(self, permissions, timeout):
        return list(self.granted)


@pytest.mark.parametrize("case, client, problem", [
    ("tpu_pod", Buckets("US-CENTRAL2"), ""),
    ("tpu_pod", Buckets("EU"), "the bucket lies in EU"),
    ("tpu_pod", Buckets("US", granted=()), "may not be used"),
    ("gke", Buckets("EU"), ""),  # Where the cluster is, nothing here says.
    ("gpu", None, ""),
])
def test_the_bucket_is_looked_at_first(case, client, problem, capsys):
    asked = request.parse(CASES[case])
    if problem:
        with pytest.raises(UserError, match=problem):
            launch.check_bucket(asked, client)
    else:
        launch.check_bucket(asked, client)
        assert ("may be written" in capsys.readouterr().err) == (client is not None)


def test_a_bucket_that_is_not_there_is_said():
    asked = request.parse([*CASES["tpu_pod"], "--gin.MODEL_DIR='gs://other/run'"])
    with pytest.raises(UserError, match="no such bucket") as caught:
        launch.check_bucket(asked, Buckets("US"))
    assert "--location=us-central2" in caught.value.fix


def test_a_whole_run_on_this_machine_is_supervised(tmp_path):
    """The real supervisor and the real trainer, which refuses a mistake: no restart."""
    done = vishwam("launch", "--on=local", "--supervise", "--", "train",
                   "--gin_file=gin/recipes/quickstart_cpu.gin", "--gin.TRAIN_STEP=3",
                   f"--gin.MODEL_DIR={shlex.quote(str(tmp_path / 'run'))!r}", cwd=tmp_path)
    assert done.returncode == 2
    assert "TRAIN_STEPS" in done.stderr and "exit 2 is a mistake" in done.stderr


def readme_commands() -> list[list[str]]:
    text = (ROOT / "launch" / "README.md").read_text()
    return [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", text, re.S)
            for line in block.splitlines()]


def test_the_commands_of_its_readme_work():
    commands = readme_commands()
    assert len(commands) >= 3
    for words in commands:
        if words[:2] == ["vishwam", "launch"]:
            assert "--dry-run" in words and launch.main(words[2:]) == 0
        else:
            done = run(words[1:])
            assert words[0] == "python" and done.returncode == 0, done.stderr


def test_its_readme_and_help_know_every_place_and_file():
    text = (ROOT / "launch" / "README.md").read_text()
    for place in request.PLACES:
        assert f"`{place}`" in text and f"--on={place} " in (launch.__doc__ or "")
    for file in (*COPIED, "colab.ipynb", "supervise.py", "quickstart.sh"):
        assert file in text and (ROOT / "launch" / file).is_file()
    for options in request.PLACES.values():
        for name in (*options[0], *options[1]):
            assert f"--{name}" in (launch.__doc__ or ""), name


@pytest.mark.slow
def test_a_killed_training_goes_on_under_the_supervisor(tmp_path, quickstart_cache):
    """The real trainer, killed once from outside: the supervisor brings it to its last step."""
    folder = tmp_path / "run"
    words = ["--on=local", "--supervise", "--", "train",
             "--gin_file=gin/recipes/quickstart_cpu.gin", f"--gin.MODEL_DIR={str(folder)!r}",
             "--gin.TRAIN_STEPS=60", "--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=4",
             "--gin.SAVE_PERIOD=5", "--gin.LOG_PERIOD=1", "--gin.train.eval_examples=8"]
    with started([sys.executable, "-m", "vishwam_t5x", "launch", *words], cwd=tmp_path,
                 env=environment(env=quickstart_cache), stdout=subprocess.DEVNULL) as process:
        process.until_said("\nstep 10/", seconds=300)
        (trainer,) = psutil.Process(process.process.pid).children()
        assert "train" in trainer.cmdline()
        trainer.kill()
        assert process.wait(seconds=300) == 0, process.said[-4000:]
    records = [json.loads(line) for line in (folder / "supervisor.jsonl").read_text().splitlines()]
    assert [record["ended_by"] for record in records] == ["SIGKILL", "0"]
    assert records[0]["step"] < 60 and records[1]["step"] == 60
