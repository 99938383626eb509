"""Pixels that are bytes stay bytes, from the cache to the device, and mean the same as floats."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluation import small_model

from vishwam_t5x import train as train_verb
from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.data import records, source, synthetic
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import FrameSpec
from vishwam_t5x.objectives.reconstruction import Reconstruction
from vishwam_t5x.training import setup
from vishwam_t5x.training.optimizers import Adafactor

GOAL, KEY = small_model.objective(), "inputs/image/input"


def captions(dtype: str, name: str = "captions") -> SyntheticTask:
    return SyntheticTask(name, {
        "image_inputs": SyntheticFeature(4, 4, rest=(4, 1), dtype=dtype),
        "text_inputs": SyntheticFeature(2, 9, num_ids=64),
        "text_targets": SyntheticFeature(1, 5, num_ids=64)}, 12, patch_specs=small_model.PATCHES)


class Floats:
    """The same examples, their pixels as floats."""

    def __init__(self, task: SyntheticTask) -> None:
        self._task, self.name, self.num_records = task, task.name, task.num_records
        self.length_table, self.clean_lengths = task.length_table, task.clean_lengths
        self.features = {name: info._replace(dtype="float32") if info.dtype == "uint8" else info
                         for name, info in task.features.items()}

    def read(self, record):
        clean = self._task.read(record)
        return {**clean, "image_inputs": clean["image_inputs"].astype(np.float32) / 255}


def spec_of(*tasks, goal=GOAL):
    return source.batch_spec(small_model.dataset_config(), goal, source.features_of(tasks))


def pixels_of(dtype: str, frames: bool = False) -> records.FeatureInfo:
    return records.FeatureInfo((*((None,) if frames else ()), 4, 4, 1), dtype)


IDS = records.FeatureInfo((None,), "int32")


def test_bytes_where_all_tasks_have_bytes():
    pixels, floats = captions("uint8"), captions("float32", "floats")
    assert spec_of(pixels).arrays()[KEY].dtype == np.uint8
    assert spec_of(pixels, small_model.denoising_task()).arrays()[KEY].dtype == np.uint8
    for tasks in ((pixels, floats), (floats,), (small_model.denoising_task(),), ()):
        assert spec_of(*tasks).arrays()[KEY].dtype == np.float32
    codec = Reconstruction("image", small_model.PATCHES["image"])
    config = small_model.dataset_config(task_feature_lengths={"inputs": 8, "targets": 8})
    features = source.features_of([pixels])
    assert source.batch_spec(config, codec, features).byte_patches == ("image",)
    # A codec reads the first feature of its modality that there is, and no other.
    beside = {"digits": {"image": pixels_of("uint8"), "image_targets": pixels_of("float32")}}
    assert source.batch_spec(config, codec, beside).byte_patches == ("image",)

    class Own:  # an objective that may make floats of pixels
        input_modalities, target_modalities = ("text", "image"), ("text",)
        image = small_model.PATCHES["image"]

    config = small_model.dataset_config(task_feature_lengths={"inputs": 8, "targets": 8})
    assert source.batch_spec(config, Own(), features).byte_patches == ()


def test_each_kind_of_picture_is_bytes_or_floats_by_itself():
    """Frames, targets and pictures for people have no say in what an image input is."""
    goal = MixtureOfDenoisers(
        vocabulary=small_model.LAYOUT, input_modalities=("text", "image", "image_history"),
        target_modalities=("text", "image"), image=small_model.PATCHES["image"],
        image_history=FrameSpec(small_model.PATCHES["image"], (2, 2), 2),
        ignored_features=("image_pixels",))
    config = small_model.dataset_config(task_feature_lengths={"inputs": 48, "targets": 40})

    def bytes_in(**tasks) -> tuple[str, ...]:
        return source.batch_spec(config, goal, tasks).byte_patches

    supervised = {"image_inputs": pixels_of("uint8"), "text_targets": IDS,
                  "image_history_inputs": pixels_of("float32", frames=True),
                  "image_targets": pixels_of("float32"), "image_target_codes": IDS}
    assert bytes_in(videos=supervised) == ("image",)
    frames = {"image_history_inputs": pixels_of("uint8", frames=True), "text_targets": IDS}
    floats = {"image_inputs": pixels_of("float32"), "text_targets": IDS}
    assert bytes_in(frames=frames, floats=floats) == ("image_history",)
    drawn = {"image": pixels_of("uint8"), "image_codes": IDS, "text": IDS,
             "image_pixels": pixels_of("float32"), "meta_name": records.FeatureInfo((), "bytes")}
    assert bytes_in(frames=frames, drawn=drawn) == ("image", "image_history")
    # What makes no example is refused where it is read, with its record; here it counts for none.
    assert bytes_in(frames=frames, broken={"imag": pixels_of("uint8")}) == ("image_history",)


def test_tasks_that_differ_in_a_modality_are_named_once(caplog):
    tasks = captions("uint8"), captions("float32", "old"), small_model.denoising_task()
    source.assemble(small_model.dataset_config(), GOAL, source.Mixture(tasks, [1.0] * 3, 0))
    said, = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "'image' are float32 in the batch" in said and "decode_picture" in said
    assert "float32 are old (image_inputs); uint8 are captions (image_inputs)" in said
    caplog.clear()
    source.assemble(small_model.dataset_config(), GOAL, source.Mixture(tasks[:1], [1.0], 0))
    assert not caplog.records


def test_a_batch_of_bytes_and_floats_is_one_of_floats():
    pixels = captions("uint8")
    examples = [GOAL.apply(task.read(0), seed=0, example=0) for task in (pixels, Floats(pixels))]
    assert examples[0][KEY].dtype == np.uint8 and examples[1][KEY].dtype == np.float32
    placed = [PlacedExample(0, example_lengths(each), each) for each in examples]
    arrays = assemble(spec_of(), 1, placed)
    np.testing.assert_array_equal(arrays[KEY][0, :4], arrays[KEY][0, 4:8])
    assert arrays[KEY].dtype == np.float32 and 0.5 < arrays[KEY].max() <= 1
    kept = assemble(spec_of(pixels), 1, placed[:1])
    np.testing.assert_array_equal(kept[KEY][0, :4], examples[0][KEY])
    with pytest.raises(AssertionError):  # never rounded, never cut off
        assemble(spec_of(pixels), 1, placed)


def test_batches_differ_in_nothing_else():
    config, task = small_model.dataset_config(), captions("uint8")
    found = []
    for which in (task, Floats(task)):
        stream = source.Mixture([which], [1.0], 0, shuffle=False)
        found.append(source.assemble(config, GOAL, stream).batches)
    assert all(isinstance(batches, PackedBatches) for batches in found)
    small, large = (batches.batch(DataPosition()) for batches in found)
    assert small.plan == large.plan
    assert small.arrays[KEY].nbytes * 4 == large.arrays[KEY].nbytes
    for key, value in small.arrays.items():
        if key == KEY:
            value = value.astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(value, large.arrays[key], err_msg=key)


@pytest.fixture
def cached(tmp_path):
    synthetic.write_cache(captions("uint8", "tiny"), tmp_path / "cache")
    return small_model.dataset_config(cache_dir=str(tmp_path / "cache"))


class _AboutToTrain(Exception):
    pass


def test_a_step_compiled_before_the_cache_was_written_is_compiled_anew(
        cached, tmp_path, monkeypatch):
    assert source.batch_spec(cached, GOAL, source.cached_features(cached)).byte_patches
    elsewhere = small_model.dataset_config(cache_dir=str(tmp_path / "nothing"))
    assert source.cached_features(elsewhere) == {}
    compiled: list[tuple[str, ...]] = []

    def compile_nothing(parts, factory, shardings):
        compiled.append(parts.spec.byte_patches)
        return len(compiled)

    def loop(config, step, *rest):
        raise _AboutToTrain(step)

    monkeypatch.setattr(setup.Parts, "compile", compile_nothing)
    monkeypatch.setattr(train_verb, "Loop", loop)
    monkeypatch.setattr(train_verb, "_known_features", lambda config: {})
    with pytest.raises(_AboutToTrain) as found:
        train_verb.train(small_model.model(), str(tmp_path / "run"), GOAL, cached, Adafactor(), 2,
                         use_tensorboard=False, compilation_cache_dir="")
    assert compiled == [(), ("image",)] and found.value.args == (2,)


@pytest.mark.slow
def test_training_on_bytes_learns_the_same(cached, tmp_path):
    losses = []
    for goal in (GOAL, _FloatsOnly()):
        run = tmp_path / type(goal).__name__
        train_verb.train(small_model.model(), str(run), goal, cached, Adafactor(), 3,
                         stats_period=1, use_tensorboard=False, compilation_cache_dir="")
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(*losses, rtol=1e-5)


class _FloatsOnly:
    """The objective as one that does not say that it keeps bytes."""

    def __getattr__(self, name):
        if name == "input_features":
            raise AttributeError(name)
        return getattr(GOAL, name)
