"""A codec's loss, and its training as `vishwam train` runs it."""

from __future__ import annotations

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_runs
from flax.core import meta
from PIL import Image

from helpers import vishwam
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models.codecs.audio_vqgan import AudioVQGANConfig, StackConfig
from vishwam_t5x.models.codecs.image_vqgan import ImageVQGANConfig
from vishwam_t5x.models.codecs.trainer import CodecTrainer, CodecTrainingConfig
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.reconstruction import Reconstruction
from vishwam_t5x.reconstructions import draw

RECIPE = "--gin_file=gin/recipes/codec_digits_cpu.gin"
TINY = ImageVQGANConfig(num_codes=8, resolution=8, channels=1, width=4, width_factors=(1, 2),
                        blocks=1, attention_resolutions=(), norm_groups=2)
CONFIG = CodecTrainingConfig(codec=TINY, patch=(4, 8), entropy=0.1)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)


def batch_of(pictures):
    """What the data pipeline makes of pictures, and a row that is empty."""
    objective = Reconstruction("image", PatchSpec((4, 8), 1))
    examples = [objective.apply({"image_inputs": picture, "text_inputs": np.zeros(3, np.int32)},
                                seed=0, example=index) for index, picture in enumerate(pictures)]
    patches = np.stack([each["inputs/image/input"] for each in examples])
    ones = np.ones((len(examples), 1), np.int32)
    return {"inputs/image/input": np.concatenate([patches, np.zeros_like(patches[:1])]),
            "targets/image/targets": np.zeros((len(examples) + 1, 1), np.int32),
            "targets/image/mask": np.concatenate([ones, 0 * ones[:1]])}


@pytest.fixture(scope="module")
def trained(pictures):
    model = CodecTrainer(CONFIG)
    return model, meta.unbox(jax.jit(model.init)(jax.random.key(0))), batch_of(pictures)


def test_loss_is_what_its_formula_says(trained, pictures):
    model, variables, batch = trained

    def everything(model, batch):
        return model(batch), model.reconstruct(batch), model.loss_sums(batch, LossConfig()), \
            model.discrete_vae.quantize.table()

    output, (before, after), sums, table = jax.jit(
        lambda variables, batch: model.apply(variables, batch, method=everything))(variables, batch)
    np.testing.assert_allclose(before[:3], pictures / 255, atol=1e-6)
    assert after.min() >= 0 and after.max() <= 1
    error = np.asarray(output.reconstruction - (2 * before - 1), np.float64)[:3]
    vectors, codes = (np.asarray(each, np.float64)[:3] for each in
                      (output.vectors, output.quantized))
    squares = np.mean(np.square(vectors - codes), (1, 2))
    distances = np.sum(np.square(vectors[:, :, None] - np.asarray(table, np.float64)), -1)
    chances = np.exp(-distances) / np.exp(-distances).sum(-1, keepdims=True)
    entropies = -np.sum(chances * np.log(chances), -1).mean(1)
    mean = chances.mean((0, 1))
    of_codes = 1.25 * squares + 0.1 * (entropies + np.sum(mean * np.log(mean)))
    expected = np.abs(error).mean((1, 2, 3)) + np.square(error).mean((1, 2, 3)) + of_codes
    image = sums["image"]
    np.testing.assert_allclose(image.loss, expected.sum(), rtol=1e-4)
    np.testing.assert_allclose(image.z_loss, of_codes.sum(), rtol=1e-4)
    assert image.weight == 3  # the empty row counts for nothing
    np.testing.assert_allclose(image.correct, (np.abs(error) < 0.25).mean((1, 2, 3)).sum(),
                               rtol=1e-5)


