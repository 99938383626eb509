"""What the clouds call their accelerators, and how many chips, hosts and processes a name means."""

from __future__ import annotations

import dataclasses
import re

from vishwam_t5x.core.errors import UserError, did_you_mean

_POWERS = tuple(2**n for n in range(12))
# Chips to the topology that Google Kubernetes Engine wants.
_TORUS_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
             256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}
_TORUS_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
             256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One generation of TPUs.

    Attributes:
        name: as in the names of our presets, e.g. 'v5e'.
        cloud: as Cloud TPU names its accelerator types, e.g. 'v5litepod'.
        counts_cores: the number in the name counts TensorCores, two a chip; else chips.
        devices_per_chip: jax devices a chip.
        whole_host: chips that one host can have alone, the most; bigger slices have hosts of 4.
        chips: slice sizes on offer, in chips.
        runtime: version of the software of a TPU VM.
        gke: value of the node label cloud.google.com/gke-tpu-accelerator; "" if not supported.
        topologies: chips to topology, for GKE.
    """

    name: str
    cloud: str
    counts_cores: bool
    devices_per_chip: int
    whole_host: int
    chips: tuple[int, ...]
    runtime: str
    gke: str = ""
    topologies: dict[int, str] = dataclasses.field(default_factory=dict)


_UBUNTU = "tpu-ubuntu2204-base"
FAMILIES = (
    Family("v2", "v2", True, 2, 4, (4, 16, 64, 128, 256), _UBUNTU),
    Family("v3", "v3", True, 2, 4, (4, 16, 32, 64, 128, 256, 512, 1024), _UBUNTU),
    Family("v4", "v4", True, 1, 4, _POWERS[2:], _UBUNTU, "tpu-v4-podslice", _TORUS_3D),
    Family("v5e", "v5litepod", False, 1, 8, tuple(_TORUS_2D), "v2-alpha-tpuv5-lite",
           "tpu-v5-lite-podslice", _TORUS_2D),
    Family("v5p", "v5p", True, 1, 4, _POWERS[2:], "v2-alpha-tpuv5", "tpu-v5p-slice", _TORUS_3D),
    Family("v6e", "v6e", False, 1, 8, tuple(_TORUS_2D), "v2-alpha-tpuv6e", "tpu-v6e-slice",
           _TORUS_2D),
)
# Node label cloud.google.com/gke-accelerator, and GPUs a machine.
GKE_GPUS = {"t4": "nvidia-tesla-t4", "v100": "nvidia-tesla-v100", "l4": "nvidia-l4",
            "a100": "nvidia-tesla-a100", "a100-80gb": "nvidia-a100-80gb",
            "h100": "nvidia-h100-80gb", "h100-mega": "nvidia-h100-mega-80gb",
            "h200": "nvidia-h200-141gb", "b200": "nvidia-b200"}
# What XPK calls machines of them, less the number of GPUs, and the numbers that it has.
XPK_GPUS = {"l4": ("l4", (1, 2, 4, 8)), "a100": ("a100-40gb", (1, 2, 4, 8)),
            "h100": ("h100-80gb", (8,)), "h100-mega": ("h100-mega-80gb", (8,)),
            "h200": ("h200-141gb", (8,)), "b200": ("b200", (8,))}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU slice.

    Attributes:
        family: its generation.
        chips: chips in the slice.
    """

    family: Family
    chips: int

    @property
    def cloud_name(self) -> str:
        """Cloud TPU's accelerator type, e.g. 'v4-32'."""
        return f"{self.family.cloud}-{self.chips * (2 if self.family.counts_cores else 1)}"

    @property
    def hosts(self) -> int:
        """Machines, and processes of a run on it."""
        return 1 if self.chips <= self.family.whole_host else self.chips // 4

    @property
    def chips_per_host(self) -> int:
        """Chips of one machine."""
        return self.chips // self.hosts

    @property
    def preset(self) -> str:
        """Name of our preset for it, whether there is one or not."""
        number = self.chips * (2 if self.family.counts_cores else 1)
        return f"tpu_{self.family.name}_{number}.gin"

    def describe(self) -> str:
        """Returns what the name means, for people."""
        counted = " (the name counts TensorCores, two a chip)" if self.family.counts_cores else ""
        devices = self.chips * self.family.devices_per_chip
        return (f"{self.cloud_name}: {_plural(self.chips, 'chip')}{counted}, "
                f"{_plural(devices, 'jax device')}, {_plural(self.hosts, 'host')}")


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def parse_tpu(text: str) -> Tpu:
    """Returns the slice of a name such as 'v4-32', 'v5litepod-16' or 'v5e-16'.

    Raises:
        UserError: there is no such slice.
    """
    match = re.fullmatch(r"(?:tpu-)?(v\d+[a-z]*)-(\d+)", text.strip().lower())
    names = {family.name: family for family in FAMILIES}
    names |= {family.cloud: family for family in FAMILIES}
    if match is None or match[1] not in names:
        known = [name for family in FAMILIES for name in (family.name, family.cloud)]
        kind = text.lower().removeprefix("tpu-").partition("-")[0]
        raise UserError("unknown TPU accelerator", got=repr(text),
                        fix=did_you_mean(kind, known) or "GENERATION-SIZE, e.g. v3-8, v4-32, "
                        "v5litepod-16, v5p-8 or v6e-8")
    family, number = names[match[1]], int(match[2])
    scale = 2 if family.counts_cores else 1
    if number % scale or number // scale not in family.chips:
        sizes = [f"{family.cloud}-{chips * scale}" for chips in family.chips]
        counts = "TensorCores, two a chip" if family.counts_cores else "chips"
        raise UserError(f"there is no TPU slice {text}: the number counts {counts}", got=repr(text),
                        fix=f"one of: {', '.join(sizes)}")
    return Tpu(family, number // scale)


@dataclasses.dataclass(frozen=True)
class Gpus:
    """GPUs of one machine.

    Attributes:
        kind: name in lower case, e.g. 'h100'.
        count: how many a machine has.
    """

    kind: str
    count: int


def parse_gpus(text: str) -> Gpus:
    """Returns the GPUs of a name such as 'H100:8' or 'L4'.

    Raises:
        UserError: it is not KIND or KIND:COUNT.
    """
    match = re.fullmatch(r"([a-z][a-z0-9-]*)(?::(\d+))?", text.strip().lower())
    if match is None or match[2] == "0":
        raise UserError("GPUs are KIND:COUNT", got=repr(text), fix="e.g. H100:8, A100-80GB:2, L4")
    return Gpus(match[1], int(match[2] or 1))


def xpk_gpus(gpus: Gpus) -> str:
    """Returns XPK's name of a machine with these GPUs, e.g. 'h100-80gb-8'.

    Raises:
        UserError: XPK has no such machine.
    """
    name, counts = XPK_GPUS.get(gpus.kind, ("", ()))
    if gpus.count not in counts:
        known = [f"{kind}:{count}" for kind, (_, numbers) in XPK_GPUS.items() for count in numbers]
        raise UserError("XPK has no machine of these GPUs", got=f"{gpus.kind}:{gpus.count}",
                        fix=f"one of: {', '.join(known)}; others: --on=gke")
    return f"{name}-{gpus.count}"


def is_tpu(text: str) -> bool:
    """Whether the name of an accelerator means a TPU."""
    return re.match(r"(tpu-)?v\d+[a-z]*-\d+$", text.strip().lower()) is not None
