"""`vishwam infer` and `vishwam evaluate` as one job of two processes: the files of one process."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import process_groups
import pytest
from evaluation import small_model, small_run
from flax.core import meta
from models import test_codecs_in_model as codecs

import helpers
import media
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.evaluation.predictions import read_lines
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

pytestmark = pytest.mark.slow
# On four devices and on two alike: rows are split over all of them.
GIN = f"{small_run.GIN}\nBATCH_SIZE = 4\n"


CODECS = """
from __gin__ import dynamic_registration
from vishwam_t5x.data import spectrogram
from vishwam_t5x.data import waveform
from vishwam_t5x.evaluation import rendering
from vishwam_t5x.models import config
from vishwam_t5x.models.codecs import audio_vqgan
from vishwam_t5x.models.codecs import image_vqgan
from vishwam_t5x.objectives import denoisers

include '{tiny}'

MODEL_DIR = '{model_dir}'
config.EncoderDecoderConfig.targets = (
    @config.TextOutput(), @config.CodeOutput(), @sound/config.CodeOutput())
config.CodeOutput.codec = @image_vqgan.ImageVQGANConfig()
sound/config.CodeOutput:
  modality = 'audio'
  grid = (2, 4)
  layout = (4, 2)
  codec = @audio_vqgan.AudioVQGANConfig()
denoisers.MixtureOfDenoisers.target_modalities = ('text', 'image', 'audio')
image_vqgan.ImageVQGANConfig:
  num_codes = 16
  resolution = 4
  channels = 1
  width = 4
  width_factors = (1, 1)
  blocks = 1
  attention_resolutions = ()
  norm_groups = 2
audio_vqgan.AudioVQGANConfig:
  num_codes = 16
  code_dim = 4
  frames = 16
  mels = 8
  patch = 4
  encoder = @audio_vqgan.StackConfig()
  decoder = @audio_vqgan.StackConfig()
audio_vqgan.StackConfig:
  emb_dim = 8
  num_layers = 1
  num_heads = 2
  head_dim = 4
  mlp_dim = 8
rendering.SoundConfig:
  log_mel = @spectrogram.LogMelConfig()
  griffin_lim = @waveform.GriffinLimConfig()
spectrogram.LogMelConfig:
  sample_rate = 1000
  fft_size = 64
  hop = 16
  num_mels = 8
  max_hertz = 500.0
