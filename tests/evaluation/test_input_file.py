"""Pictures and recordings become what the model was trained on, or are refused by name."""

from __future__ import annotations

import dataclasses
import json
import wave

import numpy as np
import pytest
from PIL import Image

import media
from vishwam_t5x.core.batch import ROW_ORDER, BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import pictures
from vishwam_t5x.data.pictures import scaled
from vishwam_t5x.data.recordings import RecordingConfig
from vishwam_t5x.data.source import DatasetConfig, batch_spec
from vishwam_t5x.data.spectrogram import LogMelConfig, SegmentConfig, log_mel_spectrogram
from vishwam_t5x.evaluation.input_file import BadLine, InputReader, read_picture, read_sound
from vishwam_t5x.infer import _hear
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import FrameSpec, PatchSpec, patchify
from vishwam_t5x.objectives.text_to_text import TextToText
from vishwam_t5x.objectives.vocabulary import EOS_ID, VocabularyLayout

LAYOUT = VocabularyLayout(base_size=64, num_sentinels=16, num_location_bins=0)
MEL = LogMelConfig(sample_rate=8000, fft_size=256, hop=128, num_mels=16, min_hertz=300.0,
                   max_hertz=3400.0)
OBJECTIVE = MixtureOfDenoisers(
    vocabulary=LAYOUT, image=PatchSpec(2, channels=1), audio=PatchSpec((4, 8), channels=1),
    text_r=((3.0, 0.15),), text_x=((3.0, 0.5),))


def read_image(path, spec, grid):
    """A picture as the model takes it, in [0, 1]."""
    return scaled(read_picture(path, spec, grid).pixels)


def reader(**changes) -> InputReader:
    return InputReader(**{
        "objective": OBJECTIVE, "target": "text", "hear": _hear(MEL),
        "encode": lambda text: np.array([ord(letter) % 60 + 3 for letter in text], np.int32),
        "spec": BatchSpec(1, 24, 8, {"text": 10, "image": 16, "audio": 16}, {"text": 8},
                          {"image": 4, "audio": 32}),
        "grids": {"image": (4, 4), "audio": (4, 2)}, **changes})


def write_wave(path, samples, rate=8000, width=2, channels=1):
    scaled = np.rint(np.clip(samples, -1, 1) * (2.0**(8 * width - 1) - 1))
    data = (scaled + 128).astype("u1") if width == 1 else scaled.astype(f"<i{width}")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data.tobytes())


def lines(tmp_path, *objects, **changes):
    path = tmp_path / "inputs.jsonl"
    path.write_text("".join(json.dumps(fields) + "\n" for fields in objects))
    return list(reader(**changes).read(path))


def test_text_gets_prefix_and_end(tmp_path):
    line, = lines(tmp_path, {"text": "ab"})
    assert line.example["inputs/text/tokens"].tolist() == [
        LAYOUT.prefix("text", "S"), ord("a") % 60 + 3, ord("b") % 60 + 3, EOS_ID]
    line, = lines(tmp_path, {"text": "a"}, target="image")
    assert line.example["inputs/text/tokens"][0] == LAYOUT.prefix("image", "S")
    assert not [name for name in line.example if name.startswith("targets/")]


def test_a_picture_is_fitted_to_the_grid(tmp_path):
    pixels = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 8), 255, np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "colour.png")
    exact = read_image(tmp_path / "a.png", OBJECTIVE.image, (4, 4))
    assert np.array_equal(exact, pixels[..., None].astype(np.float32) / 255)
    wide = read_image(tmp_path / "wide.png", OBJECTIVE.image, (4, 4))[..., 0]
    assert (wide[2:6] == 1).all() and (wide[:2] == 0).all() and (wide[6:] == 0).all()
    assert read_image(tmp_path / "colour.png", OBJECTIVE.image, (4, 4)).shape == (8, 8, 1)
    colour = read_image(tmp_path / "a.png", PatchSpec(2, channels=3), (4, 4))
    assert colour.shape == (8, 8, 3)
    line, = lines(tmp_path, {"image": "a.png"})
    assert np.array_equal(line.example["inputs/image/input"], patchify(exact, OBJECTIVE.image))


