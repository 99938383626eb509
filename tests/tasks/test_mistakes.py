"""What a mistake gets: a task full of them is cached, packed and its refusals are counted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import seqio
import tensorflow as tf

import media
from vishwam_t5x.core.batch import ROW_ORDER, DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import fast_pictures, records
from vishwam_t5x.data.source import DatasetConfig, open_dataset
from vishwam_t5x.data.spectrogram import LogMelConfig, SegmentConfig
from vishwam_t5x.data.tf import audio, cache, features, image, text
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import FrameSpec, PatchSpec
from vishwam_t5x.objectives.vocabulary import VocabularyLayout

NAME = "full_of_mistakes"
PICTURE = image.PictureConfig(8, 8)
SOUND = audio.RecordingConfig(LogMelConfig(
    sample_rate=8000, fft_size=256, hop=128, num_mels=8, max_hertz=4000.0),
    SegmentConfig(128 * 15, 0), max_segments=2)
GREY = PatchSpec(4, channels=1)
OBJECTIVE = MixtureOfDenoisers(
    vocabulary=VocabularyLayout(300, num_sentinels=9, num_location_bins=0),
    input_modalities=ROW_ORDER, image=PatchSpec(4), audio=GREY,
    image_history=FrameSpec(PatchSpec(4), (2, 2), 3), audio_history=FrameSpec(GREY, (4, 2), 2))
RED = np.full((8, 8, 3), (200, 100, 0), np.uint8)
PLAIN = {"image_inputs": media.png(RED), "image_history_inputs": [media.png(RED)],
         "audio_inputs": media.wav(media.hum(0.2, 8000), 8000), "text_inputs": b"say what it is",
         "text_targets": b"red"}
PICTURES, SOUNDS = media.unusual_pictures(), media.unusual_sounds(media.hum(0.2, 8000), 8000)
CONVERTED = {
    "plain": {}, "palette": {"image_inputs": media.png(RED, "P")},
    **{name: {"image_inputs": data} for name, (data, _) in PICTURES.items()},
    **{name: {"audio_inputs": data} for name, data in SOUNDS.items()},
    "wide": {"image_inputs": media.png(np.full((1, 10_000, 3), RED[0, 0], np.uint8))},
    "slow": {"audio_inputs": media.wav(media.hum(0.2, 11025), 11025)},
    "fast": {"audio_inputs": media.wav(media.hum(0.2, 44100), 44100)},
    "long": {"audio_inputs": media.wav(media.hum(0.4, 8000), 8000)},
    "mixed frames": {"image_history_inputs": [media.png(RED[..., 1]), media.png(RED)]}}
REFUSED = {
    "broken": ({"image_inputs": PLAIN["image_inputs"][:50]}, "image cannot be read"),
    "no image": ({"image_inputs": b""}, "empty file"),
    "silence of no length": ({"audio_inputs": media.wav(np.zeros(0), 8000)}, "no samples"),
    "not a number": ({"audio_inputs": media.riff(np.full((1600, 1), np.nan, "<f4"), 8000)},
                     "not finite"),
    "logarithms": ({"audio_inputs": media.riff(np.ones((1600, 1), "<i2"), 8000, tag=7)},
                   "another kind than PCM"),
    "cut off": ({"audio_inputs": PLAIN["audio_inputs"][:1000]}, "cut off"),
    "too long": ({"audio_inputs": media.wav(media.hum(0.6, 8000), 8000)}, "too long"),
    "no frames": ({"image_history_inputs": []}, "no frames"),
    "many frames": ({"image_history_inputs": [media.png(RED)] * 9}, "too many frames"),
    "a broken frame": ({"image_history_inputs": [media.png(RED), b"GIF89a"]}, "cannot be read"),
    "long text": ({"text_inputs": b"a" * 41}, "text_inputs is too long (41 tokens, at most 40)")}


def source(split, shuffle_files, seed=None):
    rows = [{**PLAIN, **changed, "meta_id": name} for name, changed in (
        *CONVERTED.items(), *((name, changed) for name, (changed, _) in REFUSED.items()))]
    return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature={
        name: tf.TensorSpec((None,) if name == "image_history_inputs" else (), tf.string)
        for name in rows[0]})


@contextlib.contextmanager
def registered(picture=PICTURE):
    """The task, whose pictures become of a size in some way."""
    letters = seqio.ByteVocabulary(extra_ids=0)
    seqio.TaskRegistry.add(
        NAME, source=seqio.FunctionDataSource(source, splits=("train",)),
        preprocessors=[
            functools.partial(image.decode_picture, feature="image_inputs", config=picture),
            functools.partial(image.decode_frames, feature="image_history_inputs", config=PICTURE),
            functools.partial(audio.decode_recording, feature="audio_inputs",
                              history="audio_history_inputs", config=SOUND),
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            functools.partial(text.refuse_longer, feature="text_inputs", most=40)],
        output_features={
            "image_inputs": features.image_feature(tf.uint8),
            "image_history_inputs": features.frames_feature(),
            "audio_inputs": features.audio_feature(),
            "audio_history_inputs": features.segments_feature(),
            "text_inputs": features.text_feature(letters),
            "text_targets": features.text_feature(letters)}, metric_fns=[])
    try:
        yield
    finally:
        seqio.TaskRegistry.remove(NAME)


def write(place, overwrite=False):
    return cache.cache_task_or_mixture(NAME, ["vishwam_t5x_tasks.multiple_choice"], str(place),
                                       overwrite=overwrite)[NAME]["train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The cache of the task."""
    place = tmp_path_factory.mktemp("mistakes")
    with registered():
        said = write(place)
    assert said == {"num_records": len(CONVERTED), "num_bad": len(REFUSED), "written": True}
    return place


