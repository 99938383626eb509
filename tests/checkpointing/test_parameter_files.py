"""Files of parameters with other programs' names: Unified-IO 2's PyTorch port, and its parts."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from models import golden_fixtures

from vishwam_t5x import __main__ as program
from vishwam_t5x.checkpointing.convert import conversion, parts, unified_io2_torch
from vishwam_t5x.checkpointing.restore import open_source
from vishwam_t5x.checkpointing.sources import Request
from vishwam_t5x.core.errors import UserError

BLOCK = "Transformer_0/ResidualAttentionBlock_"


@functools.cache
def ours():
    """Every parameter of the golden model and of its codecs."""
    found = dict(golden_fixtures.params())
    for modality in ("image", "audio"):
        prefix = f"params/{modality}/"
        found.update((f"target_encoders_{modality}/discrete_vae/{name.removeprefix(prefix)}", array)
                     for name, array in golden_fixtures.load("codecs.npz").items()
                     if name.startswith(prefix))
    return found


def branch(prefix):
    return {name.removeprefix(prefix): array for name, array in ours().items()
            if name.startswith(prefix)}


def read(path):
    source = open_source(path)[0]
    return source.read({name: Request(np.dtype(leaf.dtype), None)
                        for name, leaf in source.leaves.items()})


def assert_equal(found, want):
    assert found.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("port")
    np.savez(folder / "ours.npz", **ours())
    assert program.main(["convert", f"--from={folder / 'ours.npz'}", f"--to={folder / 'theirs'}",
                         "--format=unified_io2_torch", "--verify"]) == 0
    return folder / "theirs"


def test_the_port_and_back(port):
    assert_equal(read(port), ours())
    assert_equal(read(port / unified_io2_torch.FILE), ours())


def test_the_ports_names_and_orders(port):
    """Facts of the port, by which its modules are called and laid out."""
    with np.load(port / unified_io2_torch.FILE) as file:
        theirs = dict(file)
    vit = "input_embedders.image.image_encoder.vision_transformer"
    for name, own, change in (
            ("text_token_embedder.weight", "text_token_embedder/embedding", lambda x: x),
            ("encoder.layers_0.pre_attention_norm.scale",
             "encoder/layers_0/pre_attention_layer_norm/scale", lambda x: x),
            ("decoder.layers_2.mlp.wi_1.weight", "decoder/layers_2/mlp/wi_1/kernel", np.transpose),
            (f"{vit}.transformer.resblocks.1.attn.key_in_proj_weight",
             f"image_transformer/{BLOCK}1/MultiHeadDotProductAttention_0/key/kernel", np.transpose),
            (f"{vit}.transformer.resblocks.1.mlp.fc2.weight",
             f"image_transformer/{BLOCK}1/MLP_0/c_proj/kernel", np.transpose),
            ("input_embedders.audio.image_encoder.vision_transformer.positional_embedding",
             "audio_transformer/pos_embed", lambda x: x),
            ("input_embedders.audio_history.resampler.perceiver.latents",
             "input_encoders_audio_history/resampler/resampler_latents", lambda x: x),
            ("target_embedders.image.vqgan.encoder.conv_in.weight",
             "target_encoders_image/discrete_vae/encoder/conv_in/kernel",
             lambda x: x.transpose(3, 2, 0, 1)),
            ("target_embedders.image.vqgan.quantize.embedding.weight",
             "target_encoders_image/discrete_vae/quantize/embedding", lambda x: x),
            ("target_embedders.audio.vqgan.encoder.transformer.encoderblock_0.ln_2.weight",
             "target_encoders_audio/discrete_vae/encoder/Transformer_0/encoderblock_0/"
             "LayerNormWithBias_1/scale", lambda x: x),
            ("target_embedders.audio.vqgan.decoder.conv_transpose.weight",
             "target_encoders_audio/discrete_vae/decoder/ConvTranspose_0/kernel",
             lambda x: x.transpose(2, 3, 0, 1)[:, :, ::-1, ::-1])):
        np.testing.assert_array_equal(theirs.pop(name), change(ours()[own]), err_msg=name)
    assert {re.sub(r"^.*[._]", "", name) for name in theirs} <= {
        "weight", "bias", "scale", "embedding", "token", "latents"}
    assert not any("/" in name for name in theirs)


def test_stacked_layers_are_taken_apart_for_the_port(port, tmp_path):
    """Our recipes scan over layers; the port never does."""
    layer = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
    stacks: dict[str, list[np.ndarray]] = {}
    kept = {}
    for name, array in ours().items():
        if match := layer.fullmatch(name):
            stacks.setdefault(f"{match[1]}/{match[1]}/{match[3]}", []).append(array)
        else:
            kept[name] = array
    kept.update({name: np.stack(arrays, axis=1) for name, arrays in stacks.items()})
    np.savez(tmp_path / "stacked.npz", **kept)
    assert program.main(["convert", f"--from={tmp_path / 'stacked.npz'}", "--verify",
                         f"--to={tmp_path / 'theirs'}", "--format=unified_io2_torch"]) == 0
    assert_equal(read(tmp_path / "theirs"), ours())


def test_the_ports_folder_as_it_is_published(port, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    (tmp_path / "config.json").write_text('{"t5_config": {"emb_dim": 32}}')
    with pytest.raises(UserError, match="holds no model.safetensors"):
        open_source(tmp_path)
    with np.load(port / unified_io2_torch.FILE) as file:
        safetensors.save_file(dict(file), tmp_path / "model.safetensors")
    assert_equal(read(tmp_path), ours())
    assert conversion.open_any(tmp_path).own["params/text_token_embedder/embedding"] == (
        "text_token_embedder.weight")


def test_a_port_without_the_inputs_whose_transformers_its_histories_share(port, tmp_path):
    with np.load(port / unified_io2_torch.FILE) as file:
        theirs = {re.sub(r"^input_embedders\.(image|audio)\.image_encoder",
                         r"input_embedders.\1_history.vit_image_encoder", name): array
                  for name, array in file.items()
                  if not re.match(r"input_embedders\.(image|audio)\.(proj|modality)", name)}
    np.savez(tmp_path / "histories.npz", **theirs)
    assert_equal(read(tmp_path / "histories.npz"), {
        name: array for name, array in ours().items()
        if not re.match(r"input_(image|audio)_encoder/", name)})


def clip():
    """The golden image transformer as OpenCLIP would have it, with a text tower beside."""
    own = branch("image_transformer/")
    size = own["class_embedding"].shape[0]
    pixels = own["embedding/kernel"]
    side = int((pixels.shape[0] // 3) ** 0.5)
    found = {"visual.conv1.weight": pixels.reshape(side, side, 3, size).transpose(3, 2, 0, 1),
             "visual.class_embedding": own["class_embedding"],
             "visual.positional_embedding": own["positional_embedding"],
             "visual.ln_pre.weight": own["pre_ln/scale"], "visual.ln_pre.bias": own["pre_ln/bias"],
             "visual.ln_post.weight": np.ones(size, np.float32),
             "token_embedding.weight": np.ones((5, size), np.float32)}
    for number in range(3):
        block, theirs = f"{BLOCK}{number}/", f"visual.transformer.resblocks.{number}."
        joined = [own[f"{block}MultiHeadDotProductAttention_0/{name}/{leaf}"].T
                  for leaf in ("kernel", "bias") for name in ("query", "key", "value")]
        found[f"{theirs}attn.in_proj_weight"] = np.concatenate(joined[:3])
        found[f"{theirs}attn.in_proj_bias"] = np.concatenate(joined[3:])
        for name, module in (("MultiHeadDotProductAttention_0/out", "attn.out_proj"),
                             ("MLP_0/c_fc", "mlp.c_fc"), ("MLP_0/c_proj", "mlp.c_proj")):
            found[f"{theirs}{module}.weight"] = own[f"{block}{name}/kernel"].T
            found[f"{theirs}{module}.bias"] = own[f"{block}{name}/bias"]
        for name in ("ln_1", "ln_2"):
            found[f"{theirs}{name}.weight"] = own[f"{block}{name}/scale"]
            found[f"{theirs}{name}.bias"] = own[f"{block}{name}/bias"]
    return found


def test_openclip(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({name: np.ascontiguousarray(array) for name, array in clip().items()},
                          tmp_path / "open_clip.safetensors")
    found = read(tmp_path / "open_clip.safetensors")
    left = {name: found.pop(name) for name in ("visual.ln_post.weight", "token_embedding.weight")}
    assert left["token_embedding.weight"].shape == (5, 24)
    assert_equal(found, {f"image_transformer/{name}": array
                         for name, array in branch("image_transformer/").items()})


def spectrogram_transformer():
    """The golden AST under AST's names; its positions as random numbers."""
    own = branch("audio_transformer/")
    size = own["cls_token"].shape[0]
    patch = own["embedding/kernel"]
    side = int(patch.shape[0] ** 0.5)
    found = {"v.patch_embed.proj.weight": patch.reshape(side, side, 1, size).transpose(3, 2, 1, 0),
             "v.patch_embed.proj.bias": own["embedding/bias"],
             "v.cls_token": own["cls_token"][None, None],
             "v.dist_token": own["dist_token"][None, None],
             "v.pos_embed": np.random.default_rng(0).random((1, 514, size), np.float32)}
    for number in range(3):
        block, theirs = f"{BLOCK}{number}/", f"v.blocks.{number}."
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            found[f"{theirs}attn.qkv.{name}"] = np.concatenate([
                own[f"{block}MultiHeadDotProductAttention_0/{part}/{leaf}"].T
                for part in ("query", "key", "value")])
            for module, dense in (("MultiHeadDotProductAttention_0/out", "attn.proj"),
                                  ("MLP_0/fc1", "mlp.fc1"), ("MLP_0/fc2", "mlp.fc2")):
                found[f"{theirs}{dense}.{name}"] = own[f"{block}{module}/{leaf}"].T
        for norm in ("norm1", "norm2"):
            found[f"{theirs}{norm}.weight"] = own[f"{block}{norm}/scale"]
            found[f"{theirs}{norm}.bias"] = own[f"{block}{norm}/bias"]
    return {f"module.{name}": array for name, array in found.items()}


