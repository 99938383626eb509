"""Models that hold their codecs: pixels and spectrograms as targets are as good as their codes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from models import golden_fixtures
from models.test_codecs import AUDIO as GOLDEN_AUDIO
from models.test_codecs import IMAGE as GOLDEN_IMAGE

from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names, unflatten_names
from vishwam_t5x.data.assembly import PlacedExample, assemble, example_lengths
from vishwam_t5x.data.source import DatasetConfig, batch_spec
from vishwam_t5x.models.codecs.audio_vqgan import AudioVQGANConfig, StackConfig
from vishwam_t5x.models.codecs.image_vqgan import ImageVQGANConfig
from vishwam_t5x.models.codecs.layers import encoding_flops
from vishwam_t5x.models.config import (
    CodeOutput,
    EncoderDecoderConfig,
    PatchInput,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.losses import LossConfig, normalizers
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.vocabulary import VocabularyLayout
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import make_mesh
from vishwam_t5x.training import setup
from vishwam_t5x.training.optimizers import AdamW
from vishwam_t5x.training.step import StepConfig

STACK = StackConfig(emb_dim=8, num_layers=1, num_heads=2, head_dim=4, mlp_dim=8)
IMAGE = ImageVQGANConfig(num_codes=16, resolution=4, channels=1, width=4, width_factors=(1, 1),
                         blocks=1, attention_resolutions=(), norm_groups=2, dropout_rate=0.5)
AUDIO = AudioVQGANConfig(num_codes=16, code_dim=4, frames=16, mels=8, patch=4, encoder=STACK,
                         decoder=STACK)
CODECS = {"image": IMAGE, "audio": AUDIO}
LAYOUT = VocabularyLayout(base_size=16, num_sentinels=4, num_location_bins=0, num_history=0)
CONFIG = EncoderDecoderConfig(
    emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1,
    inputs=(TextInput(vocab_size=LAYOUT.table_size),
            PatchInput(modality="image", patch_dim=4, grid=(2, 2))),
    targets=(TextOutput(vocab_size=LAYOUT.table_size),
             CodeOutput(modality="image", vocab_size=18, grid=(2, 2), codec=IMAGE,
                        mask_token=True),
             CodeOutput(modality="audio", vocab_size=18, grid=(2, 4), layout=(4, 2), codec=AUDIO)))


def objective(**changes):
    return MixtureOfDenoisers(**{
        "vocabulary": LAYOUT, "input_modalities": ("text", "image"),
        "target_modalities": ("text", "image", "audio"), "image": PatchSpec(2, channels=1),
        "audio": PatchSpec(4, channels=1), "image_weights": {"R": 1.0}, "text_weights": {},
        "task_masks": True, "codecs": CODECS, **changes})


@functools.cache
def clean_examples():
    """A drawing, a sound, both at once, an answer, and an image to be restored."""
    rng = np.random.default_rng(0)

    def text(length):
        return rng.integers(3, 16, length).astype(np.int32)

    def pixels():
        return rng.integers(0, 256, (4, 4, 1)).astype(np.uint8)

    def sound():
        return rng.normal(size=(16, 8)).astype(np.float32)

    return (
        {"text_inputs": text(3), "image_targets": pixels()},
        {"text_inputs": text(2), "audio_targets": sound()},
        {"text_inputs": text(4), "audio_targets": sound()[..., None],
         "image_targets": pixels()[..., 0].astype(np.float32) / 255, "image_inputs": pixels()},
        {"text_inputs": text(2), "text_targets": text(3)},
        {"image": pixels()},
    )


def lengths(clean):
    return {name: 4 if name.startswith("image") else 8 if name.startswith("audio") else len(value)
            for name, value in clean.items()}


def spec(goal, packed, rows):
    return batch_spec(DatasetConfig(
        "tiny", {"inputs": 32, "targets": 32, "targets/image": 8, "targets/audio": 16}, rows,
        pack=packed), goal)


def batch(goal, examples, rows, packed):
    """Examples in rows, as many rows as the highest number says."""
    placed = []
    for number, (clean, row) in enumerate(zip(examples, rows, strict=True)):
        example = goal.apply(clean, seed=0, example=number)
        promised = goal.lengths(lengths(clean), seed=0, example=number)
        found = example_lengths(example)
        assert found.targets == promised.targets
        placed.append(PlacedExample(row, found, example))
    return assemble(spec(goal, packed, rows[-1] + 1), rows[-1] + 1, placed)


@functools.cache
def model():
    """Drawn by NumPy: to compile the initialization would take longer than the tests."""
    module, rng = EncoderDecoder(CONFIG), np.random.default_rng(0)
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0)))["params"]
    return module, jax.tree.map(lambda leaf: jnp.asarray(
        rng.normal(size=leaf.shape, scale=0.5), leaf.dtype), shapes)


@functools.cache
def encode(modality):
    return jax.jit(functools.partial(CODECS[modality].build().apply, method="encode"))


def with_codes(clean):
    """The example as a task that has run the codec would give it."""
    params = model()[1]
    neutral = "image" in clean
    example, done = objective().apply(clean, seed=0, example=0), dict(clean)
    for modality, codec in CODECS.items():
        signal = example.get(f"targets/{modality}/{codec.signal.name}")
        if signal is not None:
            done.pop(f"{modality}_targets", None)
            codes = encode(modality)(
                {"params": params[f"target_encoders_{modality}"]["discrete_vae"]},
                codec.prepare(jnp.asarray(signal)))
            done[f"{modality}_codes" if neutral else f"{modality}_target_codes"] = np.asarray(
                codes[0])
    return done


@jax.jit
def loss_of(params, arrays):
    config = LossConfig()
    sums = model()[0].apply({"params": params}, arrays, config, method="loss_sums")
    scale = normalizers(arrays, config)
    return {name: part.loss / scale[name] for name, part in sums.items()}


ROWS = (0, 0, 1, 1, 1)


def test_pixels_are_as_good_as_codes():
    params, examples = model()[1], clean_examples()
    coded = [with_codes(clean) for clean in examples]
    packed = batch(objective(), examples, ROWS, packed=True)
    by_codes = batch(objective(codecs=None), coded, ROWS, packed=True)
    assert "targets/image/targets" not in packed
    assert packed["targets/image/pixels"].dtype == np.uint8
    assert packed["targets/audio/spectrogram"].shape == (2, 2, 16, 8)
    found = loss_of(params, packed)
    assert found.keys() == {"text", "image", "audio"}
    for modality, loss in loss_of(params, by_codes).items():
        np.testing.assert_array_equal(found[modality], loss)


@pytest.mark.slow
def test_packed_pixels_are_as_good_as_unpacked_ones():
    params, examples = model()[1], clean_examples()
    found = loss_of(params, batch(objective(), examples, ROWS, packed=True))
    for modality, loss in loss_of(params, batch(objective(), examples, range(5), False)).items():
        np.testing.assert_allclose(found[modality], loss, atol=1e-5)


def test_a_hidden_code_weighs_and_is_masked():
    arrays = batch(objective(), clean_examples()[4:], (0,), True)
    hidden = arrays["targets/image/task_mask"][0, :4]
    assert 0 < hidden.sum() <= 4
    np.testing.assert_array_equal(arrays["targets/image/loss_mask"][0, :4], hidden)


@pytest.mark.slow
def test_codecs_on_a_mesh(run_python):
    """Rows split over devices, pictures with them: the same loss."""
    code = """
        import sys
        sys.path.insert(0, 'tests')
        import jax, numpy as np
        from models import test_codecs_in_model as tiny
        from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
        from vishwam_t5x.parallelism.sharding import batch_sharding, partitioning

        rows = range(4)
        arrays = tiny.batch(tiny.objective(), tiny.clean_examples()[:4], rows, False)
        alone = tiny.loss_of(tiny.model()[1], arrays)
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        with partitioning(mesh):
            split = jax.device_put(arrays, batch_sharding(mesh, None))
            found = tiny.loss_of(tiny.model()[1], split)
        for name, loss in alone.items():
            np.testing.assert_allclose(found[name], loss, atol=1e-5)
        print('equal', len(jax.devices()))
    """
    assert run_python(code, devices=8).split() == ["equal", "8"]


def parts_of_a_run():
    return setup.Parts(
        model()[0], AdamW(learning_rate=0.1, weight_decay=0.5, global_norm_clip=1.0), make_mesh(),
        LogicalAxisRules(), StepConfig(num_microbatches=3), spec(objective(), False, 3))


def test_codecs_have_no_optimizer_state():
    parts = parts_of_a_run()
    setup.check_modalities(parts.model, objective(), parts.spec)
    state = parts.factory().abstract
    assert sum("discrete_vae" in name for name in flatten_names(state.params)) > 80
    assert not any("discrete_vae" in name for name in flatten_names(state.opt_state))
    assert any("wo/kernel" in name for name in flatten_names(state.opt_state))
    shapes = dataclasses.replace(parts.spec, signals={})
    more = (setup.flops_per_slot(CONFIG, parts.spec)[1]
            - setup.flops_per_slot(CONFIG, shapes)[1]) * parts.spec.target_length
    expected = sum(parts.spec.target_capacities[name] / codec.signal.num_codes
                   * encoding_flops(codec) for name, codec in CODECS.items())
    assert more == pytest.approx(expected) and encoding_flops(IMAGE) > 10_000


@pytest.mark.slow
def test_training_leaves_the_codecs_alone():
    params, parts = model()[1], parts_of_a_run()
    arrays = batch(objective(), clean_examples()[:3], (0, 1, 2), False)
    factory = parts.factory()
    compiled = parts.compile(factory, parts.batch_shardings())
    state = factory.with_params(jax.tree.map(jnp.copy, params)).on_device()
    after, metrics = compiled(state, jax.device_put(arrays, parts.batch_shardings()))
    assert metrics["update_applied"] and metrics["grad_norm"] > 0
    before = flatten_names(params)
    moved = {name: bool(jnp.any(leaf != before[name]))
             for name, leaf in flatten_names(after.params).items()}
    of_codecs = {name for name in moved if "discrete_vae" in name}
    assert len(of_codecs) > 80 and not any(moved[name] for name in of_codecs)
    assert moved["decoder/layers_0/mlp/wo/kernel"]

    def total(codecs):
        losses = loss_of(unflatten_names({**flatten_names(params), **codecs}), arrays)
        return sum(losses.values())

    # Not by the optimizer alone: there is no gradient.
    codecs = {name: leaf for name, leaf in flatten_names(params).items() if name in of_codecs}
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(jax.grad(total)(codecs)))


def test_the_originals_logits_come_from_its_pixels():
    golden = golden_fixtures.load("signals.npz")
    targets = tuple(
        CodeOutput(modality=name, vocab_size=codec.config.num_codes + 2, codec=codec.config,
                   grid=golden_fixtures.TARGETS[name].grid,
                   layout=golden_fixtures.TARGETS[name].layout)
        for name, codec in (("image", GOLDEN_IMAGE), ("audio", GOLDEN_AUDIO)))
    module = EncoderDecoder(golden_fixtures.config(("text",), targets))
    codecs = {name.replace("params/", "target_encoders_").replace("/", "/discrete_vae/", 1): leaf
              for name, leaf in golden_fixtures.load("codecs.npz").items()
              if name.startswith("params/")}
    params = unflatten_names({**golden_fixtures.params(), **codecs})
    case = golden_fixtures.load("cases.npz")
    arrays = {key.removeprefix("text_to_image/batch/"): value for key, value in case.items()
              if key.startswith("text_to_image/batch/inputs/text/")}
    arrays |= {"targets/image/pixels": (golden["image"][:, None] + 1) / 2,
               "targets/audio/spectrogram": golden["audio"][:, None, ..., 0],
               "targets/image/mask": np.ones((2, 36), np.int32),
               "targets/audio/mask": np.ones((2, 32), np.int32)}

    def both(module, arrays):
        arrays = module.with_codes(arrays)
        return arrays, module.logits(arrays)

    coded, logits = jax.jit(functools.partial(module.apply, method=both))(
        {"params": params}, {key: jnp.asarray(value) for key, value in arrays.items()})
    for name in ("image", "audio"):
        out = f"text_to_{name}/out/{name}"
        np.testing.assert_array_equal(coded[f"targets/{name}/targets"], case[f"{out}/targets"])
        counts = case[f"{out}/loss_mask"] > 0
        np.testing.assert_allclose(np.asarray(logits[name])[counts], case[f"{out}/logits"][counts],
                                   atol=1e-5)


def test_mistakes():
    with pytest.raises(UserError, match="has other codes than its output"):
        CodeOutput(modality="image", vocab_size=18, grid=(4, 2), codec=IMAGE)
    assert CodeOutput(modality="image", vocab_size=64, grid=(2, 2), codec=IMAGE).num_codes == 16
    with pytest.raises(UserError, match="is to code image itself"):
        objective().lengths({"text_inputs": 2, "image_target_codes": 4}, seed=0, example=0)
    with pytest.raises(UserError, match=r"MixtureOfDenoisers\.codecs"):
        objective(codecs=None).lengths({"text_inputs": 2, "image_targets": 4}, seed=0, example=0)
    with pytest.raises(UserError, match="is no codec's config"):
        objective(codecs={"image": 3})
    with pytest.raises(UserError, match="did you mean|modality in"):
        objective(codecs={"imagee": IMAGE})
    with pytest.raises(UserError, match=r"not uint8 \(4, 4, 1\)"):
        objective().apply({"text_inputs": np.zeros(2, np.int32),
                           "image_targets": np.zeros((2, 2), np.uint8)}, seed=0, example=0)
    with pytest.raises(UserError, match="whole grids of codes"):
        BatchSpec.from_feature_lengths(
            1, {"inputs": 8, "targets": 8, "targets/image": 6}, ("text",), ("image",), {},
            signals={"image": IMAGE.signal})
    assert BatchSpec.from_feature_lengths(
        1, {"inputs": 8, "targets": 7}, ("text",), ("image",), {},
        signals={"image": IMAGE.signal}).target_capacities == {"image": 4}
    plain = EncoderDecoder(EncoderDecoderConfig(
        emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1,
        inputs=CONFIG.inputs, targets=(*CONFIG.targets[:2], CodeOutput(
            modality="audio", vocab_size=18, grid=(2, 4)))))
    with pytest.raises(UserError, match="random for good"):
        setup.check_given(model()[0], ("target_encoders_audio/discrete_vae/quantize/embedding",))
    setup.check_given(model()[0], ("decoder/decoder_norm/scale",))
    setup.check_given(plain, ("target_encoders_audio/discrete_vae/quantize/embedding",))
    goal = objective()
    with pytest.raises(UserError, match="no codec for them"):
        setup.check_modalities(plain, goal, spec(goal, True, 1))
