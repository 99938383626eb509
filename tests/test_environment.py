"""launch/environment.sh on a project of its own: it installs once, and again when it must."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import ROOT

# A build backend without requirements, so that pip needs no network; it counts its runs.
BACKEND = '''
import pathlib, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with open("built.log", "a") as log:
        log.write("built\\n")
    name = "small-1.0-py3-none-any.whl"
    files = {"small.py": "", "small-1.0.dist-info/METADATA":
             "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\n"
             "Provides-Extra: seqio\\nProvides-Extra: dev\\n",
             "small-1.0.dist-info/WHEEL":
             "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}
    record = "small-1.0.dist-info/RECORD"
    files[record] = "".join(f"{file},,\\n" for file in [*files, record])
    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return name
'''
PROJECT = '''
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "small"
version = "1.0"
optional-dependencies = {seqio = [], dev = []}
'''
CALL = 'set -euo pipefail; source "$SCRIPT"; prepare_environment "$PWD" "$@"; ' \
    'echo "python=$PYTHON"; echo "rest=${ARGUMENTS[*]-}"; "$PYTHON" -c "import small"'


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "constraints.txt").write_text("")
    return folder


def prepare(project, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["bash", "-c", CALL, "bash", *arguments], cwd=project, capture_output=True, text=True,
        env=environment | {"SCRIPT": str(ROOT / "launch" / "environment.sh")}, check=False)


def builds(project) -> int:
    log = project / "built.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_installs_once_and_again_when_the_pins_change(project):
    python = f"--python={sys.executable}"
    first = prepare(project, python, "-k", "a b")
    assert first.returncode == 0, first.stderr
    version = "{}.{}".format(*sys.version_info)
    assert f"python={project}/.venv-{version}/bin/python" in first.stdout
    assert "rest=-k a b" in first.stdout and "preparing" in first.stdout
    assert builds(project) == 1
    second = prepare(project, python)
    assert second.returncode == 0 and "preparing" not in second.stdout and builds(project) == 1
    (project / "constraints.txt").write_text("six==1.17.0\n")
    assert "preparing" in prepare(project, python).stdout
    assert builds(project) == 2


@pytest.mark.slow
def test_an_install_that_failed_is_tried_again(project):
    good = (project / "backend.py").read_text()
    (project / "backend.py").write_text("raise RuntimeError('no such thing')\n")
    failed = prepare(project)
    assert failed.returncode != 0 and "python=" not in failed.stdout
    assert "no such thing" in failed.stderr
    (project / "backend.py").write_text(good)
    done = prepare(project)
    assert done.returncode == 0, done.stderr
    assert f"python={project}/.venv/bin/python" in done.stdout


@pytest.mark.parametrize("name", ["python2.7", "no-such-python"])
def test_a_python_that_will_not_do(project, name):
    done = prepare(project, f"--python={name}")
    assert done.returncode == 2 and f"{name} is not a Python 3.11 or newer" in done.stderr
    assert "fix:" in done.stderr and not list(project.glob(".venv*"))


@pytest.mark.parametrize("script", ["tests/run.sh", "launch/quickstart.sh", ".ci/run"])
def test_scripts_are_bash_and_share_the_environment(script):
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / script)], check=False).returncode == 0
    assert "launch/environment.sh" in text or "tests/run.sh" in text