def test_ast(tmp_path):
    theirs = spectrogram_transformer()
    np.savez(tmp_path / "ast.npz", **theirs)
    found = read(tmp_path / "ast.npz")
    table = found.pop("audio_transformer/pos_embed")
    want = {f"audio_transformer/{name}": array
            for name, array in branch("audio_transformer/").items() if name != "pos_embed"}
    assert_equal(found, want)
    # Patch (step t, band f) of 16 x 8 gets what AST has at band f, step 24 + t of its 64.
    positions = theirs["module.v.pos_embed"][0]
    for step, band in ((0, 0), (15, 7), (3, 5)):
        np.testing.assert_array_equal(table[2 + band * 16 + step],
                                      positions[2 + band * 64 + 24 + step])
    assert sorted(table[:, 0]) == sorted(positions[:, 0])
    assert parts.lay_positions(np.zeros((1, 1214, 4))).shape == (1214, 4)


def test_both_transformers_are_read_from_two_files(tmp_path, capsys):
    np.savez(tmp_path / "clip.npz", **clip())
    np.savez(tmp_path / "ast.npz", **spectrogram_transformer())
    both = f"{tmp_path / 'clip.npz'},{tmp_path / 'ast.npz'}"
    found = read(both)
    assert {"audio_transformer/cls_token", "image_transformer/pre_ln/bias"} < set(found)
    assert program.main(["convert", f"--from={both}", f"--to={tmp_path / 'start'}",
                         "--verify"]) == 0
    assert "ast.npz: module.v.cls_token -> params/audio_transformer/cls_token" in (
        capsys.readouterr().out)
    assert_equal(read(tmp_path / "start"), found)
    np.savez(tmp_path / "again.npz", **clip())
    for other, why in (("again.npz", "same name"), ("none.npz", "no such file")):
        with pytest.raises(UserError, match=why):
            open_source(f"{tmp_path / 'clip.npz'},{tmp_path / other}")


