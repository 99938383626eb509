"""The device table: jax's names find the right row, and the rows make sense."""

from __future__ import annotations

import types

import jax
import pytest

from vishwam_t5x.core import hardware


@pytest.mark.parametrize("kind, name", [
    ("TPU v2", "TPU v2"), ("TPU v3", "TPU v3"), ("TPU v4", "TPU v4"), ("TPU v5 lite", "TPU v5e"),
    ("TPU v5e", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v5p", "TPU v5p"),
    ("TPU v6 lite", "TPU v6e"), ("TPU v6e", "TPU v6e"), ("TPU7x", "TPU 7x"),
    ("NVIDIA GeForce GTX 1650", "GTX 1650"), ("Tesla T4", "T4"), ("NVIDIA T4", "T4"),
    ("Tesla V100-SXM2-16GB", "V100 16GB"), ("Tesla V100-SXM2-32GB", "V100 32GB"),
    ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
    ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"), ("NVIDIA A10", "A10"), ("NVIDIA A10G", "A10G"),
    ("NVIDIA L4", "L4"), ("NVIDIA GeForce RTX 3090", "RTX 3090"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA H100 80GB HBM3", "H100 SXM"),
    ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"),
    # Other cards whose names contain one of the above must not get its figures.
    ("TPU v4 lite", None), ("NVIDIA L40S", None), ("NVIDIA RTX A1000", None),
    ("NVIDIA GeForce GTX 1650 SUPER", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GB200", None), ("cpu", None), ("", None),
])
def test_lookup_by_jax_device_kind(kind, name):
    found = hardware.lookup(kind)
    assert (found.name if found else None) == name


def test_every_row_is_found_by_its_own_name_and_is_plausible():
    for name, row in hardware.HARDWARE.items():
        assert hardware.lookup(name) is row
        assert 0.85 * row.hbm_bytes < row.usable_bytes <= 1.1 * row.hbm_bytes, name
        assert row.peak_flops["float32"] <= row.matmul_peak("float32") <= row.matmul_peak(
            "bfloat16" if "bfloat16" in row.peak_flops else "float16"), name
        assert row.link_bandwidth < row.hbm_bandwidth, name
        assert (row.compute_capability is None) == (row.platform == "tpu"), name


def test_peak_by_dtype():
    h100, t4, v4 = (hardware.HARDWARE[name] for name in ("H100 SXM", "T4", "TPU v4"))
    assert h100.matmul_peak("bfloat16") == pytest.approx(989.4e12)
    assert h100.matmul_peak("float32") == pytest.approx(494.7e12)  # TensorFloat-32 by default
    assert t4.matmul_peak("bfloat16") == t4.matmul_peak("float32") == pytest.approx(8.1e12)
    assert v4.matmul_peak("float32") == v4.matmul_peak("bfloat16") == 275e12


def test_an_unknown_device_has_no_peak_and_says_so():
    device = types.SimpleNamespace(platform="gpu", device_kind="Abacus 9000",
                                   memory_stats=lambda: None)
    assert hardware.peak_flops(device) is None
    assert hardware.memory_bytes(device) is None
    assert "Abacus 9000" in hardware.peak_flops_source(device)
    assert "null" in hardware.peak_flops_source(device)


def test_memory_is_what_the_device_reports_else_the_table():
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v4",
                                   memory_stats=lambda: {"bytes_limit": 123})
    assert hardware.memory_bytes(device) == 123
    del device.memory_stats  # a device of a topology that is not there
    assert hardware.memory_bytes(device) == int(30.75 * 2**30)


def test_a_cpu_is_measured_once():
    device = jax.devices("cpu")[0]
    first = hardware.peak_flops(device)
    assert 1e8 < first < 1e14
    assert hardware.peak_flops(device) == first
    assert "measured" in hardware.peak_flops_source(device)
