"""Tasks judge what the model writes while it is trained, and training does not notice."""

from __future__ import annotations

import jax
import jax.monitoring
import pytest
from evaluation import small_model, small_run

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.generator import DecodingConfig
from vishwam_t5x.evaluation.predictions import read_lines
from vishwam_t5x.infer_eval import InferEval
from vishwam_t5x.train import train
from vishwam_t5x.training.optimizers import AdamW

STEPS = 4


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    module = small_model.model()
    return small_run.write(tmp_path_factory.mktemp("run"), module, small_model.params(module))[0]


def data(cache_dir, **changes):
    return small_model.dataset_config(mixture_or_task_name=small_run.MIXTURE, cache_dir=cache_dir,
                                      **changes)


def counting_compilations(names):
    """Appends the name of each program that is compiled from now on; returns what ends that."""
    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: jax.monitoring.unregister_event_duration_listener(listen)


def test_the_losses_are_the_same_bits_with_and_without(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("VISHWAM_CACHE_DIR", cache_dir)
    drawn = DecodingConfig(method="sample", num_decodes=2, max_length=4)
    judged = InferEval(data(cache_dir, split="test"), period=2, max_examples=4,
                       decoding={"text": drawn}, decode_batch_size=4)
    records, compiled = {}, {"without": [], "with": []}
    for name, infer_eval in (("without", None), ("with", judged)):
        stop = counting_compilations(compiled[name])
        train(small_model.model(), str(tmp_path / name), small_model.objective(),
              data(cache_dir, split="train"), AdamW(learning_rate=0.1), STEPS, stats_period=1,
              infer_eval=infer_eval, use_tensorboard=False,
              compilation_cache_dir=str(tmp_path / "compiled"))
        stop()
        records[name] = list(read_lines(tmp_path / name / "metrics.jsonl"))

    def column(name, key):
        return {line["step"]: line[key] for line in records[name] if key in line}

    for key in ("loss", "grad_norm", "param_norm", "examples_crc32"):
        assert len(column("with", key)) == STEPS and column("with", key) == column("without", key)
    found = column("with", "infer_eval/drawings/brightness")
    assert list(found) == [2, STEPS] and all(0 <= value <= 1 for value in found.values())
    assert list(column("with", "infer_eval/captions/exact_match")) == [2, STEPS]
    assert not any("texts" in key for line in records["with"] for key in line
                   if key.startswith("infer_eval/")), "it has no metrics"
    # One program for each of the two modalities, however often it is evaluated.
    assert len([name for name in compiled["with"] if "_decode_batch" in name]) == 2
    assert compiled["without"] and not [
        name for name in compiled["without"] if "_decode_batch" in name]


def test_mistakes_are_found_before_training(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("VISHWAM_CACHE_DIR", cache_dir)
    config = data(cache_dir, split="test")
    with pytest.raises(UserError, match="no task has metric functions"):
        InferEval(config, tasks=("texts",)).hook(None, small_model.objective())
    with pytest.raises(UserError, match="did you mean 'captions'"):
        InferEval(config, tasks=("caption",)).hook(None, small_model.objective())
    for changes, message in (({"period": 0}, "at least 1 step"), ({"max_examples": 0}, "at least")):
        with pytest.raises(UserError, match=message):
            InferEval(config, **changes)