def test_taming_vqgan(tmp_path):
    own = branch("target_encoders_image/discrete_vae/")
    theirs = {"quantize.embedding.weight": own["quantize/embedding"],
              "loss.discriminator.weight": np.ones(3, np.float32)}
    for name, array in own.items():
        if name == "quantize/embedding":
            continue
        name = re.sub(r"\bmid_", "mid/", name)
        name = re.sub(r"\bup_(\d+)_", lambda match: f"up/{3 - int(match[1])}/", name)
        name = re.sub(r"\bdown_(\d+)_", r"down/\1/", name)
        name = re.sub(r"/(\d+)/(block|attn)_(\d+)", r"/\1/\2/\3", name)
        name = re.sub(r"(scale|kernel)$", "weight", name).replace("/", ".")
        theirs[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    assert "decoder.up.3.block.0.conv1.weight" in theirs and "encoder.mid.attn_1.q.bias" in theirs
    np.savez(tmp_path / "vqgan.npz", **theirs)
    found = read(tmp_path / "vqgan.npz")
    assert found.pop("loss.discriminator.weight").shape == (3,)
    assert_equal(found, own)


def test_a_file_is_opened_once_for_all_its_arrays(tmp_path, monkeypatch):
    np.savez(tmp_path / "p.npz", **{f"layers_{number}": np.ones(2) for number in range(9)})
    opened, load = [], np.load
    monkeypatch.setattr(np, "load", lambda *args, **kw: opened.append(args) or load(*args, **kw))
    assert len(read(tmp_path / "p.npz")) == 9
    assert len(opened) == 1, "a remote file would be fetched as often"


def test_a_file_of_ours_is_taken_as_it_is(tmp_path):
    np.savez(tmp_path / "p.npz", **{"encoder/encoder_norm/scale": np.ones(3), "conv1.weight":
                                    np.ones((2, 3, 1, 1))})
    assert set(read(tmp_path / "p.npz")) == {"encoder/encoder_norm/scale", "conv1.weight"}
