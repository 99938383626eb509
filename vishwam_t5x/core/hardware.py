"""What a device can do at best: memory, arithmetic and links, by the name jax gives its kind.

Figures are per jax device (a TPU v3 chip is two devices, a v4 or v5 chip one) and from the vendors'
data sheets, dense: 2:4 sparsity is never counted. Bytes of HBM that programs can use are smaller
than those sold; where we read them in an out-of-memory message of the compiler they are here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

GB = 10**9
GIB = 2**30
TERA = 10**12


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Attributes:
        name: our name for it.
        platform: 'tpu', 'gpu' or 'cpu'.
        hbm_bytes: memory sold, in bytes.
        usable_bytes: memory a program can use, in bytes; for a GPU, what jax preallocates of it by
            default can be less (XLA_PYTHON_CLIENT_MEM_FRACTION).
        hbm_bandwidth: bytes/s between memory and cores.
        peak_flops: FLOP/s of matmuls by dtype name; a dtype that is absent has no fast path.
        link_bandwidth: bytes/s a device can send to its neighbours over all its links together
            (ICI, NVLink, or PCIe where that is all there is).
        compute_capability: of an NVIDIA GPU, e.g. '8.0'.
        torus_dims: dimensions of a TPU's torus, over which `link_bandwidth` is spread; 0: a switch.
    """

    name: str
    platform: str
    hbm_bytes: int
    usable_bytes: int
    hbm_bandwidth: float
    peak_flops: Mapping[str, float]
    link_bandwidth: float
    compute_capability: str | None = None
    torus_dims: int = 0

    def matmul_peak(self, dtype: str) -> float:
        """Returns the FLOP/s to hold a matmul of that dtype against, at jax's default precision.

        By default jax multiplies float32 in bfloat16 passes on a TPU and in TensorFloat-32 on GPUs
        that have it, so those are the peaks of 'float32'. A dtype without a fast path is computed
        as float32.
        """
        peaks = self.peak_flops
        if dtype in peaks and dtype != "float32":
            return peaks[dtype]
        return peaks.get("tensorfloat32", peaks["float32"])


def _tpu(name: str, hbm: float, usable_gib: float, bandwidth: float, bf16: float, link: float,
         torus: int, int8: float | None = None, fp8: float | None = None) -> Hardware:
    """A TPU device: HBM in GiB, bandwidths in GB/s, peaks in TFLOP/s."""
    peaks = {"bfloat16": bf16 * TERA, "float32": bf16 * TERA}
    peaks |= {"int8": int8 * TERA} if int8 else {}
    peaks |= {"float8": fp8 * TERA} if fp8 else {}
    return Hardware(name, "tpu", int(hbm * GIB), int(usable_gib * GIB), bandwidth * GB, peaks,
                    link * GB, torus_dims=torus)


def _gpu(name: str, capability: str, gb: float, usable_gib: float, bandwidth: float, link: float,
         **peaks: float) -> Hardware:
    """An NVIDIA GPU: memory in GB as sold, bandwidths in GB/s, peaks in TFLOP/s."""
    return Hardware(name, "gpu", int(gb * GB), int(usable_gib * GIB), bandwidth * GB,
                    {dtype: value * TERA for dtype, value in peaks.items()}, link * GB, capability)


# TPUs: cloud.google.com/tpu/docs, one page a generation; links one way, all of a device's together.
# v2, v3 and 7x have two devices a chip and the chip's figures are halved. Usable bytes are what
# libtpu's compiler states when a program is too big.
_TPUS = (
    _tpu("TPU v2", 8, 7.48, 350, 22.5, 124, 2),
    _tpu("TPU v3", 16, 15.48, 450, 61.5, 164, 2),
    _tpu("TPU v4", 32, 30.75, 1228, 275, 300, 3, int8=275),
    _tpu("TPU v5e", 16, 15.75, 819, 197, 200, 2, int8=394),
    _tpu("TPU v5p", 96, 95.74, 2765, 459, 600, 3, int8=918),
    _tpu("TPU v6e", 32, 31.25, 1638, 918, 400, 2, int8=1836),
    _tpu("TPU 7x", 96, 94.75, 3690, 1153.5, 300, 3, fp8=2307),
)

