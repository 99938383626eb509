"""`vishwam infer` reads pictures and recordings as the codes that the model was trained on."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import small_run
from evaluation.test_drawing import LOG_MEL, SOUND, save
from flax.core import meta
from models import test_codecs_in_model as tiny

import media
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import recordings
from vishwam_t5x.data.source import DatasetConfig, batch_spec
from vishwam_t5x.data.spectrogram import SegmentConfig
from vishwam_t5x.evaluation.coding import Coder
from vishwam_t5x.evaluation.generator import Generator
from vishwam_t5x.evaluation.input_codes import coded_inputs
from vishwam_t5x.evaluation.input_file import BadLine, InputReader
from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.evaluation.predictions import read_lines
from vishwam_t5x.evaluation.rendering import CodecFile
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.infer import infer
from vishwam_t5x.models.config import CodeInput
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.objectives.vocabulary import VocabularyLayout
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
from vishwam_t5x.task_lookup import tokenizer

LAYOUT = VocabularyLayout(base_size=64, num_sentinels=4, num_location_bins=0)
CONFIG = dataclasses.replace(tiny.CONFIG, inputs=(
    dataclasses.replace(tiny.CONFIG.inputs[0], vocab_size=LAYOUT.table_size),
    CodeInput(modality="image", vocab_size=18, grid=(2, 2)),
    CodeInput(modality="audio", vocab_size=18, grid=(4, 2))), targets=(
    dataclasses.replace(tiny.CONFIG.targets[0], vocab_size=LAYOUT.table_size),
    *tiny.CONFIG.targets[1:]))
OBJECTIVE = tiny.objective(vocabulary=LAYOUT, input_modalities=("text", "image", "audio"),
                           code_inputs=("image", "audio"), text_weights={"S": 1.0},
                           image_weights={"S": 1.0}, audio_weights={"S": 1.0})
DATA = DatasetConfig("tiny", {"inputs": 32, "targets": 32}, 2)
PIXELS = [np.random.default_rng(seed).integers(0, 256, (4, 4)).astype(np.uint8)
          for seed in range(2)]
SAMPLES = media.hum(0.2, 1000, 100)
LINES = [{"text": "what is this", "image": "0.png", "audio": "a.wav", "target": "one"},
         {"text": "what is this", "image": "1.png", "audio": "a.wav", "target": "one"}]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = meta.unbox(jax.eval_shape(EncoderDecoder(CONFIG).init, jax.random.key(0)))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(
        rng.normal(size=leaf.shape, scale=0.5), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the files, their lines and a vocabulary are."""
    folder = tmp_path_factory.mktemp("codes")
    small_run.vocabulary(folder / "text.model")
    for number, pixels in enumerate(PIXELS):
        (folder / f"{number}.png").write_bytes(media.png(pixels))
    (folder / "a.wav").write_bytes(media.wav(SAMPLES, 1000))
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def codes_of(params, modality, signal):
    codec = tiny.CODECS[modality]
    return np.asarray(tiny.encode(modality)(
        {"params": params[f"target_encoders_{modality}"]["discrete_vae"]},
        codec.prepare(jnp.asarray(signal)[None])))[0]


def spectrogram(folder):
    waveform, rate = recordings.decode_wave((folder / "a.wav").read_bytes())
    config = recordings.RecordingConfig(LOG_MEL, SegmentConfig(15 * LOG_MEL.hop, 0))
    return recordings.spectrograms(waveform, rate, config).segments[0]


