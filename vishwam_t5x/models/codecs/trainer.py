"""A codec as `vishwam train` trains it: batches of patches in, the loss of a reconstruction out."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Float

from vishwam_t5x.core.batch import Batch
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models.codecs.audio_vqgan import AudioVQGAN, AudioVQGANConfig
from vishwam_t5x.models.codecs.image_vqgan import ImageVQGAN, ImageVQGANConfig
from vishwam_t5x.models.codecs.layers import CodecOutput
from vishwam_t5x.models.modalities import normalize
from vishwam_t5x.objectives.losses import LossConfig, LossSums, loss_weights
from vishwam_t5x.precision.policy import Policy

_NEAR = 0.125  # of the range [0, 1] of a picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecTrainingConfig:
    """A codec and its loss.

    The loss of a picture or spectrogram x that comes back as y is

        absolute · |x - y| + squared · |x - y|²            means over its numbers
        + codebook · |sg(z) - e|² + commitment · |z - sg(e)|²
                                                           means over its vectors z and codes e
        + entropy · (H(p) - H(mean p))

    where sg stops the gradient (van den Oord et al. 2017, arXiv 1711.00937) and p are the
    probabilities of the codes of a vector, softmax of -|z - e|² / temperature; their mean is over
    the (micro)batch. The last term brings all codes into use (Yu et al. 2023, arXiv 2310.05737).

    Attributes:
        codec: sizes of the codec.
        patch: (rows, columns) of the patches that pictures come in: the objective's PatchSpec.
        absolute: weight of the mean absolute error.
        squared: weight of the mean squared error.
        codebook: weight that draws codes to vectors.
        commitment: weight that draws vectors to codes.
        entropy: weight of the last term, which needs memory for vectors times codes; 0 for none.
        temperature: of its probabilities, in squared distances.

    Raises:
        UserError: sizes or weights that cannot be.
    """

    codec: ImageVQGANConfig | AudioVQGANConfig
    patch: tuple[int, int]
    absolute: float = 1.0
    squared: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        if len(self.patch) != 2 or any(size % side for size, side in
                                       zip(self.size, self.patch, strict=True)):
            raise UserError("CodecTrainingConfig.patch must divide what the codec codes",
                            got=f"{self.patch}, {self.size[0]} x {self.size[1]}",
                            fix="(rows, columns), as PatchSpec.patch_size of the objective")
        for name in ("absolute", "squared", "codebook", "commitment", "entropy"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"CodecTrainingConfig.{name} must be finite and not negative",
                                got=getattr(self, name))
        if not self.absolute + self.squared > 0:
            raise UserError("a codec needs a loss of its reconstruction",
                            got="absolute and squared are 0", fix="absolute = 1.0")
        if not self.temperature > 0:
            raise UserError("CodecTrainingConfig.temperature must be positive",
                            got=self.temperature)

    @property
    def modality(self) -> str:
        """'image' or 'audio'."""
        return "image" if isinstance(self.codec, ImageVQGANConfig) else "audio"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, or frames and mel bins."""
        if isinstance(self.codec, ImageVQGANConfig):
            return self.codec.resolution, self.codec.resolution
        return self.codec.frames, self.codec.mels

    @property
    def channels(self) -> int:
        """Numbers of a pixel."""
        return self.codec.channels if isinstance(self.codec, ImageVQGANConfig) else 1

    @property
    def num_patches(self) -> int:
        """Patches of a picture or spectrogram."""
        return (self.size[0] // self.patch[0]) * (self.size[1] // self.patch[1])

    # -- what a trainer asks of a model's config -----------------------------------------------

    inputs = ()
    """No modality modules, whose tables and grids a task could miss."""

    targets = ()

    @property
    def policy(self) -> Policy:
        """The dtypes of the codec."""
        return self.codec.policy

    @property
    def input_modalities(self) -> tuple[str, ...]:
        """What the batch holds."""
        return (self.modality,)

    @property
    def target_modalities(self) -> tuple[str, ...]:
        """What the loss is counted in."""
        return (self.modality,)

    @property
    def tables(self) -> dict[str, int]:
        """Embedding tables of tokens: none."""
        return {}

    @property
    def patch_dims(self) -> dict[str, int]:
        """Numbers in a patch."""
        return {self.modality: self.patch[0] * self.patch[1] * self.channels}

    @functools.cached_property
    def flops_per_slot(self) -> tuple[float, float]:
        """Training FLOPs per filled (encoder slot, decoder slot): a decoder slot is a picture."""
        model = CodecTrainer(self)
        codec = model.new_codec()
        signal = jax.ShapeDtypeStruct((1, *self.size, self.channels), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0))
        inner = {"params": variables["params"]["discrete_vae"]}
        cost = jax.jit(codec.apply).lower(meta.unbox(inner), signal).cost_analysis() or {}
        return 0.0, 3.0 * cost.get("flops", 0.0)  # twice as much backward


