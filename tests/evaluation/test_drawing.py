"""`vishwam infer` draws and sounds: by the model's own codecs, or by one that was trained apart."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from evaluation import small_run
from models import test_codecs_in_model as tiny
from models.test_hifi_gan import GOLDEN as VOCODER_GOLDEN
from models.test_hifi_gan import TINY as VOCODER
from PIL import Image

from vishwam_t5x import drawing
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.recordings import decode_wave, encode_wave
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.data.spectrogram import LogMelConfig
from vishwam_t5x.data.waveform import GriffinLimConfig, waveform_of
from vishwam_t5x.evaluation.generator import Generator
from vishwam_t5x.evaluation.predictions import Prediction, read_lines
from vishwam_t5x.evaluation.rendering import CodecFile, Renderer, SoundConfig
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.infer import infer
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh

LOG_MEL = LogMelConfig(sample_rate=1000, fft_size=64, hop=16, num_mels=8, max_hertz=500.0,
                       shift=5.0945, scale=3.8312)
SOUND = SoundConfig(log_mel=LOG_MEL,
                    griffin_lim=GriffinLimConfig(iterations=2, filter_iterations=5))


def save(folder, params, step):
    saver = Checkpoints(folder / "checkpoints", CheckpointConfig())
    saver.save(step, {"params": params})
    saver.close()
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(MODEL_DIR of the model with codecs, vocabulary, file of inputs)."""
    folder = tmp_path_factory.mktemp("run")
    small_run.vocabulary(folder / "text.model")
    lines = folder / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "draw a two")))
    return save(folder, tiny.model()[1], 3), str(folder / "text.model"), str(lines)


def written(run, tmp_path, target, **more):
    model_dir, vocabulary, lines = run
    layout = tiny.VocabularyLayout(base_size=64, num_sentinels=4, num_location_bins=0)
    found = infer(
        tiny.model()[0], model_dir, tiny.objective(vocabulary=layout, text_weights={"S": 1.0}),
        DatasetConfig("tiny", {"inputs": 32, "targets": 32}, 2), input_file=lines,
        output_file=str(tmp_path / "out.jsonl"), target=target, vocabulary=vocabulary,
        decode_batch_size=2, compilation_cache_dir="", **more)
    assert found.num_predictions == 2 and not found.bad_lines
    return list(read_lines(tmp_path / "out.jsonl"))


def test_the_models_own_codecs_draw_and_sound(run, tmp_path):
    module, params = tiny.model()
    for line in written(run, tmp_path, "audio", sound=SOUND):
        assert len(line["prediction"]) == 8 and line["sound"] == f"out-{line['example']}.wav"
        waveform, rate = decode_wave((tmp_path / line["sound"]).read_bytes())
        assert rate == 1000 and waveform.shape == (15 * 16,)  # from the first frame to the last
        spectrogram = module.apply({"params": params}, np.asarray([line["prediction"]]), "audio",
                                   method="render")[0]
        expected = waveform_of(np.asarray(spectrogram), LOG_MEL, SOUND.griffin_lim)
        loudest = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(waveform, expected / loudest, atol=1e-3)


def check_pictures(folder, lines, renderer):
    """Returns the pictures that the lines name, which are those of their codes."""
    assert [line["picture"] for line in lines] == ["out-1.png", "out-2.png"]
    both = renderer.many(np.asarray([line["prediction"] for line in lines]))
    for line, pixels in zip(lines, both, strict=True):
        with Image.open(folder / line["picture"]) as picture:
            assert picture.size == (4, 4)
            np.testing.assert_array_equal(np.asarray(picture), np.rint(pixels[..., 0] * 255))
    return both


@pytest.mark.slow
def test_the_models_own_codec_draws(run, tmp_path):
    params = tiny.model()[1]["target_encoders_image"]["discrete_vae"]
    check_pictures(tmp_path, written(run, tmp_path, "image"), Renderer(tiny.IMAGE, params))


