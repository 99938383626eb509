"""The twenty-line Task of tasks/README.md, run as it stands there on a folder made here."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import numpy as np
import pytest

import helpers
import media
from vishwam_t5x_tasks import quickstart_fitted

README = helpers.ROOT / "tasks" / "README.md"


@pytest.fixture
def captions(tmp_path, monkeypatch):
    from PIL import Image

    folder = tmp_path / "captions"
    folder.mkdir()
    monkeypatch.setenv("VISHWAM_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copy(quickstart_fitted.vocabulary_path(), folder / "text.model")
    rng = np.random.default_rng(0)
    rows = []
    for number, (size, kind) in enumerate([((40, 20), "png"), ((64, 64), "jpg"), ((7, 90), "bmp")]):
        pixels = rng.integers(100, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{kind}")
        rows.append({"file": f"{number}.{kind}", "caption": f"the digit {number}"})
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("CAPTIONS", str(folder))
    return folder


def loaded(number: int, tmp_path):
    """The module of one of the page's pieces of code."""
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[number]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "my_tasks.py").write_text(code)
    spec = importlib.util.spec_from_file_location("my_tasks", tmp_path / "my_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_task_of_videos(tmp_path, monkeypatch):
    shutil.copy(quickstart_fitted.vocabulary_path(), tmp_path / "text.model")
    monkeypatch.setenv("VIDEOS", str(tmp_path))
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(
            media.png(np.full((20, 10, 3), 100 + number, np.uint8)))
    rows = [{"frames": ["0.png", "1.png"], "caption": "it moves"},
            {"frames": [], "caption": "nothing"}, {"frames": ["9.png"], "caption": "gone"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = loaded(1, tmp_path)
    import seqio

    from vishwam_t5x.data.tf import examples
    try:
        task = seqio.TaskRegistry.get("my_videos")
        found = list(examples.read_task(task, "train", 0).as_numpy_iterator())
    finally:
        seqio.TaskRegistry.remove("my_videos")
    assert found[0]["image_history_inputs"].shape == (2, 256, 256, 3)
    asked = module.TEXT.decode(found[0]["text_inputs"].tolist())
    assert "<image_history_1> <image_history_2>" in asked
    assert module.TEXT.decode(found[0]["text_targets"].tolist()) == "it moves"
    refused = [example[examples.REFUSED].decode() for example in found[1:]]
    assert refused[0] == "train:2: the video has no frames" and "9.png" in refused[1]


def test_the_task_of_the_readme(captions, tmp_path):
    module = loaded(0, tmp_path)
    import seqio

    try:
        task = seqio.TaskRegistry.get("my_captions")
        found = list(task.get_dataset(split="train", shuffle=False).as_numpy_iterator())
    finally:
        seqio.TaskRegistry.remove("my_captions")
    assert len(found) == 3
    for number, example in enumerate(found):
        image = example["image_inputs"]
        assert image.shape == (64, 64, 3) and image.dtype == np.float32
        assert 0.0 <= image.min() and image.max() <= 1.0
        assert module.VOCABULARY.decode(example["text_targets"].tolist()) == f"the digit {number}"
    # The tall image keeps its shape: centred, black to its left and right.
    tall = found[0]["image_inputs"]
    assert tall[:, :15].max() == 0.0 and tall[:, 18:46].min() > 0.3 and tall[:, 49:].max() == 0.0


def test_every_task_of_the_table_exists():
    from vishwam_t5x_tasks import quickstart

    named = set(re.findall(r"^\| `(quickstart_\w+)`", README.read_text(), re.MULTILINE))
    assert named == set(quickstart.RATES)
