"""What a wheel installs, and that it runs from there."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

from helpers import ROOT, environment, run, vishwam

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_is_listed():
    """A room forgotten in pyproject.toml works in the checkout and is missing from the wheel."""
    on_disk = {path.parent.relative_to(ROOT).as_posix().replace("/", ".")
               for path in [*ROOT.glob("vishwam_t5x/**/__init__.py"),
                            *ROOT.glob("tasks/**/__init__.py")]}
    on_disk = {f"vishwam_t5x_tasks{name.removeprefix('tasks')}" if name.startswith("tasks")
               else name for name in on_disk}
    assert set(SETUPTOOLS["packages"]) == on_disk | {"vishwam_t5x.gin_files"}


def test_requirements_are_released_versions():
    extras = PROJECT["project"]["optional-dependencies"]
    every = [*PROJECT["project"]["dependencies"], *(line for lines in extras.values()
                                                   for line in lines)]
    assert not [line for line in every if "@" in line or "://" in line]
    assert {"seqio", "gcs", "cuda12", "cuda13", "tpu", "dev"} <= set(extras)
    (jax,) = [line for line in every if line.startswith("jax>")]
    assert "<" not in jax and "==" not in jax  # 0.12 must not be shut out.


def test_constraints_pin_every_requirement():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned.setdefault(_canonical(name), []).append(version)
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *extras["seqio"], *extras["dev"]]
    absent = [line for line in needed
              if _canonical(line.partition(">")[0].partition("[")[0]) not in pinned]
    assert not absent
    for name, versions in pinned.items():
        if len(versions) > 1:
            assert all("python_version" in version for version in versions), name


def test_what_is_installed_obeys_the_constraints():
    """The figures of this run are figures of the pinned versions."""
    wrong = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement, _, marker = line.partition(";")
        name, _, version = requirement.partition("==")
        older = sys.version_info < (3, 12)
        if line.startswith("#") or (marker and ('< "3.12"' in marker) != older):
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Of an extra that is not installed here.
        if name in ("jax", "flax", "optax", "orbax-checkpoint") and installed != version.strip():
            wrong.append(f"{name}: {installed}, pinned {version}")
    assert not wrong


def test_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves build/ in the folder it builds.
    source = folder / "source"
    copied = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
                            cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, copied.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = run(["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir",
                str(folder), str(source)])
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_two_top_level_names(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "vishwam_t5x", "vishwam_t5x_tasks"}
    gin_files = {path.relative_to(ROOT / "gin").as_posix() for path in ROOT.glob("gin/**/*.gin")}
    assert {name.removeprefix("vishwam_t5x/gin_files/") for name in names
            if name.endswith(".gin")} == gin_files
    modules = {name for name in names if name.endswith(".py")}
    assert "vishwam_t5x/__main__.py" in modules and "vishwam_t5x/data/tf/__init__.py" in modules


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("site")
    done = run(["-m", "pip", "install", "--no-deps", "--target", str(folder), str(wheel)])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(installed, tmp_path):
    arguments = ["-P", "-m", "vishwam_t5x", "config", "show",
                 "--gin_file=gin/recipes/quickstart_cpu.gin"]
    done = _alone(arguments, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    shown = tmp_path / "config.gin"
    shown.write_text(done.stdout)
    again = _alone([*arguments[:-1], f"--gin_file={shown}"], installed, tmp_path)
    assert again.stdout == done.stdout
    missing = _alone([*arguments[:-1], "--gin_file=gin/recipes/quickstart.gin"], installed,
                     tmp_path)
    assert missing.returncode == 2 and "gin/recipes/quickstart_cpu.gin" in missing.stderr
    assert str(ROOT) not in missing.stderr


@pytest.mark.slow
def test_the_tasks_are_found_in_the_wheel(installed, tmp_path):
    done = _alone(["-P", "-c", "import vishwam_t5x_tasks as tasks; print(tasks.__file__)"],
                  installed, tmp_path)
    assert done.stdout.startswith(str(installed)), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_trains_from_the_wheel_in_an_empty_environment(wheel, tmp_path):
    """Nothing of the checkout is in reach: another interpreter's packages, another folder."""
    venv, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    outside = environment(env={"VISHWAM_CACHE_DIR": str(tmp_path / "cache")})
    del outside["PYTHONPATH"]
    assert run(["-m", "venv", str(venv)]).returncode == 0
    done = subprocess.run([venv / "bin" / "pip", "install", "--quiet", "--constraint",
                           ROOT / "constraints.txt", f"{wheel}[seqio]"],
                          cwd=elsewhere, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [venv / "bin" / "vishwam", "train", "--gin_file=gin/recipes/quickstart_cpu.gin",
         "--gin.TRAIN_STEPS=6", "--gin.WARMUP_STEPS=2"],
        cwd=elsewhere, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stderr + done.stdout
    assert (elsewhere / "runs" / "quickstart" / "checkpoints" / "6").is_dir()


def test_help_imports_neither_jax_nor_the_verb():
    done = run(["-X", "importtime", "-m", "vishwam_t5x", "train", "--help"])
    assert done.returncode == 0 and "--gin.NAME=VALUE" in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not modules & {"jax", "gin", "vishwam_t5x.train"}


def test_every_verb_has_a_screen():
    from vishwam_t5x.__main__ import VERBS
    for verb in VERBS:
        if not (ROOT / "vishwam_t5x" / f"{verb}.py").exists():
            pytest.fail(f"there is no vishwam_t5x/{verb}.py")
        done = vishwam(verb, "--help")
        assert done.returncode == 0 and f"usage: vishwam {verb}" in done.stdout
        assert len(done.stdout.splitlines()) < 40


def _alone(arguments: list[str], installed: pathlib.Path, folder: pathlib.Path):
    """Runs Python in `folder` with the installed package before everything else."""
    return run(arguments, cwd=folder, env={"PYTHONPATH": str(installed)})


def _canonical(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")
