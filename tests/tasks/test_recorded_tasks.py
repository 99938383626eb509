"""Spoken digits and multiple choice: what becomes of a folder, and what is left out and why."""

from __future__ import annotations

import io
import json
import pathlib
import wave

import numpy as np
import pytest
import seqio
import tensorflow as tf
from PIL import Image

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.tf import audio, examples, image, refusals
from vishwam_t5x.data.tf.features import image_feature
from vishwam_t5x.data.tf.special_tokens import SpecialTokens, tokenize
from vishwam_t5x.evaluation import options
from vishwam_t5x_tasks import multiple_choice, spoken_digits


def write_wave(path: pathlib.Path, samples: np.ndarray, rate: int = 8000) -> None:
    """Writes samples in [-1, 1] as 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def hum(seconds: float, hertz: float, rate: int = 8000) -> np.ndarray:
    """A tone that swells and fades."""
    time = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * hertz * time) * np.sin(np.pi * time / seconds)


def png(pixels: np.ndarray) -> bytes:
    """The PNG file of uint8 pixels."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def kept_and_refused(dataset) -> tuple[list[dict], list[str]]:
    found = list(dataset.as_numpy_iterator())
    good = [example for example in found if not example[examples.REFUSED]]
    return good, [example[examples.REFUSED].decode() for example in found
                  if example[examples.REFUSED]]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for digit in (0, 7):
        for take in (0, 4, 5, 7):
            write_wave(folder / f"{digit}_maria_{take}.wav", hum(0.3 + take / 20, 300 + 50 * digit))
    write_wave(folder / "3_maria_8.wav", hum(0.5, 400, 16000), 16000)
    write_wave(folder / "4_maria_1.wav", np.zeros((0,)))
    write_wave(folder / "5_maria_1.wav", np.zeros((4000,)))
    write_wave(folder / "6_maria_1.wav", hum(5, 300))
    (folder / "8_maria_1.wav").write_bytes(b"RIFF")
    (folder / "notes.txt").write_text("no recording")
    return folder


def test_recordings_are_split_by_take_and_bad_ones_named(recordings, monkeypatch):
    monkeypatch.setenv(spoken_digits.FOLDER_VARIABLE, str(recordings))
    assert [each.file for each in spoken_digits.listed(str(recordings), "validation")] == [
        "0_maria_5.wav", "7_maria_5.wav"]
    source = seqio.TaskRegistry.get("spoken_digits").source
    good, refused = kept_and_refused(spoken_digits._hear(source.get_dataset("test")))
    assert [(example["meta_digit"], example["text_targets"]) for example in good] == [
        (0, b"zero"), (7, b"seven"), (0, b"zero"), (7, b"seven")]
    assert all(example["audio_inputs"].shape[1] == 40 and len(example["audio_inputs"]) % 4 == 0
               for example in good)
    for name, why in (("4_maria_1.wav", "no samples"), ("5_maria_1.wav", "silent"),
                      ("6_maria_1.wav", "too long"), ("8_maria_1.wav", "cannot be read")):
        assert [why in reason for reason in refused if reason.startswith(name)] == [True], refused
    train, _ = kept_and_refused(spoken_digits._hear(source.get_dataset("train")))
    assert len(train) == 3 * spoken_digits.COPIES
    first = [example["audio_inputs"] for example in train if example["meta_digit"] == 7]
    assert any(first[0].shape != other.shape or np.abs(first[0] - other).max() > 0.1
               for other in first[1:]), "the copies differ"


def test_without_a_folder_the_tasks_say_what_they_need(monkeypatch, tmp_path):
    for module in (spoken_digits, multiple_choice):
        task = seqio.TaskRegistry.get(module.NAME)
        monkeypatch.delenv(module.FOLDER_VARIABLE, raising=False)
        with pytest.raises(UserError, match=f"{module.FOLDER_VARIABLE}=FOLDER"):
            examples.read_task(task, "test", 0)
        monkeypatch.setenv(module.FOLDER_VARIABLE, str(tmp_path))
        with pytest.raises(UserError, match=r"no recordings|cannot be read"):
            examples.read_task(task, "test", 0)