def test_every_parameter_learns(trained):
    model, variables, batch = trained

    def loss(variables):
        return model.apply(variables, batch, LossConfig(), method="loss_sums")["image"].loss

    gradients = jax.jit(jax.grad(loss))(variables)
    names = {jax.tree_util.keystr(path): float(jnp.abs(leaf).max())
             for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    # The key's bias moves all logits of a query alike.
    still = {name for name, size in names.items() if not size > 1e-9}
    assert all("['k']['bias']" in name for name in still), still


def test_audio_codecs_train_on_spectrograms_as_they_are():
    stack = StackConfig(emb_dim=8, num_layers=1, num_heads=2, head_dim=4, mlp_dim=8)
    config = CodecTrainingConfig(
        codec=AudioVQGANConfig(num_codes=8, code_dim=4, frames=16, mels=8, encoder=stack,
                               decoder=stack), patch=(8, 8))
    model = CodecTrainer(config)
    spectrogram = np.random.default_rng(0).normal(size=(16, 8, 1)).astype(np.float32)
    objective = Reconstruction("audio", PatchSpec(8, 1))
    example = objective.apply({"audio": spectrogram}, seed=0, example=0)
    assert objective.lengths({"audio": 2}, seed=0, example=0) == ({"audio": 2}, {"audio": 1})
    batch = {"inputs/audio/input": example["inputs/audio/input"][None],
             "targets/audio/targets": np.zeros((1, 1), np.int32),
             "targets/audio/mask": np.ones((1, 1), np.int32)}
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(0)))
    before, after = model.apply(variables, batch, method="reconstruct")
    np.testing.assert_array_equal(before[0], spectrogram)
    assert after.shape == before.shape
    sums = model.apply(variables, batch, LossConfig(), method="loss_sums")
    assert math.isfinite(sums["audio"].loss)
    assert config.patch_dims == {"audio": 64} and config.num_patches == 2


def test_work_is_counted():
    encoder_slot, picture = CONFIG.flops_per_slot
    wider = dataclasses.replace(CONFIG, codec=dataclasses.replace(TINY, width=8))
    assert encoder_slot == 0 and 2.5 < wider.flops_per_slot[1] / picture < 4.5


@pytest.mark.parametrize("make, message", [
    (lambda: CodecTrainingConfig(codec=TINY, patch=(3, 8)), "must divide"),
    (lambda: CodecTrainingConfig(codec=TINY, patch=(8, 8), commitment=-1.0), "commitment"),
    (lambda: CodecTrainingConfig(codec=TINY, patch=(8, 8), absolute=0.0, squared=0.0),
     "loss of its reconstruction"),
    (lambda: CodecTrainingConfig(codec=TINY, patch=(8, 8), temperature=0.0), "temperature"),
    (lambda: Reconstruction("text"), "modality"),
    (lambda: Reconstruction().apply({"text": np.zeros(3)}, seed=0, example=0), "no image to code"),
])
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_packed_rows_are_refused(trained):
    model, variables, batch = trained
    with pytest.raises(UserError, match="one whole picture"):
        model.apply(variables, {**batch, "inputs/row/index": np.zeros((4, 2), np.int32)})


def test_pictures_are_drawn_above_what_comes_back():
    before, after = np.zeros((17, 8, 8, 1), np.float32), np.ones((17, 8, 8, 1), np.float32)
    image = np.asarray(Image.open(io.BytesIO(draw(before, after))))
    assert image.shape == (2 * 104, 16 * 50)
    assert not image[:48, :48].any() and (image[50:98, :48] == 255).all()
    sound = np.zeros((1, 64, 32, 1), np.float32)
    sound[0, :, 0] = 1.0  # the lowest bin
    drawn = np.asarray(Image.open(io.BytesIO(draw(sound, sound, is_spectrogram=True))))
    assert drawn[31, :64].all() and not drawn[30, :64].any()


def run(folder, env, steps, *more):
    done = vishwam("train", RECIPE, f'--gin.MODEL_DIR="{folder}"', f"--gin.TRAIN_STEPS={steps}",
                   "--gin.train.use_tensorboard=False", *more, env=env)
    assert done.returncode == 0, done.stderr[-6000:]
    return training_runs.records(folder)


@pytest.mark.slow
def test_two_steps_through_the_verb(tmp_path, quickstart_cache):
    records = run(tmp_path / "run", quickstart_cache, 2, "--gin.LOG_PERIOD=1",
                  "--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=8",
                  "--gin.reconstructions.Reconstructions.max_examples=20")
    last = {name: value for record in records for name, value in record.items()}
    assert last["step"] == 2 and math.isfinite(last["eval/loss/image"])
    assert 1 <= last["reconstruction/codes_used"] <= 64
    picture = Image.open(tmp_path / "run" / "reconstructions.png")
    assert picture.size == (16 * 50, 2 * 104)


@pytest.mark.slow
def test_a_codec_learns_to_draw_digits_it_has_not_seen(tmp_path, quickstart_cache):
    records = run(tmp_path / "run", quickstart_cache, 1000)
    last = {name: value for record in records for name, value in record.items()}
    assert last["reconstruction/psnr"] > 20
    assert last["reconstruction/codes_used"] > 36
