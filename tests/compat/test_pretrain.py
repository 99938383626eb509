"""T5X's gin files run as they are: from pretraining to inference, with T5X's numbers."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from compat import t5x_runs
from models import t5_fixtures as t5

import helpers
from vishwam_t5x import gin_config
from vishwam_t5x.objectives import losses


def succeed(*arguments, env):
    """Runs vishwam; what it printed."""
    done = helpers.vishwam(*arguments, env=env)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def steps(folder):
    """Names of the checkpoints of a run."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_first_loss_is_t5x_s(tmp_path, monkeypatch):
    """The model and the loss that T5X's statements build, with T5X's parameters and batch."""
    monkeypatch.chdir(tmp_path)
    t5x_runs.model_file(tmp_path, emb_dim=128, mlp_dim=128, layers=2)
    config = gin_config.parse(
        ["--gin_file=model.gin", "--gin_file=t5x/configs/runs/pretrain.gin",
         "--gin.MIXTURE_OR_TASK_NAME='copy'", "--gin.TRAIN_STEPS=1", "--gin.MODEL_DIR='m'",
         "--gin.TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 24}", "--gin.DROPOUT_RATE=0.0"],
        "train")
    arguments = config.entry(**config.arguments(config.entry))
    batch, loss = t5.batch("batch_unpacked"), arguments["loss"]
    assert (loss.z_loss, loss.normalization) == (1e-4, "sum")
    logits = jax.jit(lambda v, b: arguments["model"].apply(v, b, method="logits"))(
        t5.variables("params_init"), batch)["text"]
    sums = losses.cross_entropy_sums(logits, batch["targets/text/targets"],
                                     losses.loss_weights(batch, "text", loss), loss.z_loss,
                                     loss.label_smoothing)
    np.testing.assert_allclose(float(sums.loss), 339.6422, atol=1e-4)


def test_pretraining(tmp_path, monkeypatch):
    """A run, what it leaves, and that it goes on from its own config.gin."""
    t5x_runs.pretrain_file(tmp_path)
    t5x_runs.cache(tmp_path / "cache")
    env = {"VISHWAM_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    log = succeed(
        "train", f"--gin_file={tmp_path}/pretrain.gin", f"--gin_search_paths={tmp_path}",
        "--gin.utils.SaveCheckpointConfig.period=2", f'--gin.MODEL_DIR="{tmp_path}/run"', env=env)
    assert "none by parameter" in log  # WeightMetricsComputer
    run = tmp_path / "run"
    assert steps(run) == ["2", "3"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert any("eval/loss" in line for line in lines)
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    text = (run / "config.gin").read_text()
    assert "period = 2" in text and "import my_own_tasks" in text
    monkeypatch.syspath_prepend(tmp_path)
    config = gin_config.parse([f"--gin_file={run}/config.gin"], "train")
    assert config.text() == text


@pytest.mark.slow
def test_all_of_t5x_s_runs(tmp_path):
    """pretrain.gin, finetune.gin, eval.gin and infer.gin, one after the other, on a SeqIO task."""
    t5x_runs.model_file(tmp_path)
    t5x_runs.write(tmp_path, "reversed_tasks.py", t5x_runs.TASKS)
    env = {"VISHWAM_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    common = [f"--gin_file={tmp_path}/model.gin", "--gin.MIXTURE_OR_TASK_NAME='reversed'",
              "--gin.MIXTURE_OR_TASK_MODULE='reversed_tasks'", "--gin.DROPOUT_RATE=0.0"]
    lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 32}"
    succeed("train", *common, lengths, "--gin_file=t5x/configs/runs/pretrain.gin",
            "--gin.TRAIN_STEPS=4", f"--gin.MODEL_DIR='{tmp_path}/first'",
            "--gin.utils.SaveCheckpointConfig.period=2",
            "--gin.train/utils.DatasetConfig.batch_size=4",
            "--gin.train_eval/utils.DatasetConfig.batch_size=4", env=env)
    assert steps(tmp_path / "first") == ["2", "4"]
    log = succeed("train", *common, lengths, "--gin_file=t5x/configs/runs/finetune.gin",
                  "--gin.TRAIN_STEPS=7", f"--gin.MODEL_DIR='{tmp_path}/second'",
                  f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path}/first/checkpoint_4'",
                  "--gin.BATCH_SIZE=4", env=env)
    assert "29 matched" in log and steps(tmp_path / "second") == ["3"]  # 4 of 7 were done
    checkpoint = f"--gin.CHECKPOINT_PATH='{tmp_path}/second/checkpoints/3'"
    succeed("evaluate", *common, "--gin_file=t5x/configs/runs/eval.gin", checkpoint,
            f"--gin.EVAL_OUTPUT_DIR='{tmp_path}/evaluated'", env=env)
    found = json.loads((tmp_path / "evaluated/3/metrics.jsonl").read_text())
    assert found["exact"] == 0 and found["num_examples"] == 3 and found["loss"] > 0
    succeed("infer", *common, lengths, "--gin_file=t5x/configs/runs/infer.gin", checkpoint,
            f"--gin.INFER_OUTPUT_DIR='{tmp_path}/inferred'", env=env)
    lines = [json.loads(line) for line in
             (tmp_path / "inferred/reversed-predict.jsonl").read_text().splitlines()]
    assert [line["inputs"] for line in lines] == ["new dog", "new house", "new stone"]
    assert [line["target"] for line in lines] == ["god wen", "esuoh wen", "enots wen"]