def test_questions_with_a_picture(tmp_path, monkeypatch):
    monkeypatch.setenv(multiple_choice.FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "a.png").write_bytes(png(np.full((20, 40, 3), 200, np.uint8)))
    (tmp_path / "broken.png").write_bytes(png(np.zeros((20, 40), np.uint8))[:40])
    good = {"question": "What is <image 1>?", "options": ["a cat", "{a} dog"], "answer": "B",
            "image_1": "a.png"}
    whole = {**good, "question": "Look.\u2028What is <image 1>?", "image_2": None}
    lines = [whole, {**good, "answer": "C"}, {**good, "image_1": "broken.png"},
             {**good, "image_1": "none.png"}, {**good, "image_2": "a.png"}, {"question": "why?"}]
    (tmp_path / "data.jsonl").write_text("".join(
        json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    task = seqio.TaskRegistry.get("multiple_choice")
    dataset = task.source.get_dataset("test")
    for step in task.preprocessors[:-1]:
        dataset = step(dataset)
    kept, refused = kept_and_refused(dataset)
    assert len(kept) == 1 and kept[0]["text_targets"] == b"B"
    assert options.of_example(kept[0]) == ("A", "B")
    asked = kept[0]["text_inputs"].decode()
    assert "What is <image_input>?" in asked and "(B) {a} dog" in asked
    assert kept[0]["image_inputs"].shape == (384, 384, 3)
    assert len(kept[0]["image_input_patches"]) == 12 * 24, "half of it is padding"
    for number, why in ((2, "letter of one"), (3, "cannot be read"), (4, "none.png"),
                        (5, "one picture"), (6, "KeyError")):
        assert why in refused[number - 2] and f"data.jsonl:{number}" in refused[number - 2]


def test_more_options_than_letters_are_refused():
    line = {"question": "?", "options": [str(n) for n in range(27)], "answer": "B",
            "image_1": "a.png"}
    with pytest.raises(UserError, match="more options than there are letters"):
        multiple_choice.ask(json.dumps(line), 1)


def test_long_recordings_become_a_segment_and_its_history(tmp_path):
    write_wave(tmp_path / "long.wav", hum(9.0, 300))
    write_wave(tmp_path / "too_long.wav", hum(13.0, 300))
    paths = [str(tmp_path / name) for name in ("long.wav", "too_long.wav", "none.wav")]
    dataset = refusals.read_bytes(tf.data.Dataset.from_tensor_slices({"audio_inputs": paths}),
                                  "audio_inputs")
    kept, refused = kept_and_refused(audio.decode_recording(
        dataset, "audio_inputs", "audio_history_inputs", audio.RecordingConfig(max_segments=2),
        "audio_input_patches", "audio_history_input_patches"))
    assert [example["audio_inputs"].shape for example in kept] == [(256, 128)]
    assert kept[0]["audio_history_inputs"].shape == (1, 256, 128)
    assert kept[0]["meta_lost_samples"] == 9 * 16000 - 2 * 65280
    for name in ("audio_input_patches", "audio_history_input_patches"):
        np.testing.assert_array_equal(kept[0][name], np.arange(128))
    assert "too long" in refused[0] and "none.wav" in refused[1]


def test_pictures_resized_by_tensorflow_are_refused_and_converted_alike():
    clear = png(np.dstack([np.zeros((4, 8, 3), np.uint8), np.zeros((4, 8), np.uint8)]))
    dataset = tf.data.Dataset.from_tensor_slices({
        "image_inputs": [png(np.full((4, 8, 3), 51, np.uint8)), clear, clear[:40], b""],
        "meta_id": ["grey", "clear", "broken", "nothing"]})
    kept, refused = kept_and_refused(image.decode_image(dataset, "image_inputs", 8, 8))
    for example, value in zip(kept, (0.2, 1.0), strict=True):
        pixels = example["image_inputs"]
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.float32
        np.testing.assert_allclose(pixels[2:6], value, atol=1e-6)
        assert not pixels[:2].any() and not pixels[6:].any()
    assert refused[0].startswith("broken: the image cannot be read")
    assert refused[1] == "nothing: the image is an empty file"


def test_videos_without_frames_are_refused():
    frame = png(np.zeros((4, 6, 3), np.uint8))
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"image_history_inputs": files, "meta_id": name} for name, files in (
            (b"good", [frame, frame]), (b"none", []), (b"many", [frame] * 9))),
        output_signature={"image_history_inputs": tf.TensorSpec((None,), tf.string),
                          "meta_id": tf.TensorSpec((), tf.string)})
    kept, refused = kept_and_refused(image.decode_frames(
        dataset, "image_history_inputs", image.PictureConfig(8, 8), patches="given", patch_size=4))
    assert [example["image_history_inputs"].shape for example in kept] == [(2, 8, 8, 3)]
    # The upper half of each frame has the centres of two patches, the lower one is padding there.
    assert kept[0]["given"].tolist() == [0, 1, 4, 5]
    assert refused == ["none: the video has no frames",
                       "many: the video has too many frames (9, at most 8)"]


