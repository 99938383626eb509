"""`vishwam infer` in chunks: modes, shards, kills; every line once, whatever happened."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from evaluation import small_model, small_run

import helpers
from vishwam_t5x import evaluation_setup, task_lookup
from vishwam_t5x.core import distributed
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluate import evaluate
from vishwam_t5x.evaluation.generator import DecodingConfig
from vishwam_t5x.evaluation.inference import facts_of
from vishwam_t5x.evaluation.predictions import read_lines
from vishwam_t5x.infer import infer

DRAWN = {"text": DecodingConfig(method="sample", max_length=6, num_decodes=2, temperature=2.0)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(cache directory, MODEL_DIR)."""
    module = small_model.model()
    return small_run.write(tmp_path_factory.mktemp("run"), module, small_model.params(module))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of compiled programs that these tests and their processes share."""
    import jax

    before = (jax.config.jax_compilation_cache_dir,
              jax.config.jax_persistent_cache_min_compile_time_secs)
    yield str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture
def settings(run, compiled, monkeypatch):
    monkeypatch.setenv("VISHWAM_CACHE_DIR", run[0])
    return arguments(run, compiled)


def arguments(run, compiled):
    """Twenty examples of one task in five chunks, two texts drawn for each."""
    cache_dir, model_dir = run
    return {"model": small_model.model(), "model_dir": model_dir, "tasks": ("captions",),
            "objective": small_model.objective(), "dataset_cfg": small_model.dataset_config(
                mixture_or_task_name=small_run.MIXTURE, split="train", cache_dir=cache_dir),
            "decoding": DRAWN, "decode_batch_size": 4, "chunk_size": 4,
            "compilation_cache_dir": compiled}


KILLED = """
import sys, time
from evaluation import test_inference
from vishwam_t5x.evaluation.chunks import ChunkedFile
from vishwam_t5x.infer import infer

write, written = ChunkedFile.write, []

def stop_after_two(self, *chunk):
    if len(written) == 2:
        time.sleep(3600)  # until it is killed
    written.append(write(self, *chunk))

