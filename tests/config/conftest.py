"""A small library to configure, written to a module of its own for every test."""

from __future__ import annotations

import importlib
import sys
import textwrap
import types
import uuid

import pytest

LIBRARY = '''
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn

from vishwam_t5x.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    emb_dim: int = 8
    dropout_rate: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.emb_dim % 2:
            raise UserError("emb_dim must be even", got=self.emb_dim, fix="use 8")


@dataclasses.dataclass(frozen=True)
class LongModelConfig(ModelConfig):
    window: int | None = None


class Net(nn.Module):
    config: ModelConfig
    scale: float = 1.0

    def __call__(self, inputs):
        return inputs


class Patch(NamedTuple):
    size: int
    channels: int = 3


class Named(Protocol):
    name: str

    def shout(self) -> str: ...


class Rate(Protocol):
    def __call__(self, step: int) -> float: ...


@dataclasses.dataclass
class Speaker:
    name: str = "it"

    def shout(self) -> str:
        return self.name.upper()


class Plain:
    def __init__(self, width: int, note: str = ""):
        self.width, self.note = width, note


@dataclasses.dataclass(frozen=True)
class Data:
    name: str
    patch: Patch = Patch(1)
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)


def adamw(rate: float = 1e-3, b2: float = 0.99) -> Callable[[int], float]:
    return lambda step: rate * step


def lion(rate: float = 1e-4) -> Callable[[int], float]:
    return lambda step: -rate * step


def a_number() -> int:
    return 3


def train(model: nn.Module, model_dir: str, train_data: Data | None = None,
          eval_data: Data | None = None, steps: int = 10, optimizer: Callable | None = None,
          names: Sequence[str] = (), anything: Any = None, verbose: bool = False,
          speaker: Named | None = None, rate: Rate | None = None,
          extras: Sequence[Patch] = (), **options):
    return dict(locals())


def evaluate(model: nn.Module, batches: int = 1):
    return model
'''

RECIPE = '''
from __gin__ import dynamic_registration
import LIBRARY

# The folder for everything; must be set.
MODEL_DIR = %gin.REQUIRED
EMB_DIM = 16
TRAIN_STEPS = 5
MODEL = @LIBRARY.Net()
OPTIMIZER = @LIBRARY.adamw()

LIBRARY.Net.config = @LIBRARY.ModelConfig()
LIBRARY.ModelConfig.emb_dim = %EMB_DIM
LIBRARY.adamw:
  rate = 0.01
  b2 = 0.98

LIBRARY.train:
  model = %MODEL
  model_dir = %MODEL_DIR
  steps = %TRAIN_STEPS
  optimizer = %OPTIMIZER
  train_data = @train/LIBRARY.Data()
  eval_data = @eval/LIBRARY.Data()

LIBRARY.Data.name = 'digits'
eval/LIBRARY.Data.name = 'held out'
'''


class Setup:
    """A library module, a recipe for it, and `parse` with its `train` as the verb's function."""

    def __init__(self, folder, library: types.ModuleType) -> None:
        self.folder, self.library = folder, library
        self.write("recipe.gin", RECIPE)

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(textwrap.dedent(text).replace("LIBRARY", self.library.__name__))
        return str(path)

    def parse(self, *arguments: str, recipe: str = "recipe.gin", roots=None, **keywords):
        from vishwam_t5x import gin_config
        return gin_config.parse([f"--gin_file={recipe}", *arguments], "train",
                                roots=roots or [self.library.train], **keywords)


@pytest.fixture
def setup(tmp_path, monkeypatch):
    name = f"library_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield Setup(tmp_path, importlib.import_module(name))
    sys.modules.pop(name, None)
