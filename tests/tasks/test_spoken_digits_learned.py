"""What the recipe of spoken digits must have learned, where there is a folder of recordings."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from helpers import ROOT, vishwam
from vishwam_t5x.evaluation.predictions import read_lines

RECIPE = "--gin_file=gin/recipes/spoken_digits_cpu.gin"
FOLDER = "VISHWAM_SPOKEN_DIGITS"


@pytest.mark.parametrize("folder", ["", "recordings"])
def test_the_quickstart_hears_digits_where_a_folder_is_named(tmp_path, folder):
    launch = tmp_path / "launch"
    launch.mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", launch)
    (launch / "environment.sh").write_text(
        'prepare_environment() { shift; ARGUMENTS=("$@"); PYTHON=echo; }\n')
    done = subprocess.run(["bash", launch / "quickstart.sh", "--gin.TRAIN_STEPS=7"], check=True,
                          capture_output=True, text=True, env={**os.environ, FOLDER: folder})
    commands = [line.split() for line in done.stdout.splitlines()]
    assert all("--gin.TRAIN_STEPS=7" in words for words in commands)
    ran = [(words[2], RECIPE in words, words[-1]) for words in commands]
    quickstart = [(verb, False, "--gin.TRAIN_STEPS=7") for verb in ("train", "evaluate")]
    spoken = [(verb, True, '--gin.MODEL_DIR="runs/spoken_digits"')
              for verb in ("train", "evaluate")]
    assert ran == quickstart + (spoken if folder else [])


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
