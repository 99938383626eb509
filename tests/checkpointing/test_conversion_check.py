"""Logits of both sides of a conversion, T5X's library being a stand-in: T5X is not on PyPI."""

import sys

import pytest
import t5x_folders

from vishwam_t5x import __main__ as program

# What `--verify` calls of T5X, computed by our own model from what T5X's names hold.
CHECKPOINTS = """
import pathlib
import t5x_folders
from vishwam_t5x.core.trees import unflatten_names

def load_t5x_checkpoint(path, step=None, *, lazy_parameters):
    from etils import epath
    from vishwam_t5x.checkpointing.convert.t5x import open_t5x
    source = open_t5x(epath.Path(path))
    read = lambda name: source.read_part(
        name, tuple(slice(0, n) for n in source.leaves[name].shape))
    return unflatten_names({name: read(name) for name in source.leaves})
"""
NETWORK = """
import collections
import dataclasses
import t5_fixtures
from vishwam_t5x.core.trees import flatten_names, unflatten_names

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

    def apply(self, variables, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
              enable_dropout):
        cfg = self.config
        assert cfg.mlp_activations == ("gelu", "linear") and not enable_dropout
        model = t5_fixtures.model(num_heads=cfg.num_heads, head_dim=cfg.head_dim)
        params = {t5_fixtures.ours(name): leaf
                  for name, leaf in flatten_names(variables["params"]).items()}
        batch = {"inputs/text/tokens": encoder_input_tokens,
                 "inputs/text/mask": encoder_input_tokens > 0,
                 "targets/text/inputs": decoder_input_tokens,
                 "targets/text/targets": decoder_target_tokens,
                 "targets/text/mask": decoder_target_tokens > 0}
        logits = model.apply({"params": unflatten_names(params)}, batch, method="logits")["text"]
        return logits * FACTOR
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Puts a package `t5x` on the path whose logits are ours times a factor."""
    def install(factor):
        package = tmp_path / f"library{factor}"
        for folder in ("t5x", "t5x/examples", "t5x/examples/t5"):
            (package / folder).mkdir(parents=True)
            (package / folder / "__init__.py").touch()
        (package / "t5x" / "checkpoints.py").write_text(CHECKPOINTS)
        (package / "t5x" / "examples" / "t5" / "network.py").write_text(
            NETWORK.replace("FACTOR", str(factor)))
        for name in [name for name in sys.modules if name.split(".")[0] == "t5x"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(package))
        monkeypatch.syspath_prepend(str(t5x_folders.GOLDEN.parent.parent / "models"))

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "t5x"]:
        del sys.modules[name]


@pytest.mark.parametrize("factor, code", [(1.0, 0), (1.1, 2)])
def test_logits_of_both_sides(library, tmp_path, capsys, factor, code):
    library(factor)
    params = {name: array for name, array in t5x_folders.state().items()
              if name.startswith("target/") or name == "state/step"}
    t5x_folders.write(params, tmp_path / "checkpoint_300")
    assert program.main(["convert", f"--from={tmp_path}", f"--to={tmp_path / 'ours'}",
                         "--verify"]) == code
    said = capsys.readouterr()
    assert ("forward pass of both sides" in said.out) == (code == 0)
    assert ("the two sides compute different logits" in said.err) == (code == 2)
