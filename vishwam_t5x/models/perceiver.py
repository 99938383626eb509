"""The perceiver resampler: any number of features read into a fixed number of latents.

Flamingo's (arXiv 2204.14198) as Unified-IO 2 (arXiv 2312.17172) has it: the latents alone are
queries, the features alone keys and values, no positions, one norm for the features.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models import masks
from vishwam_t5x.models.attention import Attention
from vishwam_t5x.models.layers import MlpBlock, RMSNorm, named
from vishwam_t5x.models.modalities import check_positive
from vishwam_t5x.precision.policy import Policy

_LATENTS = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampler:
    """Config of a perceiver resampler.

    Attributes:
        num_latents: vectors it gives for each frame.
        emb_dim: width of the latents, in features.
        num_heads: heads of its attentions.
        head_dim: features of a head.
        mlp_dim: hidden units of its MLPs.
        num_layers: layers.
        cross_layers: numbers of the layers that read the features; the others let the latents
            attend to each other. None: all read.
        scaled_cosine: attention by cosines with a learned factor a head instead of QK-norm
            (Unified-IO 2 xxl).
    """

    num_latents: int
    emb_dim: int = 768
    num_heads: int = 12
    head_dim: int = 64
    mlp_dim: int = 2048
    num_layers: int = 2
    cross_layers: tuple[int, ...] | None = None
    scaled_cosine: bool = False

    def __post_init__(self) -> None:
        check_positive(self, ("num_latents", "emb_dim", "num_heads", "head_dim", "mlp_dim",
                              "num_layers"))
        if self.cross_layers is None:
            return
        object.__setattr__(self, "cross_layers", tuple(self.cross_layers))
        if not self.cross_layers or not set(self.cross_layers) <= set(range(self.num_layers)):
            raise UserError("Resampler.cross_layers are numbers of its layers, one at least",
                            got=f"{self.cross_layers} of {self.num_layers} layers",
                            fix="None: every layer reads the features")

    def reads(self, layer: int) -> bool:
        """Returns whether a layer reads the features."""
        return self.cross_layers is None or layer in self.cross_layers


class _ResamplerLayer(nn.Module):
    """x += Attention(Norm x, features or Norm x); x += MLP(Norm x)."""

    config: Resampler
    cross: bool
    policy: Policy

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, bias: jax.Array) -> jax.Array:
        cfg, dtypes = self.config, (self.policy.compute_dtype, self.policy.param_dtype)
        kind = "xattention" if self.cross else "attention"

        def norm(name: str) -> RMSNorm:
            return RMSNorm(dtype=dtypes[0], param_dtype=dtypes[1], name=name)

        attention = Attention(
            cfg.num_heads, cfg.num_heads, cfg.head_dim, cfg.emb_dim, not cfg.scaled_cosine,
            dtype=dtypes[0], param_dtype=dtypes[1], scaled_cosine=cfg.scaled_cosine, name=kind)
        y = norm(f"pre_{kind}_layer_norm")(x)
        if self.cross:
            x = x + attention(y, context, None, None, bias)
        else:
            x = x + attention(y, y, None, None, jnp.zeros((1, 1, 1, 1), bias.dtype))
        mlp = MlpBlock(cfg.mlp_dim, ("gelu_tanh",), 0.0, *dtypes, name="mlp")
        return x + mlp(norm("pre_mlp_layer_norm")(x))


class PerceiverResampler(nn.Module):
    """Latents that read frames, one frame's features apart from another's."""

    config: Resampler
    policy: Policy

    @nn.compact
    def __call__(self, features: Float[Array, "N P E"], mask: Int[Array, "N P"]
                 ) -> Float[Array, "N L E"]:
        """Reads the features of each frame into its latents.

        Args:
            features: [N, P, E], E = emb_dim.
            mask: [N, P], 0 for features that are not to be read. Where a frame has no others its
                latents read the mean of all, and mean nothing.
        """
        cfg, dtypes = self.config, (self.policy.compute_dtype, self.policy.param_dtype)
        latents = self.param(
            "resampler_latents",
            named(_LATENTS, "latents", "embed"),
            (cfg.num_latents, cfg.emb_dim), dtypes[1])
        x = jnp.broadcast_to(latents.astype(dtypes[0]), (features.shape[0], *latents.shape))
        context = RMSNorm(dtype=dtypes[0], param_dtype=dtypes[1], name="context_norm")(features)
        bias = masks.to_bias((mask > 0)[:, None, :], jnp.float32)
        for number in range(cfg.num_layers):
            layer = _ResamplerLayer(cfg, cfg.reads(number), self.policy, name=f"layers_{number}")
            x = layer(x, context, bias)
        return RMSNorm(dtype=dtypes[0], param_dtype=dtypes[1], name="perceiver_norm")(x)