class CodecTrainer(nn.Module):
    """The codec, under the name by which Unified-IO 2's checkpoints know it, and its loss.

    Attributes:
        config: sizes and weights.
    """

    config: CodecTrainingConfig

    def setup(self) -> None:
        self.discrete_vae = self.new_codec()

    @nn.nowrap
    def new_codec(self) -> ImageVQGAN | AudioVQGAN:
        """Returns the codec's module."""
        codec = self.config.codec
        return ImageVQGAN(codec) if isinstance(codec, ImageVQGANConfig) else AudioVQGAN(codec)

    @nn.nowrap
    def init(self, rngs: Any, batch: Batch | None = None,  # type: ignore[override]
             **kwargs: Any) -> Any:
        """Returns freshly initialized variables, boxed with their logical axes."""
        if batch is None:
            cfg = self.config
            patches = jnp.zeros((1, cfg.num_patches, cfg.patch_dims[cfg.modality]))
            batch = {f"inputs/{cfg.modality}/input": patches}
        return super().init(rngs, batch, **kwargs)

    def __call__(self, batch: Batch) -> CodecOutput:
        """Codes and decodes what the batch holds; pictures in [-1, 1]."""
        return self.discrete_vae(self._signal(batch))

    def reconstruct(self, batch: Batch) -> tuple[Float[Array, "b H W c"], Float[Array, "b H W c"]]:
        """Returns what the batch holds and what comes back, float32; pictures in [0, 1]."""
        signal = self._signal(batch)
        found = self.discrete_vae(signal).reconstruction.astype(jnp.float32)
        if self.config.modality == "audio":
            return signal, found
        return (signal + 1) / 2, jnp.clip((found + 1) / 2, 0, 1)

    def loss_sums(self, batch: Batch, loss: LossConfig, enable_dropout: bool = False
                  ) -> dict[str, LossSums]:
        """Returns the loss, of which each picture has one; see `CodecTrainingConfig`.

        `z_loss` is the part that is not of the reconstruction, and `correct` the share of numbers
        that come back within an eighth of a picture's range. Of `loss` nothing is read but what
        weighs the pictures.
        """
        del enable_dropout
        cfg, signal = self.config, self._signal(batch)
        output = self.discrete_vae(signal)
        error = output.reconstruction.astype(jnp.float32) - signal
        absolute, squared = _means(jnp.abs(error)), _means(jnp.square(error))
        weights = loss_weights(batch, cfg.modality, loss).sum(-1)
        of_codes = self._code_loss(output, weights)
        near = _means((jnp.abs(error) < 2 * _NEAR).astype(jnp.float32))
        each = cfg.absolute * absolute + cfg.squared * squared + of_codes
        constant = jax.lax.stop_gradient
        return {cfg.modality: LossSums(
            jnp.sum(each * weights), constant(jnp.sum(of_codes * weights)), jnp.sum(weights),
            constant(jnp.sum(near * weights)))}

    def _code_loss(self, output: CodecOutput, weights: Float[Array, " b"]
                   ) -> Float[Array, " b"]:
        cfg, stop = self.config, jax.lax.stop_gradient
        vectors, quantized = output.vectors, output.quantized
        total = (cfg.codebook * _means(jnp.square(stop(vectors) - quantized))
                 + cfg.commitment * _means(jnp.square(vectors - stop(quantized))))
        if cfg.entropy:
            table = self.discrete_vae.quantize.table()
            distances = (jnp.sum(jnp.square(vectors), -1, keepdims=True)
                         + jnp.sum(jnp.square(table), -1) - 2.0 * vectors @ table.T)
            logs = jax.nn.log_softmax(-distances / cfg.temperature, -1)
            chances = jnp.exp(logs)
            each = -jnp.mean(jnp.sum(chances * logs, -1), -1)
            mean = weights @ jnp.mean(chances, 1) / jnp.maximum(jnp.sum(weights), 1.0)
            total += cfg.entropy * (each + jnp.sum(mean * jnp.log(mean + 1e-12)))
        return total

    def _signal(self, batch: Batch) -> Float[Array, "b H W c"]:
        """What the batch holds, as the codec takes it."""
        cfg = self.config
        patches = batch[f"inputs/{cfg.modality}/input"]
        if "inputs/row/index" in batch or patches.shape[1] != cfg.num_patches:
            raise UserError(
                "a codec is trained on one whole picture or spectrogram a row",
                got=f"{patches.shape[1]} patches a row" + (
                    ", packed" if "inputs/row/index" in batch else ""),
                fix=f"TASK_FEATURE_LENGTHS = {{'inputs': {cfg.num_patches}, 'targets': 1}} and "
                    "DatasetConfig.pack = False")
        (height, width), (tall, wide) = cfg.size, cfg.patch
        cut = normalize(patches, 0.0, 1.0, jnp.float32).astype(jnp.float32).reshape(
            -1, height // tall, width // wide, tall, wide, cfg.channels)
        signal = cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, cfg.channels)
        return signal * 2 - 1 if cfg.modality == "image" else signal


def _means(x: Float[Array, "b *rest"]) -> Float[Array, " b"]:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
