"""The preset of the hardware: it changes what a recipe includes, not what the user wrote down."""

from __future__ import annotations

import contextlib
import io
import pathlib
import shlex

import pytest

from helpers import vishwam
from vishwam_t5x import launch
from vishwam_t5x.launching import presets, request
from vishwam_t5x.planning.program import Choice
from vishwam_t5x.training import maintenance

RECIPE = "gin/recipes/quickstart_cpu.gin"
HEAD = f"from __gin__ import dynamic_registration\ninclude '{RECIPE}'\n"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def verb_arguments(*words: str) -> list[str]:
    """The arguments of the training in what a launch on this machine would run."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        launch.main(["--dry-run", "--python=python3", *words])
    command = shlex.split(text.getvalue().replace("\\\n", " "), comments=True)
    return command[command.index("train") + 1:]


def test_lines_of_a_plan_are_what_the_launched_run_sees(tmp_path):
    """`vishwam plan --search` says: paste at the end of your recipe."""
    pasted = Choice((1, 2, 4, 1), "full", 2).gin_lines()
    pathlib.Path("own.gin").write_text(HEAD + "\n".join(pasted) + "\n")
    arguments = verb_arguments("--on=gpu-8", "--", "train", "--gin_file=own.gin")
    assert arguments[-1] == "--gin_file=gin/hardware/gpu_8.gin"
    shown = vishwam("config", "show", "--flat", *arguments, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    values = dict(line.split(" = ", 1) for line in shown.stdout.splitlines() if " = " in line)
    mesh = {key.rpartition(".")[2]: value for key, value in values.items() if "MeshConfig." in key}
    assert mesh == {"replica": "1", "data": "2", "fsdp": "4", "tensor": "1"}
    assert values["REMAT"] == "'full'" and values["NUM_MICROBATCHES"] == "2"
    assert values["PRECISION"] == "'auto'"  # The preset's: the recipe's is a CPU's.


def own(text: str, **files: str) -> dict[str, str]:
    pathlib.Path("own.gin").write_text(text)
    for name, other in files.items():
        pathlib.Path(f"{name}.gin").write_text(other)
    return presets.read(["own.gin"]).own


def test_what_counts_as_the_users_own_word():
    assert own(f"include '{RECIPE}'\n") == {}
    assert own(HEAD + "REMAT = 'full'  # less memory\n") == {"REMAT": "'full'"}
    # What follows binds it anew.
    assert own(f"REMAT = 'full'\ninclude \"{RECIPE}\"\n") == {}
    assert own("REMAT = 'full'\ninclude 'gin/optimizers/adamw.gin'\n") == {"REMAT": "'full'"}
    assert own("mesh.MeshConfig:\n  fsdp = 4\n  # the rest\n  data = 2\nREMAT = 'none'\n") == {
        "mesh.MeshConfig.fsdp": "4", "mesh.MeshConfig.data": "2", "REMAT": "'none'"}
    assert own("include 'other.gin'\n", other="PRECISION = 'float32'\n") == {
        "PRECISION": "'float32'"}
    assert own("include 'own.gin'\ninclude 'nothing.gin'\n# MESH = None\n") == {}


def test_a_mesh_of_the_users_own_kind_is_said_again_and_the_usual_one_need_not_be():
    pathlib.Path("own.gin").write_text(HEAD + "MESH = None\n")
    assert "--gin.MESH=None" in verb_arguments("--on=gpu", "--", "train", "--gin_file", "own.gin")
    pathlib.Path("own.gin").write_text(HEAD + "MESH = @mesh.MeshConfig()\n")
    assert not [word for word in verb_arguments("--on=gpu", "--", "train", "--gin_file=own.gin")
                if "MESH" in word]


def test_flags_win_over_the_users_file():
    pathlib.Path("own.gin").write_text(HEAD + "REMAT = 'full'\n")
    arguments = verb_arguments("--on=gpu", "--", "train", "--gin_file=own.gin",
                               "--gin.REMAT='none'")
    assert [word for word in arguments if "REMAT" in word] == [
        "--gin.REMAT='full'", "--gin.REMAT='none'"]


def tpu(verb: str, text: str) -> request.Request:
    pathlib.Path("own.gin").write_text(text)
    return request.parse(["--on=tpu-vm", "--project=p", "--zone=us-central2-b",
                          "--accelerator=v4-8", "--", verb, "--gin_file=own.gin"]).with_notice()


def test_cloud_tpus_ask_whether_they_will_be_taken_away(tmp_path):
    assert request.METADATA_SERVER == maintenance.SERVER
    asked = tpu("train", HEAD)
    (flag,) = [word for word in asked.arguments if "metadata_server" in word]
    shown = vishwam("config", "show", "--flat", *asked.arguments, cwd=tmp_path)
    assert shown.returncode == 0 and f"metadata_server = '{maintenance.SERVER}'" in shown.stdout
    assert flag == asked.arguments[0]
    # Where nothing would read it, where it is said already, and where nothing trains.
    for verb, text in (("train", "MESH = None\n"), ("evaluate", HEAD),
                       ("train", HEAD + "watchdog.WatchdogConfig.metadata_server = None\n")):
        assert tpu(verb, text).arguments == ("--gin_file=own.gin",)


def test_a_recipe_for_the_same_hardware_keeps_what_it_changes_of_it():
    recipe = "--gin_file=gin/recipes/unified_io2/large_one_gpu.gin"
    assert verb_arguments("--on=gpu", "--", "train", recipe) == [recipe]
    assert verb_arguments("--on=gpu-8", "--", "train", recipe)[-1] == (
        "--gin_file=gin/hardware/gpu_8.gin")
