"""The gin presets say what they claim, and every value in them is one the code takes."""

from __future__ import annotations

import pathlib

import pytest

from vishwam_t5x import gin_config
from vishwam_t5x.parallelism.mesh import MeshConfig
from vishwam_t5x.parallelism.remat import REMAT_POLICIES, remat_policy
from vishwam_t5x.precision.policy import POLICIES, policy_by_name

GIN = pathlib.Path(__file__).resolve().parents[2] / "gin"
HARDWARE = {  # devices of the machine -> (replica, data, fsdp, tensor)
    "cpu": (1, (1, 1, 1, 1)), "cpu_8": (8, (1, 2, 2, 2)), "gpu_1": (1, (1, 1, 1, 1)),
    "gpu_pair": (2, (1, 1, 2, 1)), "gpu_8": (8, (1, 1, 8, 1)), "tpu_v3_8": (8, (1, 1, 8, 1)),
    "tpu_v3_32": (32, (1, 1, 32, 1)), "tpu_v4_8": (4, (1, 1, 4, 1)),
    "tpu_v4_32": (16, (1, 1, 16, 1)), "tpu_v4_128": (64, (1, 4, 16, 1)),
    "tpu_v5e_16": (16, (1, 1, 16, 1)),
}


def graph_of(path):
    return gin_config.read_text(path.read_text(), str(path))


def test_no_preset_is_untested():
    assert {path.stem for path in (GIN / "hardware").glob("*.gin")} == set(HARDWARE)
    assert {path.stem for path in (GIN / "precision").glob("*.gin")} == set(POLICIES)
    named = set(REMAT_POLICIES) - {"save_names"}  # takes names: given on the command line
    assert {path.stem for path in (GIN / "remat").glob("*.gin")} == named


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware(name):
    graph = graph_of(GIN / "hardware" / f"{name}.gin")
    devices, shape = HARDWARE[name]
    # All four are bound, so that a later preset leaves nothing of an earlier one.
    sizes = {key.parameter: bound.value for key, bound in graph.bindings.items()}
    assert set(sizes) == {"replica", "data", "fsdp", "tensor"}
    assert MeshConfig(**sizes).shape(devices) == shape
    assert graph.macros["MESH"].value.target is MeshConfig
    policy_by_name(graph.macros["PRECISION"].value)
    remat_policy(graph.macros["REMAT"].value)


@pytest.mark.parametrize("folder, macro", [("precision", "PRECISION"), ("remat", "REMAT")])
def test_precision_and_remat(folder, macro):
    for path in (GIN / folder).glob("*.gin"):
        graph = graph_of(path)
        assert {name: bound.value for name, bound in graph.macros.items()} == {macro: path.stem}
