"""A run whose MODEL_DIR is in a bucket: trained, killed, resumed bit for bit, evaluated."""

from __future__ import annotations

import json
import pathlib
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
import training_runs
from storage import emulator

import helpers
from vishwam_t5x.core.generations import GuardedObject

pytest.importorskip("gcp_storage_emulator")
MORE = ("--gin.SAVE_PERIOD=5",)


@pytest.fixture(scope="module")
def bucket():
    with emulator.serve() as port:
        yield port


def listing(port: int, folder: str) -> list[str]:
    """Names below a folder of the bucket, asked over plain HTTP."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    address = (f"http://127.0.0.1:{port}/storage/v1/b/{emulator.BUCKET}/o?"
               f"prefix={folder}/&maxResults=10000")
    with opener.open(address, timeout=30) as answer:
        return [item["name"].removeprefix(f"{folder}/")
                for item in json.load(answer).get("items", [])]


def content(port: int, name: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    quoted = urllib.parse.quote(name, safe="")
    with opener.open(f"http://127.0.0.1:{port}/download/storage/v1/b/{emulator.BUCKET}/o/{quoted}"
                     "?alt=media", timeout=30) as answer:
        return answer.read()


def records(port: int, run: str) -> list[dict]:
    return [json.loads(line) for line in content(port, f"{run}/metrics.jsonl").decode().split("\n")
            if line]


@pytest.mark.slow
def test_train_kill_resume_evaluate(bucket, tmp_path, quickstart_cache):
    env = emulator.variables(bucket, **quickstart_cache)
    whole = tmp_path / "whole"
    training_runs.train(whole, 20, *MORE, env=quickstart_cache)
    run = emulator.url("run")
    log = tmp_path / "run"
    process = training_runs.start(log, 20, *MORE, f'--gin.MODEL_DIR="{run}"', env=env)
    deadline = time.monotonic() + 300
    while "checkpoints/10/commit_success.txt" not in listing(bucket, "run"):
        assert process.poll() is None, pathlib.Path(f"{log}.log").read_text()[-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    training_runs.kill(process)
    # What is logged up to a checkpoint is there when the checkpoint is.
    assert {record["step"] for record in records(bucket, "run")} >= set(range(1, 11))
    training_runs.train(log, 20, *MORE, f'--gin.MODEL_DIR="{run}"', env=env)
    steps = [record["step"] for record in records(bucket, "run")]
    assert steps == list(range(1, 21))
    there = {record["step"]: record["loss"] for record in records(bucket, "run")}
    assert there == training_runs.column(whole, "loss")
    assert {"config.gin", "model-info.txt", "data.json"} <= set(listing(bucket, "run"))
    assert "holder.json" not in listing(bucket, "run")
    same = helpers.run_python(f"""
        import numpy as np, sys
        from vishwam_t5x.checkpointing.restore import open_source
        from vishwam_t5x.checkpointing.sources import Request
        def arrays(path):
            source, step, _ = open_source(path)
            assert step == 20, step
            return source.read({{name: Request(np.dtype(leaf.dtype), None)
                               for name, leaf in source.leaves.items()}})
        here, there = arrays({str(whole)!r}), arrays({run!r})
        assert here.keys() == there.keys() and here
        assert all(np.array_equal(here[name], there[name]) for name in here)
        assert "tensorflow" not in sys.modules
        print("same")
        """, env=env)
    assert same.strip() == "same"
    done = helpers.vishwam(
        "evaluate", *training_runs.SMALL, f'--gin.MODEL_DIR="{run}"',
        "--gin.evaluate.evaluate.max_examples=4", "--gin.evaluate.evaluate.baseline_examples=0",
        "--gin.evaluate.evaluate.page=None", "--tasks=quickstart_image_to_text", env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "evaluation/20/metrics.jsonl" in listing(bucket, "run")
    assert np.isfinite(json.loads(content(bucket, "run/evaluation/20/metrics.jsonl"))["loss"])


def test_inspect(bucket_here):
    records = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 4))
    GuardedObject(f"{bucket_here}/run/metrics.jsonl", 30).write(records.encode(), 0)
    said = helpers.run_python(f"""
        from vishwam_t5x import inspect
        inspect.main(["{bucket_here}/run"])
        try:
            inspect.main(["{bucket_here}/other"])
        except ValueError as error:
            print(error)
        """)
    assert f"run: {bucket_here}/run" in said and "step 4: loss 0.25" in said
    assert f"got: {bucket_here}/other" in said
    page = GuardedObject(f"{bucket_here}/run/run.png", 30).read()[0]
    assert page is not None and page.startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_storage_that_goes_away_and_comes_back(bucket, tmp_path, quickstart_cache):
    line = emulator.FaultyLine(bucket, seed=0, share=0.0, stall_seconds=0)
    env = emulator.variables(line.port, VISHWAM_STORAGE_SECONDS="10", **quickstart_cache)
    run, log = emulator.url("away"), tmp_path / "away"
    arguments = (300, "--gin.SAVE_PERIOD=100", f'--gin.MODEL_DIR="{run}"')
    process = training_runs.start(log, *arguments, env=env)
    text = pathlib.Path(f"{log}.log")

    def wait_for(words: str) -> None:
        deadline = time.monotonic() + 300
        while words not in text.read_text():
            assert process.poll() is None, text.read_text()[-6000:]
            assert time.monotonic() < deadline, text.read_text()[-6000:]
            time.sleep(0.05)

    try:
        wait_for("checkpoints/100 saved")
        line.cut_off.set()
        wait_for("CHECKPOINT NOT SAVED")
        # The one before is whole, for whoever can reach it.
        names = listing(bucket, "away")
        assert {"checkpoints/100/manifest.json", "checkpoints/100/commit_success.txt"} <= set(names)
        assert "training goes on" in text.read_text()
        line.cut_off.clear()
        assert process.wait(300) == 0, text.read_text()[-6000:]
    finally:
        if process.poll() is None:
            training_runs.kill(process)
        line.close()
    names = listing(bucket, "away")
    assert "checkpoints/300/commit_success.txt" in names
    whole = {name.split("/")[1] for name in names if name.endswith("/commit_success.txt")}
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == whole
    assert [record["step"] for record in records(bucket, "away")] == list(range(1, 301))