@pytest.mark.slow
def test_files_are_scored_as_their_codes_to_the_bit(folder, params, tmp_path):
    """As a task that has run the codec gives them, and as pixels among the targets are coded."""
    found = infer(EncoderDecoder(CONFIG), save(tmp_path, params, 3), OBJECTIVE, DATA, mode="score",
                  input_file=str(folder / "in.jsonl"), output_file=str(tmp_path / "out.jsonl"),
                  vocabulary=str(folder / "text.model"), decode_batch_size=2, sound=SOUND,
                  compilation_cache_dir="")
    assert not found.bad_lines
    lines = list(read_lines(tmp_path / "out.jsonl"))
    assert [line["image"] for line in lines] == ["0.png", "1.png"]
    assert lines[0]["input_slots"]["image"] == 4 and lines[0]["input_slots"]["audio"] == 8
    encode = tokenizer(str(folder / "text.model"), LAYOUT).encode
    goal = dataclasses.replace(OBJECTIVE, codecs=None)
    requests = [Request.from_example(goal.apply({
        "text_inputs": encode(line["text"]), "text_targets": encode(line["target"]),
        "image_input_codes": codes_of(params, "image", pixels[..., None]),
        "audio_input_codes": codes_of(params, "audio", spectrogram(folder)),
    }, seed=0, example=0), number) for number, (line, pixels) in enumerate(
        zip(LINES, PIXELS, strict=True))]
    generator = Generator(EncoderDecoder(CONFIG), make_mesh(MeshConfig()), None, 2, {}, 8, {})
    wanted = {one.tag: one.scores["text"] for one in generator.score(params, requests)}
    assert [line["score"] for line in lines] == [wanted[0], wanted[1]]
    assert wanted[0] != wanted[1]


def reader():
    return InputReader(OBJECTIVE, "text", lambda text: np.full(len(text), 5, np.int32),
                       batch_spec(DATA, OBJECTIVE), {"image": (2, 2), "audio": (4, 2)},
                       coded=coded_inputs(CONFIG, {}, LOG_MEL))


def test_codes_are_those_of_the_model_or_of_a_codec_apart(folder, params, tmp_path):
    apart = CodecFile(tiny.IMAGE, save(tmp_path / "codec", {
        "discrete_vae": params["target_encoders_image"]["discrete_vae"]}, 5))
    found = coded_inputs(CONFIG, {"image": apart, "audio": lambda codes: codes}, LOG_MEL)
    assert found["image"].encode == apart.encode and found["audio"].encode is None
    read = InputReader(OBJECTIVE, "text", lambda text: np.full(len(text), 5, np.int32),
                       reader().spec, {}, coded=found)
    request = Request.from_example(read.example({"image": "0.png", "audio": "a.wav"}, str(folder)))
    assert request.inputs["inputs/image/signal"].shape == (1, 4, 4, 1)
    assert request.slots()["image"] == 4 and request.slots()["audio"] == 8
    with pytest.raises(UserError, match="too long together") as error:
        read.example({"text": "a" * 25, "image": "0.png", "audio": "a.wav"}, str(folder))
    assert "at most 32" in error.value.got
    coder = Coder(EncoderDecoder(CONFIG), Placement(make_mesh(MeshConfig()), None, 2))
    coder.use({"image": found["image"].encode})
    first, plain = coder.read(params, [request, Request({"inputs/text/tokens": np.arange(3)})])
    assert first.inputs["inputs/image/tokens"].tolist() == (
        codes_of(params, "image", PIXELS[0][..., None]) + 2).tolist()
    assert first.inputs["inputs/audio/tokens"].tolist() == (
        codes_of(params, "audio", spectrogram(folder)) + 2).tolist()
    assert not [name for name in first.inputs if name.endswith("/signal")]
    assert plain.inputs.keys() == {"inputs/text/tokens"}


def test_what_cannot_be_coded_is_named(folder, tmp_path):
    (folder / "long.wav").write_bytes(media.wav(media.hum(0.3, 1000, 100), 1000))
    read = reader()
    for fields, words in (({"audio": "long.wav"}, "recording is too long"),
                          ({"image": "a.wav"}, "image cannot be read"),
                          ({"audio": "none.wav"}, "recording cannot be read")):
        bad = read.line(folder / "in.jsonl", 1, json.dumps(fields).encode())
        assert isinstance(bad, BadLine) and words in bad.why
    without = dataclasses.replace(read, coded={})
    bad = without.line(folder / "in.jsonl", 1, b'{"image": "0.png"}')
    assert "no codec makes them" in bad.why and "decode_image" in bad.why
    with pytest.raises(UserError, match="more or fewer codes"):
        coded_inputs(dataclasses.replace(CONFIG, inputs=(
            CONFIG.inputs[0], dataclasses.replace(CONFIG.inputs[1], grid=(4, 4)))), {}, LOG_MEL)
    with pytest.raises(UserError, match="other spectrograms"):
        coded_inputs(CONFIG, {}, dataclasses.replace(LOG_MEL, num_mels=6))