waveform.GriffinLimConfig:
  iterations = 2
  filter_iterations = 5
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(gin file, cache directory, folder)."""
    folder = tmp_path_factory.mktemp("run")
    module = small_model.model()
    cache_dir, model_dir = small_run.write(folder, module, small_model.params(module))
    gin_file = folder / "tiny.gin"
    gin_file.write_text(f"{GIN}CACHE_DIR = '{cache_dir}'\nMODEL_DIR = '{model_dir}'\n")
    return str(gin_file), cache_dir, folder


@pytest.fixture(scope="module")
def drawing(run, tmp_path_factory):
    """The same of a model that holds the codecs of its image and its sound."""
    gin_file, cache_dir, _ = run
    folder = tmp_path_factory.mktemp("drawing")
    made = small_model.model().config
    module = EncoderDecoder(dataclasses.replace(made, targets=(
        made.targets[0], dataclasses.replace(made.targets[1], codec=codecs.IMAGE),
        codecs.CONFIG.targets[2])))
    rng = np.random.default_rng(0)
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0)))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.5).astype(leaf.dtype),
                          shapes)
    saver = Checkpoints(folder / "run" / "checkpoints", CheckpointConfig())
    saver.save(7, {"params": params})
    saver.close()
    path = folder / "drawing.gin"
    path.write_text(CODECS.format(tiny=gin_file, model_dir=folder / "run"))
    return str(path), cache_dir, folder


def job(run, count, *arguments, odd=(), homes=()):
    """Runs a verb in `count` processes of two devices each; returns (exit codes, what they said).

    `odd`: further arguments of all but the first; `homes`: where '~' is for each."""
    gin_file, cache_dir, folder = run
    joined = () if count == 1 else (f"--coordinator_address=localhost:{process_groups.free_port()}",
                                    f"--process_count={count}")
    env = helpers.environment(2, {"PYTHONPATH": f"{helpers.ROOT}/tests",
                                  "VISHWAM_CACHE_DIR": cache_dir,
                                  "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")})
    processes = [subprocess.Popen(
        [sys.executable, "-m", "vishwam_t5x", arguments[0], f"--gin_file={gin_file}",
         *arguments[1:], *joined, *([f"--process_index={index}"] if joined else []),
         *(odd if index else ())],
        env={**env, **({"HOME": str(homes[index])} if homes else {})}, cwd=helpers.ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for index in range(count)]
    said = [process.communicate(timeout=1800)[0] for process in processes]
    return [process.returncode for process in processes], said


def equal(path: pathlib.Path, other: pathlib.Path) -> None:
    lines, others = list(read_lines(path)), list(read_lines(other))
    assert len(lines) == len(others) > 0
    for line, theirs in zip(lines, others, strict=True):
        assert line.keys() == theirs.keys()
        for name, value in line.items():
            assert theirs[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float)
                                    else value), name


def test_infer(run, tmp_path):
    for count in (1, 2):
        codes, said = job(run, count, "infer", f"--output_file={tmp_path}/{count}.jsonl")
        assert codes == [0] * count, "\n".join(said)
        assert ["18 predictions" in text for text in said] == [True, False][:count]
    equal(tmp_path / "1.jsonl", tmp_path / "2.jsonl")


def test_evaluate(run, tmp_path):
    for count in (1, 2):
        codes, said = job(run, count, "evaluate", f"--gin.EVAL_OUTPUT_DIR='{tmp_path}/{count}'")
        assert codes == [0] * count, "\n".join(said)
        assert ["exact_match" in text for text in said] == [True, False][:count]
    for name in ("metrics.jsonl", "predictions-captions.jsonl", "predictions-drawings.jsonl"):
        equal(tmp_path / "1" / "7" / name, tmp_path / "2" / "7" / name)
    # What one process of several did is done for the other way to run it, too.
    codes, said = job(run, 1, "evaluate", f"--gin.EVAL_OUTPUT_DIR='{tmp_path}/2'",
                      "--checkpoint=all")
    assert codes == [0] and "nothing was left to evaluate" in said[0]


def test_what_is_wrong_in_one_process_ends_both_alike(run, tmp_path):
    codes, said = job(run, 2, "infer", f"--output_file={tmp_path}/a.jsonl", odd=("--mode=score",))
    assert codes == [2, 2] and all("mode" in text and "differ" in text for text in said)
    # Only process 0 writes, and it cannot.
    (tmp_path / "b.jsonl").write_text("somebody's\n")
    codes, said = job(run, 2, "infer", f"--output_file={tmp_path}/b.jsonl")
    assert codes == [2, 2], "\n".join(said)
    assert "nobody knows with what settings" in said[0] and "process 0" in said[1]
    assert (tmp_path / "b.jsonl").read_text() == "somebody's\n"
    # What one host cannot read, both leave out.
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
        {"text": "what is this"}, {"image": "gone.png"}, {"text": "draw a one"})))
    codes, said = job(run, 2, "infer", f"--input_file={tmp_path}/in.jsonl",
                      f"--output_file={tmp_path}/c.jsonl")
    assert codes == [0, 0], "\n".join(said)
    assert [line["example"] for line in read_lines(tmp_path / "c.jsonl")] == [1, 3]


def test_hosts_with_other_files_of_the_same_name_are_refused(run, tmp_path):
    """Of the same number of lines: nothing else would notice."""
    homes = [tmp_path / "0", tmp_path / "1"]
    for home, text in zip(homes, ("draw a one", "draw a two"), strict=True):
        home.mkdir()
        (home / "in.jsonl").write_text(json.dumps({"text": text}) + "\n")
    codes, said = job(run, 2, "infer", "--input_file=~/in.jsonl",
                      f"--output_file={tmp_path}/d.jsonl", homes=homes)
    assert codes == [2, 2], "\n".join(said)
    assert all("the processes differ in the data" in text for text in said)
    assert not (tmp_path / "d.jsonl").exists()


def test_hosts_with_other_pictures_of_the_same_name_are_refused(run, tmp_path):
    """The lines are the same: only the pictures that they name are not."""
    homes = [tmp_path / "0", tmp_path / "1"]
    for number, home in enumerate(homes):
        home.mkdir()
        (home / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
            {"text": "draw a one"}, {"text": "what is this", "image": "same.png"},
            {"text": "what is this", "image": "a.png"})))
        (home / "same.png").write_bytes(media.png(np.zeros((4, 4), np.uint8)))
        (home / "a.png").write_bytes(media.png(np.full((4, 4), number, np.uint8)))
    codes, said = job(run, 2, "infer", "--input_file=~/in.jsonl",
                      f"--output_file={tmp_path}/d.jsonl", homes=homes)
    assert codes == [2, 2], "\n".join(said)
    assert all("different files of one name" in text and "a.png" in text for text in said)
    assert not (tmp_path / "d.jsonl").exists()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*")
            if path.suffix in (".png", ".wav")}


APART = ("--gin.DECODE_IMAGE=@rendering.CodecFile()",
         "--gin.rendering.CodecFile.codec=@image_vqgan.ImageVQGANConfig()",
         "--gin.rendering.CodecFile.checkpoint='{place}'")


@pytest.mark.parametrize(("what", "ending", "number"), [
    (("--tasks=drawings",), ".png", 5), (("--input_file={lines}", "--target=audio"), ".wav", 3),
    (("--input_file={lines}", "--target=image", *APART), ".png", 3)])
def test_what_two_processes_draw_is_written_once_and_is_what_one_draws(drawing, tmp_path, what,
                                                                       ending, number):
    """Each has a home of its own: what the second one wrote would lie in its."""
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"text": f"draw a {word}"}) + "\n"
                             for word in ("one", "two", "three")))
    flags = [flag.format(lines=lines, place=drawing[2] / "run") for flag in what]
    homes = [tmp_path / name for name in ("alone", "first", "second")]
    for home in homes:
        home.mkdir()
    codes, said = job(drawing, 1, "infer", *flags, "--output_file=~/a.jsonl", homes=homes[:1])
    assert codes == [0], "\n".join(said)
    codes, said = job(drawing, 2, "infer", *flags, "--output_file=~/a.jsonl", homes=homes[1:])
    assert codes == [0, 0], "\n".join(said)
    equal(homes[0] / "a.jsonl", homes[1] / "a.jsonl")
    alone, together, rest = map(files, homes)
    assert len(alone) == number and all(name.endswith(ending) for name in alone)
    assert together == alone and not rest
    assert not [path for path in homes[2].rglob("*") if path.is_file()]
