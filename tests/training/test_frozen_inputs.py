"""What an input freezes stays as it is: no update, no decay, no optimizer state; saved, resumed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.core.batch import BatchSpec, DataPosition, HistorySpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.flops import resampler_flops
from vishwam_t5x.core.trees import count_bytes, flatten_names
from vishwam_t5x.models.config import (
    EncoderDecoderConfig,
    HistoryInput,
    ImageInput,
    ImageTransformer,
    Resampler,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
from vishwam_t5x.training import setup
from vishwam_t5x.training.optimizer_groups import OptimizerGroups
from vishwam_t5x.training.optimizers import SGD, Adafactor, AdamW
from vishwam_t5x.training.step import StepConfig

SIZES = {"emb_dim": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 8}
VIT = ImageTransformer(patch_dim=4, num_layers=2, position_grid=(2, 2), **SIZES)
IMAGE = ImageInput(transformer=VIT, grid=(2, 2), freeze=True)
HISTORY = HistoryInput(modality="image_history", transformer=VIT, grid=(2, 2), freeze=True,
                       resampler=Resampler(num_latents=2, num_layers=1, **SIZES))
SPEC = BatchSpec(2, 10, 3, {"text": 2, "image": 4, "image_history": 4}, {"text": 3},
                 {"image": 4, "image_history": 4}, packed=False,
                 histories={"image_history": HistorySpec(2, 4)})
ADAMW = AdamW(0.01, weight_decay=0.1, no_decay=())
VISION, OWN = "image_transformer/", "input_encoders_image_history/"
FROZEN = (VISION, f"{OWN}pre_projection/", f"{OWN}resampler/", f"{OWN}post_projection/")


class Run:
    """What a run is made of, traced and compiled once."""

    def __init__(self, parts):
        self.parts, self.config = parts, parts.model.config

    @functools.cached_property
    def factory(self):
        return self.parts.factory()

    @functools.cached_property
    def step(self):
        return self.parts.compile(self.factory, self.parts.batch_shardings())

    def first(self):
        return self.factory.with_params(jax.tree.map(np.copy, first_params()))

    def after(self, state, given):
        """The state after some batches, and the last norm of gradients."""
        state, norm = state.on_device(), 0.0
        for batch in given:
            state, metrics = self.step(state, jax.device_put(batch, self.parts.batch_shardings()))
            assert metrics["update_applied"]
            norm = float(metrics["grad_norm"])
        return state, norm


@functools.cache
def run(image=True, history=True, alone=False, devices=1):
    """A small run whose image and history share a transformer; `alone`: without the image."""
    inputs = (TextInput(vocab_size=16), dataclasses.replace(IMAGE, freeze=image),
              dataclasses.replace(HISTORY, freeze=history))
    config = EncoderDecoderConfig(
        emb_dim=8, num_heads=1, head_dim=8, mlp_dim=8, num_encoder_layers=1, num_decoder_layers=1,
        inputs=inputs[::2] if alone else inputs, targets=(TextOutput(vocab_size=16),))
    return Run(setup.Parts(EncoderDecoder(config), ADAMW, make_mesh(
        MeshConfig(fsdp=devices), jax.devices()[:devices]), LogicalAxisRules(), StepConfig(), SPEC))


@functools.cache
def first_params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
                        run().factory.abstract.params)


def batches(number):
    rng = np.random.default_rng(0)
    for _ in range(number):
        yield {name: rng.integers(1, 3, array.shape).astype(array.dtype)
               if name.endswith(("tokens", "inputs", "targets"))
               else np.ones(array.shape, array.dtype) if name.endswith("mask")
               else np.broadcast_to(np.arange(array.shape[-1], dtype=array.dtype), array.shape)
               if array.dtype == np.int32 else rng.normal(size=array.shape).astype(array.dtype)
               for name, array in SPEC.arrays().items()}


def stateless(opt_state):
    """Names of the parameters of which the optimizer keeps nothing."""
    kept = "\n".join(flatten_names(opt_state))
    return {name for name in flatten_names(first_params()) if name not in kept}


def opt_state(optimizer, of):
    """Shapes of what an optimizer keeps of the parameters that a model lets it have."""
    spared = optimizer.sparing(of.config.frozen_prefixes)
    return jax.eval_shape(spared.build().init, first_params())


def first_names():
    return flatten_names(first_params()).keys()


def beginning(*prefixes):
    return {name for name in first_names() if name.startswith(prefixes)}


def test_three_steps_with_weight_decay_and_a_resume(tmp_path):
    before, given, step = flatten_names(first_params()), list(batches(4)), run().after
    state, norm = step(run().first(), given[:3])
    moved = {name for name, leaf in flatten_names(state.params).items()
             if np.any(np.asarray(leaf) != before[name])}
    assert moved == first_names() - beginning(*FROZEN) and norm > 0
    assert stateless(state.opt_state) == beginning(*FROZEN) and len(beginning(*FROZEN)) > 30
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(period=1)) as checkpoints:
        checkpoints.save(3, state.at(DataPosition(7)))
        checkpoints.wait()
        restored = checkpoints.restore(run().factory.abstract)
    for name, leaf in flatten_names(restored.params).items():
        np.testing.assert_array_equal(leaf, flatten_names(state.params)[name], err_msg=name)
    straight, resumed = step(state, given[3:])[0], step(restored, given[3:])[0]
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(straight), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("switches, frozen", [
    ({"image": True, "history": False}, (VISION,)),  # a history never teaches what it shares
    ({"image": False, "history": True}, FROZEN[1:]),
    ({"image": False, "history": False}, ()),
    ({"history": False, "alone": True}, (VISION,))])
def test_a_shared_transformer_is_frozen_unless_some_input_teaches_it(switches, frozen):
    assert run(**switches).config.frozen_prefixes == frozen
    assert stateless(opt_state(ADAMW, run(**switches))) == beginning(*frozen)


def test_other_optimizers_keep_nothing_either():
    every = opt_state(Adafactor(0.1, beta1=0.9), run(False, False))
    some = opt_state(Adafactor(0.1, beta1=0.9), run())
    assert stateless(some) == beginning(*FROZEN) and not stateless(every)
    assert count_bytes(every) - count_bytes(some) > 4 * sum(
        flatten_names(first_params())[name].size for name in beginning(*FROZEN))


def test_groups_know_what_the_model_freezes():
    """Its own names may be among them; a group that would train them alone is refused."""
    def groups(*pairs, **fields):
        return opt_state(OptimizerGroups(groups=pairs, **{"default": ADAMW, **fields}), run())

    for kept in (groups((f"^{VISION}", None)), groups(("^encoder/", 0.5), ("scale$", SGD(0.1))),
                groups(("", ADAMW), default=None, disjoint=True)):
        assert stateless(kept) - {name for name in first_names() if name.endswith("scale")} == {
            name for name in beginning(*FROZEN) if not name.endswith("scale")}
    with pytest.raises(UserError, match="trains what the model freezes") as caught:
        groups((f"^{VISION}", 0.1))
    assert "freeze = False" in caught.value.fix
    with pytest.raises(UserError, match="matches no parameter"):
        groups(("^imagetransformer/", None))


def test_resume_with_another_switch(tmp_path, caplog):
    """Frozen since: its state is left, and said. To learn again: refused, for it has none."""
    free, frozen = run(image=False, history=False), run()
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, CheckpointConfig(period=1)) as checkpoints:
        checkpoints.save(1, free.first())
        checkpoints.wait()
        state = checkpoints.restore(frozen.factory.abstract)
        assert (f"frozen now: {VISION} ({len(beginning(VISION))}), {OWN} "
                f"({len(beginning(OWN)) - 1}).") in caplog.text
        for name, leaf in flatten_names(state.params).items():
            np.testing.assert_array_equal(leaf, flatten_names(first_params())[name], err_msg=name)
        checkpoints.save(2, state)
        checkpoints.wait()
        with pytest.raises(UserError, match="they were frozen") as caught:
            checkpoints.restore(free.factory.abstract)
        assert "INITIAL_CHECKPOINT_PATH" in caught.value.fix
        for other in (SGD(0.1), SGD(0.1, momentum=0.9), Adafactor(0.1)):
            with pytest.raises(UserError, match="of another model or optimizer"):
                checkpoints.restore(frozen.factory.abstract.replace(
                    opt_state=opt_state(other, frozen)))


def test_random_and_frozen_is_said(caplog):
    model = run().parts.model
    setup.check_given(model, model.config.frozen_prefixes)
    assert len([line for line in caplog.messages if "stays as it was drawn" in line]) == 4
    caplog.clear()
    setup.check_given(model, ("decoder/decoder_norm/scale",))
    assert not caplog.messages


def test_flops_of_a_frozen_history_are_of_the_forward_pass():
    def encoder(history):
        return SPEC.input_length * setup.flops_per_slot(run(history=history).config,
                                                        SPEC)[0]

    first_matmul, learned = 2 * 4 * 8 * 8, 2 * 2 * 8 * 8 + resampler_flops(
        setup._shape_of(HISTORY.resampler), 2, 4, 1)
    assert encoder(False) - encoder(True) == pytest.approx(2 * (first_matmul + 2 * learned))


@pytest.mark.slow
def test_on_two_devices(run_python):
    code = """
        import sys
        sys.path.insert(0, 'tests')
        import jax, numpy as np
        from training import test_frozen_inputs as tiny
        from vishwam_t5x.core.trees import flatten_names

        run, one = tiny.run(devices=2), tiny.run()
        state, norm = run.after(run.first(), tiny.batches(3))
        alone, _ = one.after(one.first(), tiny.batches(3))
        frozen, before = tiny.beginning(*tiny.FROZEN), flatten_names(tiny.first_params())
        other = flatten_names(alone.params)
        for name, leaf in flatten_names(state.params).items():
            assert len(leaf.sharding.device_set) == 2
            assert np.array_equal(leaf, before[name]) == (name in frozen), name
            np.testing.assert_allclose(leaf, other[name], atol=1e-4, err_msg=name)
        print('equal', len(frozen) > 30)
    """
    assert run_python(code, devices=2).split() == ["equal", "True"]
