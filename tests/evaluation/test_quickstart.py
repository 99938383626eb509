"""What the quickstart recipe must have learned after its 600 steps, judged on test examples."""

from __future__ import annotations

import pytest

from helpers import vishwam
from vishwam_t5x.evaluation.predictions import read_lines

RECIPE = "--gin_file=gin/recipes/quickstart_cpu.gin"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_reaches_its_bars(tmp_path):
    model_dir = f"--gin.MODEL_DIR='{tmp_path}/run'"
    for verb in ("train", "evaluate"):
        done = vishwam(verb, RECIPE, model_dir, timeout=3600)
        assert done.returncode == 0, done.stderr[-4000:]
    assert f"page: {tmp_path}/run/" in done.stdout
    rows = {row["task"]: row
            for row in read_lines(tmp_path / "run" / "evaluation" / "600" / "metrics.jsonl")}
    assert rows["quickstart_image_to_text"]["exact_match"] >= 0.97
    assert rows["quickstart_audio_to_text"]["exact_match"] >= 0.99
    assert rows["quickstart_text_to_image"]["recognised"] >= 0.85
    denoising = rows["quickstart_text_denoise"]
    assert denoising["cross_entropy/text"] < denoising["unigram/text"] - 0.3
