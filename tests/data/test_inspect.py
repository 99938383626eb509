"""`vishwam inspect`: figures that add up, and a page that shows what the model is given."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from data.small_data import PATCHES

import helpers
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import gallery, records_writer, source, synthetic
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.inspect import inspect
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.vocabulary import VocabularyLayout


def tasks():
    text, image = SyntheticFeature(3, 40, 12, 0.7), SyntheticFeature(
        8, 8, rest=(4, 1), dtype="float32")
    codes = SyntheticFeature(8, 8, num_ids=50)
    return [SyntheticTask("words", {"text": text}, 60, 1, PATCHES),
            SyntheticTask("pictures", {"image": image, "image_codes": codes}, 30, 2, PATCHES)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    centres = directory / "codebook.npy"
    np.save(centres, np.linspace(0, 1, 50 * 4, dtype=np.float32).reshape(50, 4))
    for task in tasks():
        metadata = {"codebook": {"path": str(centres), "patch": 2}} if task.name == (
            "pictures") else {}
        synthetic.write_cache(task, directory, metadata=metadata)
    records_writer.write_mixture(directory, "both", {"words": 3.0, "pictures": 1.0})
    return directory


def settings(cache, **options):
    return source.DatasetConfig("both", {"inputs": 64, "targets": 64}, 4, cache_dir=str(cache),
                                **options)


def objective(**options):
    return MixtureOfDenoisers(vocabulary=VocabularyLayout(base_size=256, num_sentinels=32),
                              image=PATCHES["image"], input_modalities=("text", "image"),
                              **options)


def pictures(page):
    from PIL import Image

    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            for data in re.findall(r"base64,([^']+)'", page)]


def test_the_figures_are_those_of_the_data(cache, tmp_path):
    figures, text = inspect(settings(cache), objective(), str(tmp_path / "page.html"), 2)
    words, pictures_task = figures.tasks
    assert (words.name, words.num_records) == ("words", 60)
    assert words.share == pytest.approx(0.75, abs=1e-3)
    lengths = [tasks()[0].clean_lengths(record)["text"] for record in range(60)]
    assert (words.lengths["text"][0], words.lengths["text"][3]) == (min(lengths), max(lengths))
    assert pictures_task.features["image"] == "float32[n, 4, 1]"
    packing = figures.packing
    assert packing["packed"].efficiency > packing["two per row"].efficiency
    assert packing["two per row"].efficiency > packing["one per row"].efficiency
    one = packing["one per row"]
    assert one.num_examples == one.rows_used == 1024
    for word in ("both, split train", "words", "75.0%", "decoder slots", "page.html"):
        assert word in text
    assert json.loads(json.dumps(figures.to_json()))["packing"]["packed"]["rows_used"] == 1024


def test_the_page_shows_examples_before_and_after_corruption(cache, tmp_path):
    page = tmp_path / "deep" / "page.html"
    inspect(settings(cache), objective(image_weights={"R": 1.0}), str(page), 3)
    text = page.read_text()
    assert text.count("<tr><td>") == 6
    assert "[Image] [R]" not in text, "without a vocabulary ids are shown as numbers"
    found = pictures(text)
    # Each of the three examples with an image: the image, its codes; the visible patches, the codes
    # to write.
    assert len(found) == 12
    image, codes, visible, targets = found[:4]
    assert image.shape == visible.shape
    hidden = visible == 128
    assert 0.4 < hidden.mean() < 0.9
    assert (image[~hidden] == visible[~hidden]).all(), "visible patches stand in their places"
    shown = targets != 128
    assert (codes[shown] == targets[shown]).all() and shown.any()


def test_a_damaged_record_is_shown_as_such(cache, tmp_path, monkeypatch):
    from vishwam_t5x.data.records import DamagedRecord, TaskCache

    def damaged(self, record):
        raise DamagedRecord(self.name, record, "spoilt <by> a test")

    monkeypatch.setattr(TaskCache, "read", damaged)
    page = tmp_path / "page.html"
    inspect(settings(cache), objective(), str(page), 2)
    assert page.read_text().count("damaged: spoilt &lt;by&gt; a test") == 4


def test_the_number_of_examples_must_be_positive(cache):
    with pytest.raises(UserError, match="num_examples"):
        inspect(settings(cache), objective(), num_examples=0)


GIN = """
from __gin__ import dynamic_registration
from vishwam_t5x import cache
from vishwam_t5x import inspect
from vishwam_t5x.data import source
from vishwam_t5x.objectives import denoisers
from vishwam_t5x.objectives import masking
from vishwam_t5x.objectives import vocabulary

inspect.inspect:
  dataset = @source.DatasetConfig()
  objective = @denoisers.MixtureOfDenoisers()

cache.cache.dataset = @source.DatasetConfig()

source.DatasetConfig:
  mixture_or_task_name = 'both'
  task_feature_lengths = {{'inputs': 64, 'targets': 64}}
  batch_size = 4
  cache_dir = '{cache}'

denoisers.MixtureOfDenoisers:
  vocabulary = @vocabulary.VocabularyLayout()
  input_modalities = ('text', 'image')
  image = @masking.PatchSpec()

vocabulary.VocabularyLayout:
  base_size = 256
  num_sentinels = 32

masking.PatchSpec:
  patch_size = 2
  channels = 1
"""


def test_the_verb_reads_the_gin_file_of_training(cache, tmp_path):
    gin_file = tmp_path / "run.gin"
    gin_file.write_text(GIN.format(cache=cache))
    done = helpers.vishwam("inspect", f"--gin_file={gin_file}", "--num_examples=1", "--json",
                           f"--output={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"][0]["num_records"] == 60
    assert (tmp_path / "page.html").read_text().count("<tr><td>") == 2
    done = helpers.vishwam("inspect", f"--gin_file={gin_file}", "--num_examples=few")
    assert done.returncode == 2 and "whole number" in done.stderr
    done = helpers.vishwam("cache", f"--gin_file={gin_file}", "--cache_dir=/elsewhere")
    assert done.returncode == 2 and "--cache_dir and --gin_file" in done.stderr


def test_bytes_look_as_the_floats_that_they_stand_for():
    objective = MixtureOfDenoisers(image=PATCHES["image"], target_modalities=("text",))
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 16
    shown = []
    for image in (pixels, pixels.astype(np.float32) / 255):
        clean = {"image_inputs": image, "text_targets": np.asarray([5], np.int32)}
        shown.append(gallery._Renderer(None, objective, None).inputs(
            clean, objective.apply(clean, seed=0, example=0)))
    assert shown[0] == shown[1] and "<img" in shown[0]
