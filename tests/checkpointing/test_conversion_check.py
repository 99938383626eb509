"""Logits of both sides of a conversion. T5X is not on PyPI: numbers that it computed stand in."""

import sys

import numpy as np
import pytest
import t5x_folders

from vishwam_t5x import __main__ as program
from vishwam_t5x import conversion_check
from vishwam_t5x.checkpointing.convert import conversion, t5_network
from vishwam_t5x.evaluation.batch_file import read_batch

# What `--verify` calls of T5X. Files are read here without anything of ours or TensorStore's, and
# the logits are those that T5X itself computed, for these very parameters and tokens alone.
CHECKPOINTS = """
import json
import pathlib
import zlib

import flax.serialization
import numpy as np

def load_t5x_checkpoint(path, step=None, *, lazy_parameters):
    assert step is None and not lazy_parameters
    folder = pathlib.Path(path)
    tree = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    return read(tree["optimizer"], folder)

def read(leaf, folder):
    if not isinstance(leaf, dict):
        return leaf
    if leaf.get("driver") != "zarr":
        return {name: read(value, folder) for name, value in leaf.items()}
    place = folder / leaf["kvstore"]["path"]
    header = json.loads((place / ".zarray").read_text())
    assert header["chunks"] == header["shape"] and header["compressor"]["id"] == "gzip"
    chunk = (place / ".".join("0" for _ in header["shape"])).read_bytes()
    numbers = np.frombuffer(zlib.decompress(chunk, 16 + zlib.MAX_WBITS), header["dtype"])
    return numbers.reshape(header["shape"], order=header["order"])
"""
NETWORK = """
import dataclasses
import numpy as np

@dataclasses.dataclass
class T5Config:
    vocab_size: int
    dtype: object
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple
    dropout_rate: float
    logits_via_embedding: bool

@dataclasses.dataclass
class Transformer:
    config: T5Config

    def apply(self, variables, enable_dropout, **tokens):
        config = dataclasses.asdict(self.config)
        del config["dtype"]
        assert config == dict(
            vocab_size=384, emb_dim=128, num_heads=4, head_dim=16, mlp_dim=128,
            num_encoder_layers=2, num_decoder_layers=2, mlp_activations=("gelu", "linear"),
            dropout_rate=0.0, logits_via_embedding=False), config
        assert not enable_dropout and len(tokens) == 3
        for name, given in tokens.items():
            np.testing.assert_array_equal(given, np.load(GOLDEN + "/batch_unpacked.npz")[name])
        with np.load(GOLDEN + "/params_init.npz") as known:
            for name in known.files:
                found = variables["params"]
                for key in name.split("/"):
                    found = found[key]
                np.testing.assert_array_equal(found, known[name])
        return np.load(GOLDEN + "/logits.npz")["unpacked"] * FACTOR
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Puts a package `t5x` on the path that knows T5X's logits of one batch, times a factor."""
    def install(factor):
        package = tmp_path / f"library{factor}"
        for folder in ("t5x", "t5x/examples", "t5x/examples/t5"):
            (package / folder).mkdir(parents=True)
            (package / folder / "__init__.py").touch()
        (package / "t5x" / "checkpoints.py").write_text(CHECKPOINTS)
        (package / "t5x" / "examples" / "t5" / "network.py").write_text(
            NETWORK.replace("FACTOR", str(factor)).replace("GOLDEN", repr(str(t5x_folders.GOLDEN))))
        for name in [name for name in sys.modules if name.split(".")[0] == "t5x"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(package))

    known = read_batch(str(t5x_folders.GOLDEN / "batch_unpacked.npz"), ("text",), ("text",))
    monkeypatch.setattr(conversion_check, "random_batch", lambda vocab_size: known)
    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "t5x"]:
        del sys.modules[name]


@pytest.mark.parametrize("factor, code", [(1.0, 0), (1.1, 2)])
def test_our_logits_are_those_that_t5x_computed(library, tmp_path, capsys, factor, code):
    library(factor)
    with np.load(t5x_folders.GOLDEN / "params_init.npz") as found:
        params = {f"target/{name}": found[name] for name in found.files}
    t5x_folders.write(params, tmp_path / "theirs" / "checkpoint_0")
    assert program.main(["convert", f"--from={tmp_path / 'theirs'}", f"--to={tmp_path / 'ours'}",
                         "--verify"]) == code
    said = capsys.readouterr()
    assert ("forward pass of both sides" in said.out) == (code == 0)
    assert ("the two sides compute different logits" in said.err) == (code == 2)
    assert (tmp_path / "ours" / "checkpoints" / "0").exists() == (code == 0)
    assert ("nothing is left at" in said.err) == (code == 2)


@pytest.mark.parametrize(("kind", "words"), [
    ("decoder-only", "of no T5"), ("umt5", "a umT5 has"), ("far", "up to 256"),
    ("stacked", "no stacked layers")])
def test_what_t5x_s_network_cannot_compute_is_said(library, tmp_path, capsys, kind, words):
    """The parameters are converted all the same."""
    library(1.0)
    network = t5_network.T5Network(
        kind="umt5" if kind == "umt5" else "t5", vocab_size=32, emb_dim=8, num_heads=2, head_dim=4,
        mlp_dim=8, mlp_activations=("gelu", "linear"), num_encoder_layers=1, num_decoder_layers=1,
        logits_via_embedding=False, max_distance=256 if kind == "far" else 128)
    arrays = {f"params/{name}": np.zeros(network.shape(name), np.float32)
              for name in network.places()
              if kind != "decoder-only" or not name.startswith("encoder/")}
    if kind == "stacked":
        arrays = {name.replace("encoder/layers_0/", "encoder/encoder/").replace(
            "decoder/layers_0/", "decoder/decoder/"): array for name, array in arrays.items()}
    theirs, _, homeless = conversion.names.all_to_t5x(arrays)
    assert not homeless
    t5x_folders.write({there: arrays[ours] for ours, there in theirs.items()},
                      tmp_path / "theirs" / "checkpoint_0")
    plan = conversion.plan(conversion.open_any(tmp_path / "theirs"), "vishwam", tmp_path / "ours")
    said = conversion_check.compare_logits(plan, network if kind == "far" else None)
    assert said.startswith("no forward pass: ") and words in said