def test_a_codec_trained_apart_draws(run, tmp_path):
    params = tiny.model()[1]["target_encoders_image"]["discrete_vae"]
    apart = CodecFile(tiny.IMAGE, save(tmp_path / "codec", {"discrete_vae": params}, 5))
    codes = np.asarray([[1, 2, 3, 4], [5, 6, 7, 15]])
    drawn = drawing.drawer(tiny.CONFIG, {}, make_mesh(MeshConfig()), ("image",), apart)
    lines = list(drawn.written([
        Prediction("x", number, "", {}, None, own, 0.0, written=("image",))
        for number, own in enumerate(codes, 1)], tmp_path / "out.jsonl", of_tasks=False))
    assert "written" not in json.loads(lines[0].to_json())
    both = check_pictures(tmp_path, [json.loads(line.to_json()) for line in lines], apart)
    # The same codec as a part of the model, and what it makes of pictures.
    inside = CodecFile(tiny.IMAGE, run[0])
    np.testing.assert_array_equal(apart(codes[0]), both[0])
    for mine, theirs in zip(jax.tree.leaves(inside.renderer._params), jax.tree.leaves(params),
                            strict=True):
        np.testing.assert_array_equal(mine, theirs)
    pixels = np.stack([clean["image_targets"] for clean in tiny.clean_examples()[:1]])
    np.testing.assert_array_equal(apart.encode(pixels), tiny.encode("image")(
        {"params": params}, tiny.IMAGE.prepare(pixels)))
    assert drawing.described(apart, SOUND)["image codec"]


def test_lines_of_tasks_and_of_several_modalities(tmp_path):
    codes = np.arange(4)
    drawn = drawing.Drawer({"image": small_run.pixels})
    lines = [Prediction("a/b", 4, "", {}, None, {"text": "x", "image": codes}, 0.0,
                        written=("text", "image")),
             Prediction("a/b", 5, "", {}, None, "x", 0.0, written=("text",))]
    named = list(drawn.written(lines, tmp_path / "test.jsonl", of_tasks=True))
    assert named[0].extra == {"picture": "test-a_b-4.png"} and not named[1].extra
    assert (tmp_path / "test-a_b-4.png").exists()
    assert drawing.drawer(tiny.CONFIG, {}, make_mesh(MeshConfig()), ("text",)).renders == {}


def test_a_vocoder_sounds(tmp_path):
    with np.load(VOCODER_GOLDEN) as file:
        golden = dict(file)
    np.savez(tmp_path / "vocoder.npz", **{name.removeprefix("weights/"): array for name, array in
                                          golden.items() if name.startswith("weights/")})
    log_mel = LogMelConfig(num_mels=6, floor=1e-9, ceiling=1e9, shift=2.0, scale=3.0)
    sound = SoundConfig(log_mel=log_mel, vocoder_path=str(tmp_path / "vocoder.npz"),
                        vocoder=VOCODER, vocoder_reads="log")
    np.testing.assert_allclose(sound.waveform((golden["log_mel"][0] + 2) / 3),
                               golden["waveform"][0], atol=1e-5)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no codec of these sizes"):
        CodecFile(tiny.IMAGE, save(tmp_path, {"discrete_vae": {"x": np.zeros(3)}}, 1))(np.arange(4))
    with pytest.raises(UserError, match="a sound cannot be made of codes"):
        drawing.check(small_run.small_model.model().config, "audio", None, SoundConfig())
    with pytest.raises(UserError, match="config of a codec"):
        CodecFile(3, "x")
    with pytest.raises(UserError, match="vocoder_reads"):
        SoundConfig(vocoder_reads="wave")


def test_a_loud_waveform_is_made_quieter():
    waveform, rate = decode_wave(encode_wave(np.asarray([0.0, 2.0, -1.0]), 8000))
    np.testing.assert_allclose(waveform, [0, 1, -0.5], atol=1e-4)
    assert rate == 8000


@pytest.mark.slow
def test_pixels_are_scored_as_their_codes(run):
    module, params = tiny.model()
    generator = Generator(module, make_mesh(MeshConfig()), None, 2, {}, 8, {})
    examples = tiny.clean_examples()[:2]
    found = [[scored.scores for scored in sorted(generator.score(params, [
        Request.from_example(goal.apply(clean, seed=0, example=0), tag)
        for tag, clean in enumerate(cleans)]), key=lambda scored: scored.tag)]
        for goal, cleans in ((tiny.objective(), examples), (
            tiny.objective(codecs=None), [tiny.with_codes(clean) for clean in examples]))]
    assert found[0][0]["image"] < 0 and found[0][1]["audio"] < 0
    assert found[0] == found[1]