def test_what_is_refused_is_named_with_its_reason_and_counted(folder):
    task = records.TaskCache.open(folder / "tasks" / NAME / "train")
    reasons = [entry["why"] for entry in task.manifest.bad_examples]
    assert len(reasons) == len(REFUSED)
    for reason, (name, (_, why)) in zip(reasons, REFUSED.items(), strict=True):
        assert reason.startswith(f"{name}: ") and why in reason, reason


def test_what_is_converted_is_what_it_was(folder):
    task = records.TaskCache.open(folder / "tasks" / NAME / "train")
    found = {each["meta_id"].decode(): each for each in map(task.read, range(task.num_records))}
    assert list(found) == list(CONVERTED)
    colours = {name: each["image_inputs"][:4].reshape(-1, 3).mean(axis=0)
               for name, each in found.items()}
    assert colours["plain"].tolist() == [200, 100, 0]
    np.testing.assert_allclose(colours["palette"], [200, 100, 0], atol=30)
    for name, (_, colour) in PICTURES.items():
        np.testing.assert_allclose(colours[name], colour, atol=4, err_msg=name)
    wide = found["wide"]["image_inputs"].any(axis=(1, 2))
    assert wide.sum() == 1 and wide[3:5].any(), "one row of pixels, in the middle"
    heard = {name: each["audio_inputs"] for name, each in found.items()}
    for name in ("slow", "fast", *SOUNDS):  # resampled, not sped up
        assert np.abs(heard[name] - heard["plain"])[:8, :2].mean() < 0.2, name  # where it is loud
    assert len(found["long"]["audio_history_inputs"]) == 1
    assert len(found["plain"]["audio_history_inputs"]) == 0
    assert found["mixed frames"]["image_history_inputs"].shape == (2, 8, 8, 3)


def _gone(*args, **kwargs):
    raise FileNotFoundError("data.jsonl")


def test_a_cache_of_other_settings_is_not_taken_for_this_one(folder, tmp_path, monkeypatch,
                                                             caplog):
    place = shutil.copytree(folder, tmp_path / "cache")
    monkeypatch.setattr(fast_pictures, "codecs", lambda: fast_pictures.Codecs(tf, tf))
    with registered():
        assert not write(place)["written"]
        with monkeypatch.context() as changed:  # its source is gone: the cache is whole
            changed.setattr(seqio.FunctionDataSource, "get_dataset", _gone)
            assert not write(place)["written"]
        assert "not known: FileNotFoundError" in caplog.text
    with registered(dataclasses.replace(PICTURE, resize="fast")):
        with pytest.raises(UserError, match="other settings") as found:
            write(place)
        assert "image_inputs: decode_picture.config.resize = 'exact', now 'fast'" in str(
            found.value.got) and "--overwrite" in found.value.fix
        manifest = place / "tasks" / NAME / "train" / records.MANIFEST_NAME
        values = json.loads(manifest.read_text())
        assert set(values["metadata"]["conversions"]) == {
            "image_inputs: decode_picture", "image_history_inputs: decode_frames",
            "audio_inputs: decode_recording"}
        del values["metadata"]["conversions"]
        manifest.write_text(json.dumps(values))  # as older versions wrote it
        assert not write(place)["written"]


def test_what_is_left_is_packed(folder):
    dataset = open_dataset(DatasetConfig(
        NAME, {"inputs": 128, "targets": 24, "inputs/image_history": 9, "inputs/audio_history": 2},
        2, cache_dir=str(folder)), OBJECTIVE)
    position, seen, frames = DataPosition(), 0, 0
    for _ in range(5):
        batch = dataset.batches.batch(position)
        assert batch is not None and not batch.bad
        position, seen = batch.plan.end, seen + batch.plan.num_examples
        frames += (batch.arrays["inputs/image_history/segment_ids"] > 0).sum()
        pixels, owners = (batch.arrays[f"inputs/image/{name}"] for name in ("input", "segment_ids"))
        for row, owner in {*zip(*np.nonzero(owners), strict=True)}:
            assert pixels[row][owners[row] == owners[row, owner]].max() > 75, "none is black"
    assert seen > len(CONVERTED) and frames > seen
