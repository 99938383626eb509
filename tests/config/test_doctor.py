"""The doctor finds what is wrong and changes nothing."""

from __future__ import annotations

import json

import pytest

from helpers import vishwam
from vishwam_t5x import doctor


def findings(done) -> dict[str, dict]:
    return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_a_healthy_machine(tmp_path):
    cache = tmp_path / "not" / "yet" / "there"
    done = vishwam("doctor", "--json", devices=2, env={"VISHWAM_CACHE_DIR": str(cache)})
    found = findings(done)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["healthy"] is True
    assert found["devices"]["value"] == "cpu: 2 x cpu"
    assert found["EPATH_USE_TF"]["status"] == "ok"
    assert str(cache) in found["cache"]["value"] and not cache.parent.exists()
    for name in ("jax", "flax", "gin-config", "seqio"):
        assert found[name]["value"]


def test_a_flag_that_xla_does_not_know_is_named():
    done = vishwam("doctor", env={"XLA_FLAGS": "--xla_no_such_flag=1"})
    assert done.returncode == 2
    assert "! XLA_FLAGS" in done.stdout and "--xla_no_such_flag" in done.stdout
    assert "fix: take it out" in done.stdout


def test_a_backend_that_does_not_start(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nosuch")
    (found,) = [one for one in doctor.examine() if one.status == doctor.PROBLEM]
    assert found.name == "jax" and "nosuch" in found.value and found.fix


def test_a_folder_called_gin_with_python_in_it(tmp_path):
    (tmp_path / "gin").mkdir()
    (tmp_path / "gin" / "__init__.py").write_text("")
    done = vishwam("doctor", "--json", cwd=tmp_path)
    found = findings(done)
    assert done.returncode == 2
    assert found["gin/__init__.py"]["status"] == "problem"


def test_a_cache_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    finding = doctor._writable(blocked / "cache")
    assert finding.status == doctor.PROBLEM and "VISHWAM_CACHE_DIR" in finding.fix


@pytest.mark.parametrize("free", [3, 300])
def test_little_space_is_told(monkeypatch, tmp_path, free):
    monkeypatch.setattr(doctor.shutil, "disk_usage",
                        lambda path: type("Usage", (), {"free": free * 2**30}))
    finding = doctor._writable(tmp_path)
    assert (finding.status == doctor.ADVICE) == (free < 10) and f"{free} GiB" in finding.value


def test_a_missing_requirement_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "_NEEDED", ("no-such-package-of-ours",))
    problems = [one for one in doctor._versions() if one.status == doctor.PROBLEM]
    assert [one.fix for one in problems] == ["pip install no-such-package-of-ours"]


def test_every_requirement_is_looked_at():
    import tomllib

    from helpers import ROOT
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {line.partition(">")[0].partition("[")[0].lower()
                for line in project["dependencies"]}
    assert required - {"absl-py", "etils"} <= {name.lower() for name in doctor._NEEDED}