ChunkedFile.write = stop_after_two
infer(**test_inference.arguments((sys.argv[1], sys.argv[2]), sys.argv[3]), output_file=sys.argv[4])
"""


def test_a_kill_loses_no_example_and_repeats_none(run, settings, compiled, tmp_path):
    whole = infer(**settings, output_file=str(tmp_path / "whole.jsonl"))
    lines = list(read_lines(whole.path))
    assert [line["example"] for line in lines] == list(range(20)) and whole.num_predictions == 20
    path = tmp_path / "killed.jsonl"
    paths = f"{helpers.ROOT}/tests"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *run, compiled, str(path)], cwd=helpers.ROOT,
        env=helpers.environment(env={"PYTHONPATH": paths, "VISHWAM_CACHE_DIR": run[0]}))
    second = tmp_path / "killed.jsonl.parts" / "00001.jsonl"
    deadline = time.monotonic() + 900
    while not second.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists() and not (second.parent / "00002.jsonl").exists()
    before = second.stat().st_mtime_ns
    with pytest.raises(UserError, match="other settings"):
        infer(**settings, output_file=str(path), max_examples=19)
    # One of two jobs: the chunks it need not write are left alone, and then it waits for the other.
    part = infer(**settings, output_file=str(path), shard_id=0, num_shards=2)
    assert part.missing_chunks == 1 and second.stat().st_mtime_ns == before and not path.exists()
    found = infer(**settings, output_file=str(path), shard_id=1, num_shards=2)
    assert found.num_predictions == 20
    assert path.read_bytes() == pathlib.Path(whole.path).read_bytes()


def test_what_the_modes_write(settings, tmp_path):
    def lines(mode, **more):
        path = tmp_path / f"{mode}{len(more)}.jsonl"
        infer(**{**settings, "max_examples": 6, **more}, mode=mode, output_file=str(path))
        return list(read_lines(path))

    greedy = {"decoding": {"text": DecodingConfig(max_length=6)}}
    scored, auxed, drawn = (lines("score", **greedy), lines("predict_with_aux", **greedy),
                            lines("predict", return_all_decodes=True, num_decodes=3))
    assert all("prediction" not in line and line["score"] < 0 for line in scored)
    for line, other in zip(scored, auxed, strict=True):
        assert line["target"] == other["target"] and line["example"] == other["example"]
        assert other["aux"]["scores"] == other["score"]
        assert sum(other["aux"]["token_scores"]) == pytest.approx(other["score"], rel=1e-4)
    for line in drawn:
        scores = [decode["score"] for decode in line["decodes"]]
        assert len(scores) == 3 and scores == sorted(scores) and scores[-1] == line["score"]
        assert line["decodes"][-1]["prediction"] == line["prediction"]
    with pytest.raises(UserError, match="greedy decoding gives one"):
        lines("predict", **greedy, num_decodes=3)
    with pytest.raises(UserError, match="scoring writes nothing"):
        lines("score", num_decodes=3)
    with pytest.raises(UserError, match="unknown mode of inference"):
        lines("predict_with")


def test_evaluating_all_checkpoints_skips_those_that_are_done(settings, tmp_path, monkeypatch):
    seen = []
    more = {name: settings[name] for name in settings if name != "chunk_size"}
    more |= {"output_dir": str(tmp_path), "done": seen.append, "max_examples": 4,
             "baseline_examples": 0}
    first = evaluate(**more, checkpoint_path="all")
    assert [found.step for found in seen] == [7] and first is seen[0]
    assert evaluate(**more, checkpoint_path="all") is None and len(seen) == 1
    # Other settings are another evaluation; a step asked for by name is always evaluated.
    assert evaluate(**{**more, "max_examples": 3}, checkpoint_path="all").step == 7
    assert evaluate(**{**more, "max_examples": 3}, checkpoint_path="7").step == 7
    assert len(seen) == 3
    # Nor is it done if the step has other weights, or the task judges otherwise, than it had then.
    more["max_examples"] = 3
    assert evaluate(**more, checkpoint_path="all") is None
    monkeypatch.setattr("vishwam_t5x.evaluation.restoring.identity", lambda path: "retrained")
    assert evaluate(**more, checkpoint_path="all").step == 7
    assert evaluate(**more, checkpoint_path="all") is None
    monkeypatch.setattr("vishwam_t5x.evaluation_setup.code_of", lambda function: "mended")
    assert evaluate(**more, checkpoint_path="all").step == 7


class Compared(Exception):
    """What a verb gave to `distributed.compare`."""


def test_the_examples_of_all_processes_are_compared(run, settings, tmp_path, monkeypatch):
    def compare(what, texts, fix):
        if what != "the codecs":
            raise Compared(what, texts["examples"])

    def given(verb, **more):
        with monkeypatch.context() as patch:
            # Once all is set up: what is built before is built for one process.
            patch.setattr(evaluation_setup, "on_all", lambda what, make, *seconds: (
                on_all(what, make), patch.setattr("jax.process_count", lambda: 2))[0])
            patch.setattr(distributed, "exchange", lambda name, value, timeout: [value] * 2)
            patch.setattr(distributed, "compare", compare)
            with pytest.raises(Compared) as found:
                verb(**{**settings, **more})
        assert found.value.args[0] == "the data"
        return found.value.args[1]

    on_all, lines, words = evaluation_setup.on_all, tmp_path / "in.jsonl", tmp_path / "text.model"
    words.write_bytes(pathlib.Path(f"{run[0]}/text.model").read_bytes())
    said = []
    for text in ("one", "two"):
        lines.write_text(json.dumps({"text": text}) + "\n")
        said.append(given(infer, input_file=str(lines), vocabulary=str(words)))
    assert said[0] != said[1] and all(str(lines) in text and str(words) in text for text in said)
    del settings["chunk_size"]
    cache = task_lookup.open_tasks(settings["dataset_cfg"], settings["objective"], ["captions"])[0]
    assert given(evaluate) == json.dumps(facts_of(cache), sort_keys=True)
    assert {*facts_of(cache)} == {"task", "examples", "content"}


def test_what_was_written_with_other_weights_is_not_taken_for_done(settings, tmp_path, monkeypatch):
    job = {**settings, "mode": "score", "max_examples": 2,
           "decoding": {"text": DecodingConfig(max_length=6)},
           "output_file": str(tmp_path / "out.jsonl")}
    assert infer(**job).num_predictions == infer(**job).num_predictions == 2
    monkeypatch.setattr("vishwam_t5x.evaluation.restoring.identity", lambda path: "retrained")
    with pytest.raises(UserError, match="other settings\n  got: weights: .* \"retrained\" now"):
        infer(**job)
    assert infer(**job, overwrite=True).num_predictions == 2
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        infer(**{**job, "dataset_cfg": dataclasses.replace(job["dataset_cfg"], seed=1)})


def test_a_checkpoint_of_another_vocabulary_is_refused(run, tmp_path):
    class Task:
        name = "captions"
        metadata = {"vocabulary": {"path": f"{run[0]}/text.model", "sha256": "12"}}

    (tmp_path / "data.json").write_text('{"captions": {"vocabulary": "12"}, "old": {}}')
    step = tmp_path / "checkpoints" / "10"
    task_lookup.check_vocabulary([Task], str(step))
    task_lookup.check_vocabulary([Task], str(tmp_path / "elsewhere" / "a" / "b" / "c"))
    (tmp_path / "data.json").write_text('{"captions": {"vocabulary": "34"}}')
    with pytest.raises(UserError, match="vocabulary of task 'captions' is not the checkpoint's"):
        task_lookup.check_vocabulary([Task], str(step))
    folder = tmp_path / "huggingface"
    folder.mkdir()
    # Another file with the same pieces is the same vocabulary.
    (folder / "spiece.model").write_bytes(pathlib.Path(f"{run[0]}/text.model").read_bytes())
    task_lookup.check_vocabulary([Task], str(folder))