# GPUs: NVIDIA's data sheets and architecture white papers; dense tensor-core rates with float32
# accumulation. NVLink one way where a board has it, else PCIe one way.
_GPUS = (
    # TU117 has no tensor cores: float16 runs at twice the float32 rate. GDDR5 board.
    _gpu("GTX 1650", "7.5", 4, 3.8, 128, 16, float32=2.98, float16=5.97),
    _gpu("T4", "7.5", 16, 14.6, 320, 16, float32=8.1, float16=65, int8=130),
    _gpu("V100 16GB", "7.0", 16, 15.8, 900, 150, float32=15.7, float16=125),
    _gpu("V100 32GB", "7.0", 32, 31.7, 900, 150, float32=15.7, float16=125),
    _gpu("A100 40GB", "8.0", 40, 39.4, 1555, 300, float32=19.5, tensorfloat32=156, bfloat16=312,
         float16=312, int8=624),
    _gpu("A100 80GB", "8.0", 80, 79.2, 2039, 300, float32=19.5, tensorfloat32=156, bfloat16=312,
         float16=312, int8=624),
    _gpu("A100 80GB PCIe", "8.0", 80, 79.2, 1935, 32, float32=19.5, tensorfloat32=156,
         bfloat16=312, float16=312, int8=624),
    _gpu("A10", "8.6", 24, 22.5, 600, 32, float32=31.2, tensorfloat32=62.5, bfloat16=125,
         float16=125, int8=250),
    _gpu("A10G", "8.6", 24, 22.5, 600, 32, float32=31.5, tensorfloat32=35, bfloat16=70,
         float16=70, int8=140),
    _gpu("L4", "8.9", 24, 22.5, 300, 32, float32=30.3, tensorfloat32=60, bfloat16=121,
         float16=121, float8=242, int8=242),
    _gpu("RTX 3090", "8.6", 24, 23.7, 936, 32, float32=35.6, tensorfloat32=35.6, bfloat16=71,
         float16=71, int8=284),
    _gpu("RTX 4090", "8.9", 24, 23.6, 1008, 32, float32=82.6, tensorfloat32=82.6,
         bfloat16=165.2, float16=165.2, float8=330.3, int8=660.6),
    _gpu("H100 SXM", "9.0", 80, 79.1, 3352, 450, float32=66.9, tensorfloat32=494.7,
         bfloat16=989.4, float16=989.4, float8=1978.9, int8=1978.9),
    _gpu("H100 PCIe", "9.0", 80, 79.1, 2039, 64, float32=51.2, tensorfloat32=378, bfloat16=756,
         float16=756, float8=1513, int8=1513),
    _gpu("H100 NVL", "9.0", 94, 93.1, 3938, 300, float32=60, tensorfloat32=417.5,
         bfloat16=835.5, float16=835.5, float8=1670.5, int8=1670.5),
    _gpu("H200", "9.0", 141, 139.8, 4800, 450, float32=66.9, tensorfloat32=494.7,
         bfloat16=989.4, float16=989.4, float8=1978.9, int8=1978.9),
    _gpu("B200", "10.0", 180, 178.3, 7700, 900, float32=75, tensorfloat32=1125, bfloat16=2250,
         float16=2250, float8=4500, int8=4500),
)

HARDWARE: Mapping[str, Hardware] = {entry.name: entry for entry in (*_TPUS, *_GPUS)}

