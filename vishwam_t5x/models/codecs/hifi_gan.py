"""The vocoder: mel spectrograms to waveforms by the generator of HiFi-GAN.

Kong et al. 2020, arXiv 2010.05646; names and sizes of its repository, jik876/hifi-gan. Weights
come from the PyTorch names: `read_weights`, then `from_pytorch`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models.modalities import check_positive
from vishwam_t5x.precision.policy import Policy, resolve_policy

_SLOPE = 0.1
_LAST_SLOPE = 0.01  # their last activation has PyTorch's default slope
# Weight norm: w = g · v / |v|, in its older and its newer names.
_NORMED = (("weight_g", "weight_v"),
           ("parametrizations.weight.original0", "parametrizations.weight.original1"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiFiGANConfig:
    """Sizes of the generator; the defaults are those of V1, with 128 mel bins.

    Attributes:
        mels: mel bins of a spectrogram.
        width: channels after the first convolution, halved by each upsampling.
        upsampling: factors, whose product is the samples of a frame.
        upsampling_kernels: lengths of the transposed convolutions; each exceeds its factor by an
            even number.
        kernels: lengths of the convolutions of the residual blocks after each upsampling, odd.
        dilations: of the convolutions of a residual block.
        precision: dtypes, a `Policy` or its name.

    Raises:
        UserError: sizes that do not go together.
    """

    mels: int = 128
    width: int = 512
    upsampling: tuple[int, ...] = (8, 8, 2, 2)
    upsampling_kernels: tuple[int, ...] = (16, 16, 4, 4)
    kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    precision: Policy | str = "float32"

    def __post_init__(self) -> None:
        check_positive(self, ("mels", "width"))
        for name in ("upsampling", "upsampling_kernels", "kernels", "dilations"):
            value = tuple(getattr(self, name))
            if not value or not all(isinstance(each, int) and each >= 1 for each in value):
                raise UserError(f"HiFiGANConfig.{name} are whole numbers of at least 1",
                                got=repr(value))
            object.__setattr__(self, name, value)
        pairs = list(zip(self.upsampling, self.upsampling_kernels, strict=False))
        if len(self.upsampling) != len(self.upsampling_kernels) or any(
                kernel < factor or (kernel - factor) % 2 for factor, kernel in pairs):
            raise UserError("each of upsampling_kernels must exceed its factor by an even number",
                            got=f"{self.upsampling_kernels} for {self.upsampling}",
                            fix="twice the factor")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise UserError("HiFiGANConfig.kernels must be odd", got=self.kernels)
        if self.width % 2 ** len(self.upsampling):
            raise UserError("HiFiGANConfig.width must be divisible by 2 for each upsampling",
                            got=self.width, fix=f"a multiple of {2 ** len(self.upsampling)}")
        if not isinstance(self.precision, Policy):
            resolve_policy(self.precision if self.precision != "auto" else "float32")

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return int(np.prod(self.upsampling))

    @functools.cached_property
    def policy(self) -> Policy:
        """The dtypes `precision` stands for on this machine."""
        return resolve_policy(self.precision)


class HiFiGAN(nn.Module):
    """Log-mel spectrograms to waveforms.

    What the logarithm is taken of, and how it is scaled, must be what the weights were trained on.

    Attributes:
        config: sizes.
    """

    config: HiFiGANConfig

    @nn.compact
    def __call__(self, log_mel: Float[Array, "b t m"]) -> Float[Array, "b s"]:
        """Returns waveforms in [-1, 1], float32, `config.hop` samples a frame.

        Raises:
            UserError: not `config.mels` mel bins.
        """
        cfg = self.config
        if log_mel.ndim != 3 or log_mel.shape[2] != cfg.mels:
            raise UserError("these are no spectrograms that the vocoder can read",
                            got=f"shape {log_mel.shape}", fix=f"[batch, frames, {cfg.mels}]")
        x = self._convolution(cfg.width, 7, "conv_pre")(log_mel)
        for stage, (factor, kernel) in enumerate(
                zip(cfg.upsampling, cfg.upsampling_kernels, strict=True)):
            x = nn.leaky_relu(x, _SLOPE)
            # PyTorch drops (kernel - factor) / 2 samples at either end.
            edge = kernel - 1 - (kernel - factor) // 2
            x = nn.ConvTranspose(
                cfg.width >> (stage + 1), (kernel,), (factor,), [(edge, edge)],
                dtype=cfg.policy.compute_dtype, param_dtype=cfg.policy.param_dtype,
                name=f"ups_{stage}")(x)
            first = stage * len(cfg.kernels)
            blocks = [self._residual(x, kernel, f"resblocks_{first + index}")
                      for index, kernel in enumerate(cfg.kernels)]
            x = sum(blocks[1:], blocks[0]) / len(blocks)
        x = self._convolution(1, 7, "conv_post")(nn.leaky_relu(x, _LAST_SLOPE))
        return jnp.tanh(x.astype(jnp.float32))[..., 0]

    def _residual(self, x: jax.Array, kernel: int, name: str) -> jax.Array:
        """x + conv(leaky(dilated conv(leaky(x)))), once for each dilation."""
        for index, dilation in enumerate(self.config.dilations):
            y = nn.leaky_relu(x, _SLOPE)
            y = self._convolution(x.shape[-1], kernel, f"{name}_convs1_{index}", dilation)(y)
            y = nn.leaky_relu(y, _SLOPE)
            x = x + self._convolution(x.shape[-1], kernel, f"{name}_convs2_{index}")(y)
        return x

    def _convolution(self, features: int, kernel: int, name: str, dilation: int = 1) -> nn.Conv:
        policy = self.config.policy
        return nn.Conv(features, (kernel,), padding="SAME", kernel_dilation=(dilation,),
                       dtype=policy.compute_dtype, param_dtype=policy.param_dtype, name=name)


def read_weights(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a .npz or .safetensors file by name.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError("there is no file with the vocoder's weights", got=path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    raise UserError("the vocoder's weights are read from .npz and .safetensors files", got=path,
                    fix="in PyTorch: safetensors.torch.save_file(torch.load(FILE)['generator'], "
                    "'vocoder.safetensors')")


def from_pytorch(weights: Mapping[str, np.ndarray], config: HiFiGANConfig) -> dict[str, Any]:
    """Returns variables of `HiFiGAN` from PyTorch's arrays; weight norm is multiplied out.

    Args:
        weights: by the names of jik876/hifi-gan ('conv_pre.weight', 'ups.0.weight_g', …), with or
            without weight norm, perhaps all under 'generator.'.
        config: sizes that they must have.

    Raises:
        UserError: arrays are missing, left over or of another shape.
    """
    named = {name.removeprefix("generator."): np.asarray(array, np.float32)
             for name, array in weights.items()}
    for g, v in _NORMED:
        for name in [name for name in named if name.endswith("." + v)]:
            stem = name.removesuffix("." + v)
            if f"{stem}.{g}" not in named:
                raise UserError("weight norm lacks its lengths", got=name, fix=f"add {stem}.{g}")
            named[f"{stem}.weight"] = _multiplied_out(named.pop(f"{stem}.{g}"), named.pop(name))
    expected = jax.eval_shape(HiFiGAN(config).init, jax.random.key(0),
                              jnp.zeros((1, 1, config.mels)))["params"]
    found: dict[str, dict[str, np.ndarray]] = {}
    for module, leaves in expected.items():
        stem = re.sub(r"_(?=\d|convs)", ".", module)
        for leaf, like in leaves.items():
            name = f"{stem}.{'weight' if leaf == 'kernel' else leaf}"
            if name not in named:
                raise UserError("the vocoder's weights lack an array", got=name,
                                fix="make HiFiGANConfig agree with them")
            array = named.pop(name)
            if leaf == "kernel" and array.ndim == 3:
                # Theirs is (in, out, length) where transposed, and runs backwards.
                array = (array.transpose(2, 0, 1)[::-1] if stem.startswith("ups")
                         else array.transpose(2, 1, 0))
            if array.shape != like.shape:
                raise UserError(f"the vocoder's {name} has another shape", got=array.shape,
                                fix=f"{like.shape} in HiFiGANConfig's order (length, in, out)")
            found.setdefault(module, {})[leaf] = np.ascontiguousarray(array)
    if named:
        raise UserError("the vocoder's weights have arrays that it has no use for",
                        got=", ".join(sorted(named)[:5]), fix="make HiFiGANConfig agree with them")
    return {"params": found}


def _multiplied_out(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """g · v / |v|, the length over all but the first axis."""
    length = np.sqrt(np.sum(np.square(v), axis=tuple(range(1, v.ndim)), keepdims=True))
    return g * v / length
