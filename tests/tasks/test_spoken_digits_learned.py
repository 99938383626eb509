"""What the recipe of spoken digits must have learned, where there is a folder of recordings."""

from __future__ import annotations

import os

import pytest

from helpers import ROOT, vishwam
from vishwam_t5x.evaluation.predictions import read_lines

RECIPE = "--gin_file=gin/recipes/spoken_digits_cpu.gin"
FOLDER = "VISHWAM_SPOKEN_DIGITS"


def test_the_quickstart_hears_digits_where_a_folder_is_named():
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    assert f'"${{{FOLDER}:-}}"' in script and RECIPE in script


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get(FOLDER), reason=f"{FOLDER} names no folder of recordings")
def test_digits_of_known_speakers_are_heard(tmp_path):
    model_dir = f"--gin.MODEL_DIR='{tmp_path}/run'"
    for verb in ("train", "evaluate"):
        done = vishwam(verb, RECIPE, model_dir, timeout=3600)
        assert done.returncode == 0, done.stderr[-4000:]
    assert f"page: {tmp_path}/run/" in done.stdout
    rows = list(read_lines(tmp_path / "run" / "evaluation" / "1500" / "metrics.jsonl"))
    assert [row["exact_match"] >= 0.9 for row in rows] == [True], rows
