"""`vishwam forward` gives the original's numbers of a stored model, and names what does not fit."""

from __future__ import annotations

import pathlib
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import t5_fixtures as t5

from helpers import vishwam
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core.errors import EXIT_USER_ERROR, UserError
from vishwam_t5x.core.trees import unflatten_names
from vishwam_t5x.evaluation.batch_file import T5X_FEATURES
from vishwam_t5x.forward import forward
from vishwam_t5x.models.config import CodeOutput, EncoderDecoderConfig, TextInput, TextOutput
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.objectives.losses import LossConfig

GOLDEN = pathlib.Path(__file__).parent / "golden" / "unified_io2"
# The text part of the tiny model behind the golden numbers; image is written too.
GIN = """
    from __gin__ import dynamic_registration
    from vishwam_t5x.models import config
    from vishwam_t5x.models import encoder_decoder

    PRECISION = 'float32'
    MODEL = @encoder_decoder.EncoderDecoder()
    encoder_decoder.EncoderDecoder.config = @config.EncoderDecoderConfig()
    config.EncoderDecoderConfig:
      emb_dim = 32
      num_heads = 4
      head_dim = 8
      mlp_dim = 64
      num_encoder_layers = 2
      num_decoder_layers = 3
      precision = %PRECISION
      inputs = (@config.TextInput(),)
      targets = (@config.TextOutput(), @config.CodeOutput())
    config.TextInput.vocab_size = 256
    config.TextOutput.vocab_size = 256
    config.CodeOutput:
      modality = 'image'
      vocab_size = 66
      grid = (6, 6)
"""
T5X = {"inputs/text/tokens": "encoder_input_tokens", "inputs/text/pos_ids": "encoder_positions",
       "targets/text/targets": "decoder_target_tokens",
       "targets/text/inputs": "decoder_input_tokens",
       "targets/text/mask": "decoder_loss_weights", "targets/text/pos_ids": "decoder_positions",
       "targets/text/segment_ids": "decoder_segment_ids"}


def model(**changes) -> EncoderDecoder:
    return EncoderDecoder(EncoderDecoderConfig(**{
        "emb_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 64, "num_encoder_layers": 2,
        "num_decoder_layers": 3, "inputs": (TextInput(vocab_size=256),),
        "targets": (TextOutput(vocab_size=256),
                    CodeOutput(modality="image", vocab_size=66, grid=(6, 6))), **changes}))


@pytest.fixture(scope="module")
def case():
    with np.load(GOLDEN / "cases.npz") as file:
        prefix = "text_to_text/"
        return {name.removeprefix(prefix): file[name] for name in file.files
                if name.startswith(prefix)}


@pytest.fixture
def batch_file(case, tmp_path):
    path = tmp_path / "batch.npz"
    np.savez(path, **{name: value for name, value in case.items() if name.startswith("batch/")})
    return path


def check_against_golden(found, case):
    counts = case["out/text/loss_mask"] > 0
    np.testing.assert_allclose(found["logits/text"][counts], case["out/text/logits"][counts],
                               atol=1e-5)
    np.testing.assert_allclose(found["encoder_output"], case["inter/encoder/__call__.0"], atol=1e-5)
    logits = case["out/text/logits"].astype(np.float64)
    log_z = np.logaddexp.reduce(logits, axis=-1)
    at = np.take_along_axis(logits, case["out/text/targets"][..., None], -1)[..., 0]
    z_loss = 1e-4 * np.square(log_z)
    assert found["weight_sum/text"] == counts.sum()
    assert found["loss/text"] == pytest.approx((log_z - at + z_loss)[counts].sum(), rel=1e-5)
    assert found["z_loss/text"] == pytest.approx(z_loss[counts].sum(), rel=1e-5)


def test_golden_numbers_from_the_command_line(case, batch_file, tmp_path):
    (tmp_path / "model.gin").write_text(textwrap.dedent(GIN))
    output = tmp_path / "out" / "found.npz"
    done = vishwam("forward", f"--gin_file={tmp_path}/model.gin",
                   f"--checkpoint={GOLDEN}/params.npz", f"--batch={batch_file}",
                   f"--output={output}")
    assert done.returncode == 0, done.stderr
    with np.load(output) as file:
        found = dict(file)
    check_against_golden(found, case)
    assert set(found) == {"logits/text", "loss/text", "z_loss/text", "weight_sum/text",
                          "encoder_output"}
    assert "logits/text              float32 [2, 10, 256]" in done.stdout