def test_pictures_are_resized_as_it_is_told(tmp_path):
    for package in ("cv2", "simplejpeg"):
        pytest.importorskip(package, reason="the extra 'images' is not installed")
    data = media.jpeg(np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8))
    (tmp_path / "a.jpg").write_bytes(data)
    found = []
    for resize in ("exact", "fast"):
        line, = lines(tmp_path, {"image": "a.jpg"}, resize=resize)
        found.append(line.example["inputs/image/input"])
        pixels = pictures.read_picture(data, 1, pictures.PictureConfig(8, 8, resize=resize)).pixels
        assert np.array_equal(found[-1], patchify(pictures.scaled(pixels), OBJECTIVE.image))
    assert not np.array_equal(*found)


def test_t5_s_text_gets_the_end_that_its_tasks_append_and_is_never_cut(tmp_path):
    t5 = {"objective": TextToText(4, 3), "needs_target": True, "grids": {},
          "spec": BatchSpec(1, 4, 3, {"text": 4}, {"text": 3})}
    fits, long_text, long_target = lines(
        tmp_path, {"text": "abc", "target": "ab"}, {"text": "abcd", "target": "a"},
        {"text": "a", "target": "abc"}, **t5)
    letters = [ord(letter) % 60 + 3 for letter in "abc"]
    assert fits.example["inputs/text/tokens"].tolist() == [*letters, EOS_ID]
    assert fits.example["targets/text/targets"].tolist() == [*letters[:2], EOS_ID]
    assert long_text.why == "the text is too long (5 tokens, with prefix and end, at most 4)"
    assert long_target.why == "the target is too long (4 tokens, with the end, at most 3)"
    without, = lines(tmp_path, {"text": "abcd", "target": "ab"}, **t5, ends=("targets",))
    assert without.example["inputs/text/tokens"].tolist() == [*letters, ord("d") % 60 + 3]
    # Nobody reads it: it may be as long as it likes.
    unread, = lines(tmp_path, {"text": "abc", "target": "abcdef"}, **{**t5, "needs_target": False})
    assert unread.fields["target"] == "abcdef"
    prompt, = lines(tmp_path, {"text": "abc", "target": "abcdef"}, **{
        **t5, "needs_target": False, "reads_target": True})
    assert "target is too long" in prompt.why


def test_a_target_that_is_scored_is_no_longer_than_a_row(tmp_path):
    fits, long_target = lines(tmp_path, {"text": "a", "target": "a" * 7},
                              {"text": "a", "target": "a" * 8}, needs_target=True)
    assert len(fits.example["targets/text/targets"]) == 8
    assert long_target.why == "the target is too long (9 tokens, with the end, at most 8)"


def test_options_stand_beside_what_is_asked(tmp_path):
    given = {"text": "a", "options": ["ab", "c"]}
    line, one, same, numbers, alone = lines(
        tmp_path, given, {**given, "options": ["ab"]}, {**given, "options": ["c", "c"]},
        {**given, "options": [1, 2]}, {"options": ["ab", "c"]})
    assert line.options == ("ab", "c") and line.fields == {"text": "a"}
    letters = [ord(letter) % 60 + 3 for letter in "abc"]
    assert [ids.tolist() for ids in line.option_ids] == [[*letters[:2], EOS_ID],
                                                         [letters[2], EOS_ID]]
    assert "two options or more" in one.why and "all different" in same.why
    assert "no list of texts" in numbers.why and "one of" in alone.why
    scored, = lines(tmp_path, {**given, "target": "ab"}, needs_target=True)
    assert "the \"target\" is to be scored" in scored.why


@pytest.mark.parametrize("width", [1, 2, 4])
def test_wave_files_of_any_width(tmp_path, width):
    samples = np.sin(np.arange(400) / 9) * 0.8
    stereo = np.stack([samples, samples / 2], axis=1).reshape(-1)
    write_wave(tmp_path / "a.wav", stereo, width=width, channels=2)
    found, rate = read_sound(tmp_path / "a.wav")
    assert rate == 8000
    np.testing.assert_allclose(found, samples * 0.75, atol=2.0**(2 - 8 * width))


