"""Meshes from sizes: filling, refusing with sizes that work, slices, and TPU topologies."""

from __future__ import annotations

import math
import re

import jax
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.parallelism.axis_rules import MESH_AXES
from vishwam_t5x.parallelism.mesh import (
    MeshConfig,
    default_mesh_config,
    describe_mesh,
    make_mesh,
    nearest_divisors,
)


@pytest.mark.parametrize("config, devices, shape", [
    (MeshConfig(), 1, (1, 1, 1, 1)),
    (MeshConfig(), 8, (1, 8, 1, 1)),
    (MeshConfig(fsdp=-1), 8, (1, 1, 8, 1)),  # data stays out of it unless it is asked for
    (MeshConfig(fsdp=-1, tensor=2), 8, (1, 1, 4, 2)),
    (MeshConfig(data=2, fsdp=2, tensor=2), 8, (1, 2, 2, 2)),
    (MeshConfig(replica=-1, data=1, fsdp=16), 64, (4, 1, 16, 1)),
    (MeshConfig(replica=2, fsdp=4, tensor=4), 256, (2, 8, 4, 4)),
])
def test_sizes_fill_the_devices(config, devices, shape):
    assert config.shape(devices) == shape


@pytest.mark.parametrize("config, devices", [
    (MeshConfig(tensor=3), 8),
    (MeshConfig(fsdp=5, tensor=3), 8),
    (MeshConfig(data=2, fsdp=3, tensor=2), 8),
    (MeshConfig(data=3, fsdp=5), 8),
    (MeshConfig(data=1, fsdp=16), 4),
    (MeshConfig(data=1), 7),
    (MeshConfig(replica=3, fsdp=-1, tensor=7), 64),
])
def test_a_mesh_that_does_not_fit_names_sizes_that_do(config, devices):
    with pytest.raises(UserError) as caught:
        config.shape(devices)
    assert f"{devices} device" in caught.value.problem
    suggestions = caught.value.fix.split("; or ")
    assert suggestions
    for suggestion in suggestions:  # each of them, applied, fits
        changes = {axis: int(size) for axis, size in
                   re.findall(r"(replica|data|fsdp|tensor) = (-?\d+)", suggestion)}
        assert changes
        old = dict(zip(MESH_AXES, config.sizes, strict=True))
        assert math.prod(MeshConfig(**{**old, **changes}).shape(devices)) == devices


@pytest.mark.parametrize("sizes, words", [
    ({"fsdp": 0}, "MeshConfig.fsdp"),
    ({"tensor": -2}, "MeshConfig.tensor"),
    ({"tensor": 2.0}, "MeshConfig.tensor"),
    ({"data": -1, "fsdp": -1}, "only one mesh axis"),
    ({"num_slices": -1}, "num_slices"),
])
def test_impossible_sizes_are_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        MeshConfig(**sizes)


def test_nearest_divisors():
    assert nearest_divisors(8, 3) == [2, 4]
    assert nearest_divisors(8, 16) == [8]
    assert nearest_divisors(12, 4) == [4]


def test_one_device_gives_a_mesh_of_ones():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
    assert describe_mesh(mesh) == "1 x cpu: not split"
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


class FakeDevice:
    """Enough of a `jax.Device` to choose and arrange by; no computation touches it."""

    def __init__(self, number: int, slice_index: int = 0, platform: str = "gpu") -> None:
        self.id, self.slice_index, self.platform = number, slice_index, platform


def test_the_default_is_fsdp_on_accelerators_and_data_on_cpus():
    assert default_mesh_config([FakeDevice(0)] * 8).shape(8) == (1, 1, 8, 1)
    assert default_mesh_config([FakeDevice(0, platform="tpu")] * 4).shape(4) == (1, 1, 4, 1)
    assert default_mesh_config([FakeDevice(0, platform="cpu")] * 8).shape(8) == (1, 8, 1, 1)
    assert default_mesh_config([FakeDevice(0)]).shape(1) == (1, 1, 1, 1)


def test_slices_lie_along_the_outer_axes(eight_devices):
    out = eight_devices("""
        import jax, numpy as np
        from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh, _slices
        ids = lambda mesh: np.vectorize(lambda d: d.id)(mesh.devices)
        # Devices listed so that slices are interleaved: 0-3 are slice 0 only by declaration.
        mesh = make_mesh(MeshConfig(replica=2, data=1, fsdp=4, num_slices=2))
        assert (ids(mesh)[0].ravel() == [0, 1, 2, 3]).all(), ids(mesh)
        # No replica axis: data is split into (across slices, within a slice).
        mesh = make_mesh(MeshConfig(data=4, fsdp=2, num_slices=2))
        assert ids(mesh)[0, :, :, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
        # 2 of the 4 slices along data, 2 along fsdp: each slice is still one block of the mesh.
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, num_slices=4))
        assert ids(mesh)[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
        for bad in (dict(fsdp=1, data=1, tensor=8, num_slices=2), dict(num_slices=3)):
            try:
                make_mesh(MeshConfig(**bad))
            except ValueError as error:
                print(str(error).splitlines()[0])
    """)
    assert out.splitlines() == [
        "2 slices cannot be laid along replica, data and fsdp",
        "8 devices cannot form 3 equal slices"]


def test_slices_of_different_sizes_are_refused():
    devices = [FakeDevice(number, slice_index=int(number > 2)) for number in range(8)]
    with pytest.raises(UserError, match="different sizes"):
        make_mesh(MeshConfig(), devices)


def test_tpu_topologies_without_tpus(run_python):
    pytest.importorskip("libtpu", reason="compiling for absent TPUs needs jax[tpu]")
    run_python("""
        import numpy as np
        from jax.experimental import topologies
        from vishwam_t5x.core.hardware import lookup
        from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh
        megacore = dict(chip_config_name="megacore", chips_per_host_bounds=[2, 2, 1])
        for name, extra, count, kind in (
                ("v3:2x2", {}, 8, "TPU v3"), ("v3:4x4", {}, 32, "TPU v3"),
                ("v4:2x2x1", megacore, 4, "TPU v4"), ("v4:2x2x4", megacore, 16, "TPU v4"),
                ("v4:4x4x4", megacore, 64, "TPU v4"), ("v5e:4x4", {}, 16, "TPU v5e")):
            devices = topologies.get_topology_desc(name, "tpu", **extra).devices
            assert len(devices) == count, (name, len(devices))
            assert lookup(devices[0].device_kind).name == kind
            mesh = make_mesh(MeshConfig(fsdp=4), devices)
            assert dict(mesh.shape) == {
                "replica": 1, "data": count // 4, "fsdp": 4, "tensor": 1}
            assert len(set(mesh.devices.flat)) == count
            # Neighbours along fsdp are neighbours in the machine: at most one hop on each axis.
            hops = [np.abs(np.subtract(a.coords, b.coords)).max()
                    for ring in mesh.devices.reshape(-1, 4) for a, b in zip(ring, ring[1:])]
            assert max(hops) <= 1, (name, hops)
    """, env={"TPU_SKIP_MDS_QUERY": "1"})