def test_refused_examples_are_left_out_with_their_reason():
    spec = {"image_inputs": tf.TensorSpec((None, None, 3), tf.uint8),
            examples.REFUSED: tf.TensorSpec((), tf.string)}
    task = seqio.Task("made_up", seqio.FunctionDataSource(lambda split, shuffle_files: None, ()),
                      output_features={"image_inputs": image_feature(tf.uint8)})

    class Dataset:
        element_spec = spec

    kept = examples.CleanFeatures.of_task(task, Dataset())
    assert kept.dropped == () and list(kept.features) == ["image_inputs"]
    pixels = np.ones((2, 2, 3), np.uint8)
    assert kept.convert({"image_inputs": pixels, examples.REFUSED: b"x.png: broken"})[1] == (
        "x.png: broken")
    assert kept.convert({"image_inputs": pixels, examples.REFUSED: b""})[1] is None


def test_the_extra_tokens_of_a_prompt_are_one_id_each():
    vocabulary = SpecialTokens(seqio.ByteVocabulary(extra_ids=0), 3, 10, 1)
    layout = vocabulary.layout
    text = "see <image_input> at <extra_id_3>"
    ids = vocabulary.encode_tf(tf.constant(text)).numpy().tolist()
    assert ids == list(vocabulary.encode(text))
    assert ids[-1] == layout.special_ids["<extra_id_3>"]
    assert ids.count(layout.input_start) == 1 and vocabulary.vocab_size == layout.size
    assert "<image_input>" in vocabulary.decode(ids)
    with pytest.raises(UserError, match="<extra_id_99>"):
        vocabulary.encode("<extra_id_99>")


def test_a_text_with_an_unknown_token_is_refused_by_name():
    vocabulary = SpecialTokens(seqio.ByteVocabulary(extra_ids=0), 3, 10, 1)
    dataset = tf.data.Dataset.from_tensor_slices({
        "text": ["a <extra_id_3>", "see <extra_id_99>", ""], "other": ["b", "b", "b"],
        "meta_id": ["good", "bad", "empty"]})
    features = {"text": seqio.Feature(vocabulary, add_eos=False),
                "other": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)}
    kept, refused = kept_and_refused(tokenize(dataset, features))
    assert refused == ["bad: a text has a token that the vocabulary lacks (<extra_id_99>)"]
    assert [each["text"].tolist() for each in kept] == [
        vocabulary.encode("a <extra_id_3>"), []]
    assert all(each["other"].dtype == np.int32 for each in kept)