def test_a_recording_is_padded_to_whole_patches(tmp_path):
    samples = np.sin(np.arange(1000) / 3) * 0.5
    write_wave(tmp_path / "a.wav", samples)
    line, = lines(tmp_path, {"audio": "a.wav", "text": "x"})
    read, _ = read_sound(tmp_path / "a.wav")
    assert MEL.num_frames(1000) == 8
    expected = log_mel_spectrogram(read, MEL)
    assert np.array_equal(line.example["inputs/audio/input"], patchify(expected, OBJECTIVE.audio))
    write_wave(tmp_path / "a.wav", samples[:900])
    line, = lines(tmp_path, {"audio": "a.wav"})
    assert line.example["inputs/audio/input"].shape == (4, 32)


@pytest.mark.parametrize(("fields", "message"), [
    ({"text": "a" * 9}, "text is too long (11 tokens, with prefix and end, at most 10)"),
    ({"text": "a" * 8, "image": "a.png"},
     "too long together (26 tokens and patches, at most 24)"),
    ({"audio": "long.wav"}, "recording is too long (20 frames, at most 16)"),
    ({"frames": ["a.png", "a.png"]}, "the model reads no frames"),
    ({"frames": []}, "the video has no frames"),
    ({"frames": "a.png"}, "not a list of paths"),
    ({"images": ["a.png"]}, "unknown field 'images'"),
    ({"audio": "a.png"}, "recording cannot be read"),
    ({"audio": "none.wav"}, "recording cannot be read"),
    ({"image": "none.png"}, "image cannot be read"),
    ({"image": "long.wav"}, "image cannot be read"),
    ({}, 'not an object with one of "text"'),
])
def test_what_does_not_fit_is_named_with_its_limit(tmp_path, fields, message):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    write_wave(tmp_path / "long.wav", np.zeros(128 * 18))
    bad, good = lines(tmp_path, fields, {"text": "a"})
    assert isinstance(bad, BadLine) and bad.number == 1 and message in bad.why
    assert good.number == 2


def test_pictures_and_recordings_of_other_kinds_are_converted(tmp_path):
    (tmp_path / "deep.png").write_bytes(media.png(np.full((8, 8), 0x8000, np.uint16)))
    clear = np.zeros((8, 8, 4), np.uint8)
    (tmp_path / "clear.png").write_bytes(media.png(clear))
    (tmp_path / "slow.wav").write_bytes(media.wav(media.hum(0.1, 8000, 1000), 8000))
    (tmp_path / "fast.wav").write_bytes(media.wav(media.hum(0.1, 16000, 1000), 16000))
    (tmp_path / "empty.wav").write_bytes(media.wav(np.zeros(0), 8000))
    deep, clear, slow, fast, empty = lines(
        tmp_path, {"image": "deep.png"}, {"image": "clear.png"}, {"audio": "slow.wav"},
        {"audio": "fast.wav"}, {"audio": "empty.wav"})
    np.testing.assert_allclose(deep.example["inputs/image/input"], 128 / 255, atol=1e-6)
    np.testing.assert_allclose(clear.example["inputs/image/input"], 1.0, atol=1e-6)
    slow, fast = (line.example["inputs/audio/input"] for line in (slow, fast))
    assert slow.shape == fast.shape and np.abs(slow[:2] - fast[:2]).mean() < 0.1
    assert "no samples" in empty.why
    refusing = _hear(RecordingConfig(MEL, SegmentConfig(128 * 15, 0), other_rates="refuse"))
    bad, = lines(tmp_path, {"audio": "fast.wav"}, hear=refusing)
    assert "16000 Hz, not 8000" in bad.why


