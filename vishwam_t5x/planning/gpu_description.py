"""What XLA's CUDA compiler must know of a GPU that is not there.

Figures are from NVIDIA's white papers and tuning guides, not read from cards.
"""

from __future__ import annotations

import dataclasses
import re

from vishwam_t5x.core.hardware import HARDWARE

CONTEXT_BYTES = 500 * 2**20
"""Taken by the CUDA context and the workspaces of its libraries, outside XLA's books: a guess."""

PREALLOCATED = 0.75
"""Share of the memory that jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        hardware: its name in `core.hardware`.
        cores: streaming multiprocessors.
        fpus: float32 units of a multiprocessor.
        threads: resident threads of a multiprocessor.
        shared_kib: shared memory of a multiprocessor, in KiB.
        block_kib: shared memory that one block may ask for, in KiB.
        l2_mib: L2 cache, in MiB.
        clock_ghz: boost clock, in GHz.
    """

    hardware: str
    cores: int
    fpus: int
    threads: int
    shared_kib: int
    block_kib: int
    l2_mib: int
    clock_ghz: float


GPUS = {
    "gtx1650": Gpu("GTX 1650", 14, 64, 1024, 64, 64, 1, 1.665),
    "t4": Gpu("T4", 40, 64, 1024, 64, 64, 4, 1.59),
    "v100-16gb": Gpu("V100 16GB", 80, 64, 2048, 96, 96, 6, 1.53),
    "v100-32gb": Gpu("V100 32GB", 80, 64, 2048, 96, 96, 6, 1.53),
    "a100-40gb": Gpu("A100 40GB", 108, 64, 2048, 164, 163, 40, 1.41),
    "a100-80gb": Gpu("A100 80GB", 108, 64, 2048, 164, 163, 40, 1.41),
    "l4": Gpu("L4", 58, 128, 1536, 100, 99, 48, 2.04),
    "rtx3090": Gpu("RTX 3090", 82, 128, 1536, 100, 99, 6, 1.695),
    "rtx4090": Gpu("RTX 4090", 128, 128, 1536, 100, 99, 72, 2.52),
    "h100": Gpu("H100 SXM", 132, 128, 2048, 228, 227, 50, 1.98),
    "h200": Gpu("H200", 132, 128, 2048, 228, 227, 50, 1.98),
}


def target_config(name: str) -> str:
    """Returns XLA's GpuTargetConfig, as a text protocol buffer, of a target such as 'h200x2'."""
    gpu = GPUS[name if name in GPUS else re.sub(r"x\d+$", "", name)]
    entry = HARDWARE[gpu.hardware]
    assert entry.compute_capability is not None
    major, minor = entry.compute_capability.split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_kib * 1024}
  shared_memory_per_block_optin: {gpu.block_kib * 1024}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(entry.hbm_bandwidth)}
  l2_cache_size: {gpu.l2_mib * 2**20}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {entry.usable_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{entry.name}"
"""