def test_t5x_feature_names_give_the_same(case, tmp_path):
    np.savez(tmp_path / "t5x.npz", **{
        T5X[name.removeprefix("batch/")]: value for name, value in case.items()
        if name.removeprefix("batch/") in T5X})
    found = forward(model(), str(GOLDEN / "params.npz"), str(tmp_path / "t5x.npz"),
                    str(tmp_path / "out.npz"))
    check_against_golden(found, case)


def test_a_packed_batch_of_t5x_with_all_its_features(tmp_path):
    assert set(t5.arrays("batch_packed")) == set(T5X_FEATURES)
    np.savez(tmp_path / "params.npz", **t5.flat("params_init"))
    found = forward(t5.model(), str(tmp_path / "params.npz"), str(t5.GOLDEN / "batch_packed.npz"),
                    str(tmp_path / "out.npz"))
    real = t5.arrays("batch_packed")["decoder_loss_weights"] > 0
    np.testing.assert_allclose(found["logits/text"][real], t5.arrays("logits")["packed"][real],
                               atol=1e-5)
    assert found["weight_sum/text"] == real.sum()


def test_a_checkpoint_folder_and_a_scanned_model(case, batch_file, tmp_path, saved_checkpoint):
    for place in (saved_checkpoint, saved_checkpoint / "checkpoints" / "3"):
        found = forward(model(scan_layers=True), str(place), str(batch_file),
                        str(tmp_path / "out.npz"))
        check_against_golden(found, case)


@pytest.fixture
def saved_checkpoint(tmp_path):
    """A MODEL_DIR with one checkpoint of the golden parameters at step 3."""
    with np.load(GOLDEN / "params.npz") as file:
        params = jax.tree.map(jnp.asarray, unflatten_names(dict(file)))
    saver = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig())
    assert saver.save(3, {"params": params, "step": jnp.asarray(3)})
    saver.close()
    return tmp_path / "run"


@pytest.mark.parametrize(("changes", "expected"), [
    ({"mlp_dim": 48}, ["decoder/layers_0/mlp/wi_0/kernel (32, 48)",
                       "decoder/layers_0/mlp/wi_0/kernel (32, 64)"]),
    ({"num_decoder_layers": 4}, ["decoder/layers_3/"]),
    ({"mlp_activations": ("gelu",)}, ["mlp/wi/kernel (32, 64)", "mlp/wi_0/kernel (32, 64)"]),
])
def test_another_models_parameters_are_shown_side_by_side(batch_file, tmp_path, changes, expected):
    with pytest.raises(UserError) as caught:
        forward(model(**changes), str(GOLDEN / "params.npz"), str(batch_file),
                str(tmp_path / "out.npz"))
    for part in expected:
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) < 24
    assert not (tmp_path / "out.npz").exists()


def test_mistakes_end_with_2_and_one_screen(batch_file, tmp_path):
    (tmp_path / "model.gin").write_text(textwrap.dedent(GIN).replace("= 64", "= 96"))
    done = vishwam("forward", f"--gin_file={tmp_path}/model.gin",
                   f"--checkpoint={GOLDEN}/params.npz", f"--batch={batch_file}",
                   f"--output={tmp_path}/out.npz")
    assert done.returncode == EXIT_USER_ERROR
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 24
    assert "mlp/wi_0/kernel (32, 96)" in done.stderr
    done = vishwam("forward", f"--gin_file={tmp_path}/model.gin")
    assert done.returncode == EXIT_USER_ERROR and "--checkpoint" in done.stderr
    (tmp_path / "none.gin").write_text("PRECISION = 'float32'\n")
    done = vishwam("forward", f"--gin_file={tmp_path}/none.gin", "--checkpoint=a", "--batch=b",
                   "--output=c.npz")
    assert done.returncode == EXIT_USER_ERROR, done.stderr


@pytest.mark.parametrize(("arrays", "message"), [
    ({"inputs/text/tokens": [[300]], "targets/text/targets": [[3]]}, "ids outside the table"),
    ({"inputs/text/tokens": [[3]], "targets/image/targets": [[66]]}, "ids outside the table"),
    ({"inputs/text/tokens": [[3]], "targets/audio/targets": [[3]]}, "no use for"),
])
def test_arrays_that_are_not_the_models(tmp_path, arrays, message):
    np.savez(tmp_path / "b.npz", **{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(UserError, match=message):
        forward(model(), str(GOLDEN / "params.npz"), str(tmp_path / "b.npz"),
                str(tmp_path / "out.npz"))


def test_label_smoothing_reaches_the_loss(batch_file, tmp_path):
    plain, smooth = (
        forward(model(), str(GOLDEN / "params.npz"), str(batch_file), str(tmp_path / "o.npz"),
                LossConfig(label_smoothing=smoothing))["loss/text"] for smoothing in (0.0, 0.1))
    assert plain != smooth