def test_files_are_read_as_tasks_read_them(tmp_path):
    """Those of tests/tasks/test_mistakes.py; each line names what it refuses."""
    wanted = media.unusual_pictures()
    sound = media.hum(0.1, 8000, 1000)
    sounds = media.unusual_sounds(sound, 8000)
    files = {name: data for name, (data, _) in wanted.items()} | sounds | {
        "wide": media.png(np.full((1, 10_000), 200, np.uint8)), "plain": media.wav(sound, 8000),
        "fast": media.wav(media.hum(0.1, 44100, 1000), 44100),
        "not a number": media.riff(np.full((800, 1), np.nan, "<f4"), 8000),
        "logarithms": media.riff(np.ones((800, 1), "<i2"), 8000, tag=7)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = dict(zip(files, lines(tmp_path, *(
        {"image" if name in wanted or name == "wide" else "audio": name} for name in files)),
        strict=True))
    for name, (_, (red, green, blue)) in wanted.items():
        grey = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
        np.testing.assert_allclose(found[name].example["inputs/image/input"][:8].mean(), grey,
                                   atol=0.02, err_msg=name)
    assert found["wide"].example["inputs/image/input"].max() > 0.5
    heard = {name: found[name].example["inputs/audio/input"] for name in (*sounds, "plain", "fast")}
    for name in heard:
        assert np.abs(heard[name] - heard["plain"])[:2].mean() < 0.1, name
    for name, why in (("not a number", "not finite"), ("logarithms", "another kind than PCM")):
        assert why in found[name].why and name in found[name].why


def test_padding_is_left_out_where_tasks_leave_it_out(tmp_path):
    Image.fromarray(np.full((8, 4), 200, np.uint8)).save(tmp_path / "tall.png")
    whole, = lines(tmp_path, {"image": "tall.png"})
    given, = lines(tmp_path, {"image": "tall.png"}, chosen={"image_input_patches"})
    assert len(whole.example["inputs/image/input"]) == 16
    assert given.example["inputs/image/pos_ids"].tolist() == [1, 2, 5, 6, 9, 10, 13, 14]
    assert (given.example["inputs/image/input"] > 0.5).all()


def test_frames_and_long_recordings_become_histories(tmp_path):
    goal = dataclasses.replace(
        OBJECTIVE, input_modalities=ROW_ORDER, image_history=FrameSpec(
            PatchSpec(2, channels=1), (2, 2), 3, max_frames=2),
        audio_history=FrameSpec(PatchSpec((4, 8), channels=1), (4, 2), 2))
    spec = batch_spec(DatasetConfig("made up", {
        "inputs": 32, "targets": 8, "inputs/image_history": 6, "inputs/audio_history": 4}, 1), goal)
    segments = RecordingConfig(MEL, SegmentConfig(128 * 15, 0), max_segments=4)
    known = {"objective": goal, "spec": spec, "hear": _hear(segments),
             "grids": {"image": (4, 4), "audio": (4, 2)}}
    for number, grey in enumerate((100, 200)):
        Image.fromarray(np.full((4, 4), grey, np.uint8)).save(tmp_path / f"{number}.png")
    write_wave(tmp_path / "a.wav", media.hum(0.6, 8000))  # two segments and a half
    write_wave(tmp_path / "long.wav", media.hum(0.9, 8000))
    video, many, broken, sound, too_long, much = lines(
        tmp_path, {"text": "x", "frames": ["0.png", "1.png"]}, {"frames": ["0.png"] * 3},
        {"frames": ["0.png", "a.wav"]}, {"audio": "a.wav"}, {"audio": "long.wav"},
        {"frames": ["0.png"] * 2, "audio": "a.wav", "text": "a" * 9, "image": "0.png"}, **known)
    given = video.example["inputs/image_history/input"]
    assert given.shape == (2, 4, 4) and np.allclose(given.mean((1, 2)) * 255, (100, 200))
    assert video.fields["frames"] == ["0.png", "1.png"]
    assert many.why == "an example has too many frames (3, at most 2)"
    assert "a.wav" in broken.why and "cannot be read" in broken.why
    assert sound.example["inputs/audio/input"].shape == (8, 32)
    assert sound.example["inputs/audio_history/input"].shape == (2, 8, 32)
    assert "the audio_history is too long (6 slots, at most 4)" in too_long.why
    assert much.why.startswith("the inputs are too long together (45 ")
    bad, = lines(tmp_path, {"audio": "a.wav"}, hear=_hear(segments))
    assert "too long for a model without audio_history (3 segments)" in bad.why


def test_recordings_need_a_spectrogram(tmp_path):
    write_wave(tmp_path / "a.wav", np.zeros(1000))
    bad, = lines(tmp_path, {"audio": "a.wav"}, hear=None)
    assert "log_mel is not bound" in bad.why
    with pytest.raises(UserError, match="cannot be read"):
        list(reader().read(tmp_path / "gone.jsonl"))


def test_a_line_that_is_not_utf8_is_bad_and_the_others_are_read(tmp_path):
    path = tmp_path / "inputs.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe"}\n{"text": "ab"}\n')
    bad, good = reader().read(path)
    assert bad.number == 1 and "not JSON" in bad.why and good.fields == {"text": "ab"}
