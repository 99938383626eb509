"""What the launchers write, held against the schemas of those that read it."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from helpers import ROOT

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from launch_cases import CASES

from vishwam_t5x.launching import request, skypilot, yaml_text

GOLDEN = pathlib.Path(__file__).parent / "golden"
JOBSETS = ("jobset.yaml", "jobset_gpu.yaml")


def document(file: str) -> dict:
    return yaml.safe_load((ROOT / "launch" / file).read_text())


def job_of(jobset: dict) -> dict:
    """The Job that the JobSet controller makes of a JobSet's template."""
    (part,) = jobset["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"},
            "spec": part["template"]["spec"]}


@pytest.mark.parametrize("file", JOBSETS)
def test_the_jobs_obey_the_schema_of_kubernetes(file):
    validate = pytest.importorskip("kubernetes_validate")
    job, version = job_of(document(file)), validate.latest_version()
    validate.validate(job, version, strict=True)
    broken = copy.deepcopy(job)  # The schema must be able to say no.
    broken["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, version, strict=True)


@pytest.mark.parametrize("file, hosts, resource", [
    ("jobset.yaml", 4, "google.com/tpu"), ("jobset_gpu.yaml", 2, "nvidia.com/gpu")])
def test_the_jobset_restarts_all_pods_after_ends_that_are_resumable(file, hosts, resource):
    """JobSet is an extension: no schema of it is on PyPI, so its few fields are looked at here."""
    jobset = document(file)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    spec = jobset["spec"]
    assert set(spec) == {"network", "failurePolicy", "replicatedJobs"}
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert spec["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (part,) = spec["replicatedJobs"]
    job = part["template"]["spec"]
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == hosts
    # What is in here restarts, and so does a pod that went with its node and has no exit code.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"] == {
        "containerName": "vishwam", "operator": "NotIn", "values": [75, 76, 134, 137, 143]}
    # Pods of one slice belong on one node pool; GPUs are where they are.
    annotations = jobset["metadata"].get("annotations", {})
    together = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert annotations == (together if resource == "google.com/tpu" else {})
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # What podFailurePolicy demands.
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert resource in container["resources"]["limits"]


def test_skypilots_task_has_the_fields_that_skypilot_reads():
    """SkyPilot pins old versions of much and cannot live beside us; with it, its schema decides."""
    task = document("skypilot.yaml")
    assert set(task) <= {"name", "resources", "num_nodes", "envs", "file_mounts", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "accelerator_args", "use_spot", "zone"}
    assert task["num_nodes"] == 2
    for script in (task["setup"], task["run"]):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True,
                              check=False)
        assert done.returncode == 0 and not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("skypilot")])
def test_skypilots_own_schema(case):
    schemas = pytest.importorskip("sky.utils.schemas")
    import jsonschema
    task = yaml.safe_load(yaml_text.dump(skypilot.task(request.parse(CASES[case]))[0]))
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("xpk")])
def test_xpks_own_parser(case):
    import argparse
    parsers = pytest.importorskip("xpk.parser.core")
    characteristics = pytest.importorskip("xpk.core.system_characteristics")
    import shlex
    text = (GOLDEN / f"{case}.txt").read_text()
    start = text.index("xpk workload create")
    words = shlex.split(text[start:text.index("\n\n", start)].replace("\\\n", " "))
    parser = argparse.ArgumentParser()
    parsers.set_parser(parser)
    given = parser.parse_args(words[1:])
    assert given.max_restarts == 100 and given.command.startswith("vishwam train ")
    assert (given.tpu_type or given.device_type
            ) in characteristics.UserFacingNameToSystemCharacteristics


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["queued-resources", "create"], ["queued-resources", "delete"],
    ["queued-resources", "describe"], ["tpu-vm", "create"], ["tpu-vm", "delete"],
    ["tpu-vm", "describe"], ["tpu-vm", "ssh"], ["tpu-vm", "scp"]], ids=" ".join)
def test_gcloud_has_the_flags(words, tmp_path):
    """From its help alone, with an empty configuration: nothing is asked of the cloud."""
    if not shutil.which("gcloud"):
        pytest.skip("no gcloud here")
    done = subprocess.run(["gcloud", "compute", "tpus", *words, "--help"], text=True, check=False,
                          capture_output=True, timeout=120,
                          env={"PATH": os.environ["PATH"], "HOME": str(tmp_path),
                               "CLOUDSDK_CONFIG": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    used = set()
    for name in ("tpu_vm", "tpu_pod", "tpu_pod_own_files"):
        text = (GOLDEN / f"{name}.txt").read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("gcloud compute tpus " + " ".join(words)):
                used |= {word.partition("=")[0] for word in line.partition("--command=")[0].split()
                         if word.startswith("--")}
    assert used
    wide = {"--project", "--quiet", "--format"}
    assert not [flag for flag in used - wide
                if not re.search(rf"(?<![\w-]){flag}(?![\w-])", done.stdout)]


@pytest.mark.parametrize("value", [
    "yes", "no", "null", "1", "1.5", "0x1F", "1:30", "~", "", " a", "a: b", "a #b", "- a", "{a}",
    "é\n", "a\nb\n", "x'y\"z", "$(A)", "2026-01-01", "*a", "&a", "!a", "@a", "1e3", ".5", "=",
    "true", "On", "gs://bucket/a", "H100:8", "a\tb", "x\ny",
    " a\nb\n", "a\n\nb\n", "a\n\n", "0b1", "0o7", "12_3", "2x2x4"])
def test_strings_come_back_from_yaml_as_they_were(value):
    data = {"key": value, "list": [value, {"inner": value}], value or "empty": True}
    assert yaml.safe_load(yaml_text.dump(data)) == data


def test_other_values_come_back_from_yaml():
    data = {"a": 1, "b": [True, False, {"c": [], "d": {}}], "e": {"f": [[1, 2], [3]]}}
    assert yaml.safe_load(yaml_text.dump(data, ["a comment"])) == data
    assert json.loads(json.dumps(data)) == data
