"""Hugging Face's own models and ours compute the same of each other's folders."""

from __future__ import annotations

import huggingface_folders as folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vishwam_t5x.checkpointing.convert.huggingface import open_huggingface, reference_logits
from vishwam_t5x.checkpointing.convert.huggingface_writing import write_huggingface
from vishwam_t5x.checkpointing.convert.t5_network import KINDS, T5Network
from vishwam_t5x.checkpointing.sources import Request
from vishwam_t5x.core.trees import unflatten_names
from vishwam_t5x.models.beam_search import beam_search
from vishwam_t5x.models.config import (
    EncoderDecoderConfig,
    RelativePositions,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.decoding import greedy
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

torch = pytest.importorskip("torch", reason="PyTorch comes with the extra `bench`")
transformers = pytest.importorskip("transformers", reason="comes with the extra `bench`")


def model_of(network: T5Network) -> EncoderDecoder:
    """Our model of the network, without dropout."""
    sizes = {name: getattr(network, name) for name in (
        "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers",
        "mlp_activations")}
    return EncoderDecoder(EncoderDecoderConfig(
        **sizes, qk_norm=False, scale_attention_logits=False,
        position=RelativePositions(per_layer=network.per_layer),
        inputs=(TextInput(vocab_size=network.vocab_size, modality_embedding=False),),
        targets=(TextOutput(vocab_size=network.vocab_size, modality_embedding=False,
                            logits_via_embedding=network.logits_via_embedding),)))


def opened(folder):
    """Our model of a folder and its parameters."""
    source = open_huggingface(epath.Path(folder))
    arrays = source.read({name: Request(np.dtype("float32"), None) for name in source.leaves})
    return model_of(source.network), {"params": unflatten_names(arrays)}


def batch_of(vocab_size: int):
    """Inputs of several lengths, the longest beyond the last bucket of positions."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, vocab_size, (3, 150)).astype(np.int32)
    tokens[1, 90:], tokens[2, 7:] = 0, 0
    targets = rng.integers(2, vocab_size, (3, 140)).astype(np.int32)
    inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return {"inputs/text/tokens": tokens, "targets/text/inputs": inputs,
            "targets/text/mask": np.ones_like(inputs)}


def assert_same_logits(folder):
    model, variables = opened(folder)
    batch = batch_of(model.config.tables["text"])
    ours = jax.jit(lambda v, b: model.apply(v, b, method="logits"))(variables, batch)["text"]
    theirs = reference_logits(epath.Path(folder), batch)
    difference = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    assert difference < 1e-5, difference


@pytest.mark.parametrize("kind", folders.KINDS)
def test_our_export_loads_and_computes_the_same(tmp_path, kind):
    config = folders.config(kind)
    folder = folders.write(tmp_path / "theirs", config, folders.random_arrays(config))
    source = open_huggingface(epath.Path(folder))
    write_huggingface(source, epath.Path(tmp_path / "ours"), source.network, max_shard_bytes=50_000)
    kind = getattr(transformers, KINDS[source.network.kind])
    model, info = kind.from_pretrained(str(tmp_path / "ours"), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    named = dict(model.named_parameters())
    for name, array in folders.read(tmp_path / "ours").items():
        np.testing.assert_array_equal(named[name].detach().numpy(), array, err_msg=name)
    assert_same_logits(tmp_path / "ours")


@pytest.mark.parametrize("kind", folders.KINDS)
@pytest.mark.parametrize("limit", ["40KB", "1GB"])
def test_their_random_model_computes_the_same(tmp_path, kind, limit):
    config = folders.config(kind)
    kind = config.pop("model_type")
    torch.manual_seed(0)
    made = getattr(transformers, KINDS[kind])(transformers.AutoConfig.for_model(kind, **config))
    made.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    assert_same_logits(tmp_path / "theirs")


@pytest.mark.parametrize("kind", ["t5", "t5_1_1", "umt5"])
def test_same_greedy_and_beam_tokens(tmp_path, kind):
    """Beams without ends: T5X, and so we, prefer what has ended, Hugging Face what scores best."""
    config = folders.config(kind, num_layers=3)  # generate() counts the encoder's for its cache
    folder = folders.write(tmp_path / "theirs", config, folders.random_arrays(config))
    source = open_huggingface(epath.Path(folder))
    write_huggingface(source, epath.Path(tmp_path / "ours"), source.network)
    model, variables = opened(tmp_path / "ours")
    inputs = batch_of(config["vocab_size"])["inputs/text/tokens"]
    length, beams = 12, 4

    def decode(variables, tokens, num_decodes):
        def step(last, cache):
            return model.apply(variables, last, cache, "text", method="decode_step")

        encoded = model.apply(variables, {"inputs/text/tokens": tokens}, method="encode")
        cache = model.apply(variables, encoded, length, num_decodes, method="init_cache")
        if num_decodes == 1:
            return greedy(step, cache, batch_size=len(inputs), max_length=length).best
        return beam_search(step, cache, lambda cache, rows: cache.reorder(rows), alpha=0.0,
                           batch_size=len(inputs), max_length=length, num_beams=num_decodes,
                           logits_hook=lambda logits, _: logits.at[:, 1].set(-jnp.inf)).best

    tokens = torch.tensor(inputs, dtype=torch.long)
    kind = getattr(transformers, KINDS[source.network.kind])
    theirs = kind.from_pretrained(str(tmp_path / "ours")).eval()
    for num_decodes in (1, beams):
        settings = {} if num_decodes == 1 else {"length_penalty": 0.0, "min_new_tokens": length}
        wanted = theirs.generate(tokens, attention_mask=(tokens > 0).long(), do_sample=False,
                                 num_beams=num_decodes, max_new_tokens=length, **settings)
        wanted = np.pad(wanted.numpy()[:, 1:], ((0, 0), (0, length)))[:, :length]
        found = jax.jit(decode, static_argnums=2)(variables, inputs, num_decodes)
        np.testing.assert_array_equal(found, wanted)