# Patterns for jax's device_kind, lower case, first match wins: the longer names come first.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"tpu ?v2\b", "TPU v2"),
    (r"tpu ?v3\b", "TPU v3"),
    (r"tpu ?v4\b(?! ?(lite|i))", "TPU v4"),
    (r"tpu ?v5 ?(lite|e)\b", "TPU v5e"),
    (r"tpu ?v5p?\b", "TPU v5p"),
    (r"tpu ?v6 ?(lite|e)\b", "TPU v6e"),
    (r"tpu ?v?7x?\b", "TPU 7x"),
    (r"gtx 1650\b(?! (super|ti|with|max))", "GTX 1650"),
    (r"\bt4\b", "T4"),
    (r"\bv100\b.*32 ?gb", "V100 32GB"),
    (r"\bv100\b", "V100 16GB"),
    (r"a100.*pcie.*80 ?gb|a100.*80 ?gb.*pcie", "A100 80GB PCIe"),
    (r"a100.*80 ?gb", "A100 80GB"),
    (r"\ba100\b", "A100 40GB"),
    (r"\ba10g\b", "A10G"),
    (r"\ba10\b", "A10"),
    (r"\bl4\b", "L4"),
    (r"rtx 3090\b(?! ti)", "RTX 3090"),
    (r"rtx 4090\b(?! (d|laptop))", "RTX 4090"),
    (r"h100 pcie", "H100 PCIe"),
    (r"h100 nvl", "H100 NVL"),
    (r"\bh100\b", "H100 SXM"),
    (r"\bh200\b(?! nvl)", "H200"),
    (r"\bb200\b", "B200"),
)


def lookup(device_kind: str) -> Hardware | None:
    """Returns the figures of a kind of device, or None if it is not in the table.

    Args:
        device_kind: `jax.Device.device_kind`, e.g. 'TPU v5 lite' or 'NVIDIA A100-SXM4-80GB', or a
            name of `HARDWARE`. Upper and lower case, '-' and '_' make no difference.
    """
    kind = re.sub(r"[-_\s]+", " ", device_kind).strip().lower()
    for name, entry in HARDWARE.items():
        if kind == name.lower():
            return entry
    for pattern, name in _KINDS:
        if re.search(pattern, kind):
            return HARDWARE[name]
    return None


@functools.cache
def measured_matmul_peak() -> float:
    """Returns the FLOP/s of the best of several float32 matmuls on this process's first CPU device.

    Takes about 0.2 s, once. A CPU has no data-sheet figure worth the name: cores are shared, clocks
    vary. MFU against this one is relative to a plain matmul of 768 x 768 on the same machine.
    """
    size = 768
    device = jax.local_devices(backend="cpu")[0]
    x = jax.device_put(jnp.ones((size, size), jnp.float32) / size, device)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_flops(device: jax.Device, compute_dtype: str = "bfloat16") -> float | None:
    """Returns the peak FLOP/s to hold a device's matmuls against, or None if it is not known.

    Args:
        device: any device. For CPUs the peak is measured, and shared among this process's CPU
            devices, which run on the same cores.
        compute_dtype: name of the dtype of matmul operands.
    """
    if device.platform == "cpu":
        return measured_matmul_peak() / len(jax.local_devices(backend="cpu"))
    entry = lookup(device.device_kind)
    return None if entry is None else entry.matmul_peak(compute_dtype)


def peak_flops_source(device: jax.Device) -> str:
    """Returns what an MFU on this device is relative to, for the log, once."""
    if device.platform == "cpu":
        return "MFU is relative to a measured float32 matmul peak of this machine"
    entry = lookup(device.device_kind)
    if entry is None:
        return (f"no peak FLOP/s known for {device.device_kind!r}: MFU is null. Add the device to "
                "core/hardware.py")
    return f"MFU is relative to the data-sheet peak of {entry.name}"


def memory_bytes(device: jax.Device) -> int | None:
    """Returns the bytes a program may use on the device: what it reports, else the table's."""
    try:
        stats = device.memory_stats()
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):
        stats = None  # compile-only devices of an ahead-of-time topology have none
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    entry = lookup(device.device_kind)
    return None if entry is None else entry.usable_bytes
