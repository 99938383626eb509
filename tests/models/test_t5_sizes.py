"""The published sizes of the T5 family have the published numbers of parameters."""

import dataclasses
import functools

import jax
import pytest
from flax.core import meta

import helpers
from vishwam_t5x import gin_config

# As Hugging Face counts its own checkpoints; UL2 was published as 20 billion.
PUBLISHED = {
    "t5_1_0/small": 60_506_624, "t5_1_0/base": 222_903_552, "t5_1_0/large": 737_668_096,
    "t5_1_0/3b": 2_851_598_336, "t5_1_0/11b": 11_307_321_344,
    "t5_1_1/small": 76_961_152, "t5_1_1/base": 247_577_856, "t5_1_1/large": 783_150_080,
    "t5_1_1/xl": 2_849_757_184, "t5_1_1/xxl": 11_135_332_352,
    "mt5/small": 300_176_768, "mt5/base": 582_401_280, "mt5/large": 1_229_581_312,
    "mt5/xl": 3_742_619_648, "mt5/xxl": 12_921_057_280,
    "umt5/small": 306_601_984, "umt5/base": 592_043_520, "umt5/xl": 3_768_356_864,
    "umt5/xxl": 12_972_531_712,
    "byt5/small": 299_637_760, "byt5/base": 581_653_248, "byt5/large": 1_228_183_552,
    "byt5/xl": 3_737_801_728, "byt5/xxl": 12_906_899_328,
    "ul2/20b": 19_591_209_984}


def num_parameters(model):
    """Counted by shape, nothing allocated; layers are alike, so two of each are enough."""
    @functools.cache
    def count(encoder, decoder):
        config = dataclasses.replace(model.config, num_encoder_layers=encoder,
                                     num_decoder_layers=decoder)
        boxed = jax.eval_shape(model.clone(config=config).init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(meta.unbox(boxed["params"])))

    config = model.config
    return (count(1, 1) + (config.num_encoder_layers - 1) * (count(2, 1) - count(1, 1))
            + (config.num_decoder_layers - 1) * (count(1, 2) - count(1, 1)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    parsed = gin_config.parse([f"--gin_file=gin/models/{name}.gin"], "forward")
    assert num_parameters(parsed.macro("MODEL")) == PUBLISHED[name]


def test_every_size_is_counted():
    folder = helpers.ROOT / "gin" / "models"
    found = {path.relative_to(folder).with_suffix("").as_posix()
             for path in folder.glob("*/*.gin")
             if path.parent.name not in ("decoder_only", "unified_io2")}
    assert found == {*PUBLISHED, "t5/network"}
