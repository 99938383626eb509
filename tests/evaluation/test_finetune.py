"""Pretrain, leave for T5X's layout, come back from it and fine-tune."""

from __future__ import annotations

import json

import pytest

from helpers import vishwam
from vishwam_t5x.evaluation.predictions import read_lines

RECIPE = "--gin_file=gin/recipes/t5_finetune_cpu.gin"


def run(*arguments):
    done = vishwam(*arguments, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]


def right_ones(model_dir, checkpoint):
    """Share of right packages on the test split."""
    output = model_dir.parent / f"{model_dir.name}-evaluation"
    run("evaluate", RECIPE, f"--gin.MODEL_DIR='{model_dir}'", f"--checkpoint={checkpoint}",
        f"--gin.EVAL_OUTPUT_DIR='{output}'")
    (file,) = output.rglob("metrics.jsonl")
    return read_lines(file)[-1]["exact_match"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_converted_checkpoint_is_fine_tuned(tmp_path):
    run("train", "--gin_file=gin/recipes/t5_pretrain_cpu.gin",
        f"--gin.MODEL_DIR='{tmp_path}/pretrained'")
    run("convert", f"--from={tmp_path}/pretrained", f"--to={tmp_path}/t5x", "--format=t5x")
    before = right_ones(tmp_path / "nothing", tmp_path / "t5x")
    run("train", RECIPE, f"--gin.MODEL_DIR='{tmp_path}/tuned'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path}/t5x'")
    after = right_ones(tmp_path / "tuned", "latest")
    print(json.dumps({"before": before, "after": after}))
    # Nine packages; the commonest is 15 % of the test split.
    assert before < 0.2 and after > 0.6
