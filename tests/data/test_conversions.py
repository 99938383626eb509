"""A cache knows how its files were read, and is not taken for one of other settings."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from evaluation import small_model

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import conversions, fast_pictures, pictures, preparing, source, synthetic
from vishwam_t5x.data.records import MANIFEST_NAME


def noted(**changes) -> dict:
    with conversions.recorded() as found:
        conversions.note("decode_picture", "image_inputs", channels=3,
                         config=pictures.PictureConfig(8, 8, **changes))
    return found


def test_what_is_noted_is_kept_as_json_and_compared():
    exact = noted()
    assert exact["image_inputs: decode_picture"]["config"]["resize"] == "exact"
    assert json.loads(json.dumps(exact)) == exact
    assert conversions.differences(exact, noted()) == []
    assert conversions.differences(exact, noted(resize="fast")) == [
        "image_inputs: decode_picture.config.resize = 'exact', now 'fast'"]
    assert conversions.differences(exact, {}) == ["image_inputs: decode_picture, now not done"]
    conversions.note("nobody", "listens")
    with conversions.recorded() as found:
        conversions.note("crop", "image", side=np.int64(8), share=np.float32(0.5))
    assert json.dumps(found) == '{"image: crop": {"side": 8, "share": 0.5}}'


def test_what_an_older_cache_does_not_say_differs_in_nothing():
    now = noted()
    now["audio_inputs: decode_recording"] = {"config": {}}
    older = noted()
    del older["image_inputs: decode_picture"]["config"]["resize"]
    assert conversions.differences(older, now) == []
    assert conversions.differences(None, now) == []


def test_two_steps_of_one_feature_are_both_kept():
    with conversions.recorded() as found:
        for side in (8, 16):
            conversions.note("crop", "image", side=side)
    assert list(found) == ["image: crop", "image: crop (2)"]


def test_the_fast_way_without_its_packages_is_the_exact_one(monkeypatch):
    fast = pictures.PictureConfig(8, 8, resize="fast")
    monkeypatch.setattr(fast_pictures, "codecs", lambda: None)
    assert pictures.as_done(fast).resize == "exact"
    monkeypatch.setattr(fast_pictures, "codecs", lambda: fast_pictures.Codecs(json, json))
    assert pictures.as_done(fast) == fast


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache with settings, whose task's file can be changed; and what is run for it."""
    code = tmp_path / "tasks.py"
    code.write_text("before")
    synthetic.write_cache(small_model.text_task(name="tiny"), tmp_path / "cache")
    manifest = tmp_path / "cache/tasks/tiny/train" / MANIFEST_NAME
    values = json.loads(manifest.read_text())
    digest = preparing.task_code._sha256(code)
    values["metadata"] |= {"code": {str(code): digest}, conversions.METADATA_KEY: noted()}
    manifest.write_text(json.dumps(values))
    asked: list[tuple] = []

    def open_it(answer: dict | None) -> None:
        done = subprocess.CompletedProcess([], 0 if answer is None else 2, json.dumps(answer))
        monkeypatch.setattr(preparing, "_run", lambda command: asked.append(command) or done)
        preparing._ask.cache_clear()
        config = small_model.dataset_config(cache_dir=str(tmp_path / "cache"))
        source.open_dataset(config, small_model.objective())

    return code, asked, open_it


def test_a_changed_task_is_asked_before_its_cache_is_read(cached, caplog):
    code, asked, open_it = cached
    open_it(None)
    assert not asked, "nothing has changed: TensorFlow stays out"
    code.write_text("after")
    open_it(None)
    assert "--splits=train" in asked[0] and "--overwrite" not in asked[0]
    mistake = {"problem": f"the cache of task 'tiny' {conversions.DIFFERS}", "got": "resize",
               "fix": "--overwrite"}
    with pytest.raises(UserError, match="other settings"):
        open_it(mistake)
    caplog.clear()
    open_it({**mistake, "problem": "no module"})  # that it cannot be asked is no reason to refuse
    said, = (message for message in caplog.messages if "could not be asked" in message)
    assert said.endswith("no module (resize)")


def test_a_task_that_converts_nothing_is_not_asked(cached, tmp_path):
    code, asked, open_it = cached
    manifest = next(tmp_path.rglob(MANIFEST_NAME))
    values = json.loads(manifest.read_text())
    del values["metadata"][conversions.METADATA_KEY]
    manifest.write_text(json.dumps(values))
    code.write_text("after")
    open_it({"problem": conversions.DIFFERS, "got": "", "fix": ""})
    assert not asked
