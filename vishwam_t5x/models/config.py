"""Config of the encoder-decoder: plain frozen dataclasses, constructible from gin bindings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.models import placement, tables
from vishwam_t5x.models.inputs.audio import AudioInput as AudioInput
from vishwam_t5x.models.inputs.codes import CodeInput as CodeInput
from vishwam_t5x.models.inputs.history import HistoryInput as HistoryInput
from vishwam_t5x.models.inputs.image import ImageInput as ImageInput
from vishwam_t5x.models.inputs.patches import PatchInput as PatchInput
from vishwam_t5x.models.inputs.text import TextInput as TextInput
from vishwam_t5x.models.layers import ACTIVATIONS
from vishwam_t5x.models.modalities import InputConfig, TargetConfig, check_positive
from vishwam_t5x.models.outputs.codes import CodeOutput as CodeOutput
from vishwam_t5x.models.outputs.text import TextOutput as TextOutput
from vishwam_t5x.models.perceiver import Resampler as Resampler
from vishwam_t5x.models.vision_transformer import AudioTransformer as AudioTransformer
from vishwam_t5x.models.vision_transformer import ImageTransformer as ImageTransformer
from vishwam_t5x.models.vision_transformer import Transformer
from vishwam_t5x.parallelism.remat import remat_policy
from vishwam_t5x.precision.policy import Policy, resolve_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryPositions:
    """Rotary positions in every attention, cross-attention included.

    Attributes:
        theta: base of the frequencies; pair p of a head of size d turns theta^(-2p/d) radians per
            position.
    """

    theta: float = 10000.0

    def __post_init__(self) -> None:
        if not self.theta > 1:
            raise UserError("RotaryPositions.theta must be greater than 1", got=self.theta,
                            fix="10000.0 is what Unified-IO 2 uses")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativePositions:
    """T5's relative position biases in self-attention; none in cross-attention.

    Attributes:
        num_buckets: distances told apart, per head.
        max_distance: slots, from which on distances are not told apart.
        per_layer: a table for each layer (umT5) instead of one for each stack (T5).
    """

    num_buckets: int = 32
    max_distance: int = 128
    per_layer: bool = False

    def __post_init__(self) -> None:
        check_positive(self, ("num_buckets", "max_distance"))
        if self.num_buckets % 4:
            raise UserError("RelativePositions.num_buckets must be a multiple of 4: a half for "
                            "either direction, and half of those for single distances",
                            got=self.num_buckets, fix="32, as in T5")
        if self.max_distance <= self.num_buckets // 2:
            raise UserError("RelativePositions.max_distance must exceed half of num_buckets",
                            got=f"{self.max_distance} and {self.num_buckets} buckets",
                            fix="128 and 32, as in T5")


def choose(modules: Sequence[Any], names: Sequence[str]) -> tuple[Any, ...]:
    """Returns the inputs or targets of the given modalities, in the order of `modules`.

    For gin: a subset of what a file sets up, by one list of names.

    Args:
        modules: configs of inputs or of targets.
        names: modalities to keep.

    Raises:
        UserError: a name that no module has, or not a list of names.
    """
    if not isinstance(names, list | tuple):  # The letters of a name would pass for a list.
        raise UserError("the modalities to choose must be a list", got=repr(names),
                        fix=f"({names!r},)" if isinstance(names, str) else "('text', 'image')")
    known = tuple(module.modality for module in modules)
    for name in names:
        one_of(name, known, "modality to choose")
    return tuple(module for module in modules if module.modality in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Everything that decides the parameters and the mathematics of an encoder-decoder.

    Attributes:
        emb_dim: width of the residual stream, in features.
        num_heads: query heads of every attention.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None: as many.
        head_dim: features of a head; num_heads · head_dim need not be emb_dim.
        mlp_dim: hidden units of the MLP.
        mlp_activations: activations whose product is the MLP's hidden layer, see
            `layers.ACTIVATIONS`; ('silu', 'linear') is a SiLU-gated MLP.
        num_encoder_layers: encoder blocks; 0: no encoder, a decoder-only prefix LM (see
            `models.prefix`).
        num_decoder_layers: decoder blocks.
        inputs: input modalities, in the order of their slots in an encoder row.
        targets: target modalities, in the order of their slots in a decoder row.
        dropout_rate: share of features zeroed during training, in [0, 1).
        qk_norm: RMSNorm over each head of queries and keys.
        isolate_targets: targets of different modalities of an example do not see each other, as in
            Unified-IO 2; False: later ones see those before them, in the order of `targets` (of a
            target all but the last token: the end of a text, but of a grid its last code).
        position: how attention knows positions: `RotaryPositions` or `RelativePositions`.
        scale_attention_logits: divide attention logits by √head_dim; T5 does not, and draws the
            kernels of its queries smaller instead.
        float32_attention_logits: attention logits and softmax in float32 whatever the precision.
        one_hot_embeddings: look embeddings up by matmul (for TPUs that split the vocabulary).
        scan_layers: run layers as one scan over stacked parameters instead of unrolled.
        remat_policy: what the backward pass recomputes, see `parallelism.remat`.
        precision: dtypes, a `Policy` or its name ('auto': what the device is best at).

    Raises:
        UserError: values that do not go together, with the fix.
    """

    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    inputs: tuple[InputConfig, ...]
    targets: tuple[TargetConfig, ...]
    num_kv_heads: int | None = None
    mlp_activations: tuple[str, ...] = ("silu", "linear")
    dropout_rate: float = 0.0
    qk_norm: bool = True
    isolate_targets: bool = True
    position: RotaryPositions | RelativePositions = RotaryPositions()
    scale_attention_logits: bool = True
    float32_attention_logits: bool = True
    one_hot_embeddings: bool = False
    scan_layers: bool = False
    remat_policy: str = "none"
    precision: Policy | str = "float32"

    def __post_init__(self) -> None:
        for name in ("inputs", "targets", "mlp_activations"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not value:
                raise UserError(f"EncoderDecoderConfig.{name} must be a tuple of one entry or more",
                                got=repr(value),
                                fix="e.g. mlp_activations = ('silu', 'linear'), "
                                "inputs = (@config.TextInput(),)")
            object.__setattr__(self, name, tuple(value))
        check_positive(self, ("emb_dim", "num_heads", "head_dim", "mlp_dim", "num_decoder_layers"))
        if self.num_encoder_layers != 0:
            check_positive(self, ("num_encoder_layers",))
        self._check_attention()
        for activation in self.mlp_activations:
            one_of(activation, ACTIVATIONS, "activation in mlp_activations")
        if isinstance(self.dropout_rate, bool) or not 0 <= self.dropout_rate < 1:
            raise UserError("dropout_rate is a share in [0, 1)", got=self.dropout_rate,
                            fix="DROPOUT_RATE = 0.1, or 0.0 for none")
        remat_policy(self.remat_policy, platform="cpu")
        if not isinstance(self.precision, Policy):
            resolve_policy(self.precision if self.precision != "auto" else "float32")
        self._check_modalities()

    def _check_attention(self) -> None:
        if self.num_kv_heads is not None:
            check_positive(self, ("num_kv_heads",))
            if self.num_heads % self.num_kv_heads:
                divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
                raise UserError("num_heads must be a multiple of num_kv_heads",
                                got=f"{self.num_heads} and {self.num_kv_heads}",
                                fix=f"num_kv_heads one of {divisors}")
        if not isinstance(self.position, (RotaryPositions, RelativePositions)):
            raise UserError("position must be RotaryPositions or RelativePositions",
                            got=repr(self.position), fix="position = @config.RotaryPositions()")
        if self.rope_theta is not None and self.head_dim % 2:
            raise UserError("rotary positions turn pairs of features: head_dim must be even",
                            got=self.head_dim, fix=f"head_dim = {self.head_dim + 1}")

    def _check_modalities(self) -> None:
        if (self.decoder_only and len(self.targets) > 1 and self.isolate_targets
                and self.rope_theta is None):
            raise UserError(
                "targets that do not see each other start at the same position in a decoder-only "
                "model: that takes rotary positions", got=repr(self.position),
                fix="isolate_targets = False, or position = @config.RotaryPositions()")
        for side, modules in (("inputs", self.inputs), ("targets", self.targets)):
            names = [module.modality for module in modules]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"{side} name a modality twice", got=", ".join(names),
                                    fix=f"give each entry of {side} a modality of its own")
                if not name or "/" in name or name == "row":
                    raise UserError(f"not a name for a modality of {side}", got=repr(name),
                                    fix="e.g. 'text', 'image', 'audio'")
        everything: tuple[InputConfig | TargetConfig, ...] = (*self.inputs, *self.targets)
        for module in everything:
            module.check(self)
        tables.of(self)
        placement.check(self)
        transformers: dict[str, Transformer] = {}
        for module in self.inputs:
            found = module.transformer
            if found is not None and transformers.setdefault(found.name, found) != found:
                raise UserError(
                    f"two inputs share the transformer '{found.name}', but differ in its settings",
                    got=f"{transformers[found.name]} and {found}",
                    fix="give both the same, or the second another name")

    @property
    def decoder_only(self) -> bool:
        """Whether there is no encoder, and inputs are a prefix of what the decoder reads."""
        return self.num_encoder_layers == 0

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rope_theta(self) -> float | None:
        """Base of the rotary frequencies; None for other positions."""
        return self.position.theta if isinstance(self.position, RotaryPositions) else None

    @functools.cached_property
    def policy(self) -> Policy:
        """The dtypes `precision` stands for on this machine."""
        return resolve_policy(self.precision)

    @property
    def input_modalities(self) -> tuple[str, ...]:
        """Names of the input modalities in row order."""
        return tuple(module.modality for module in self.inputs)

    @property
    def target_modalities(self) -> tuple[str, ...]:
        """Names of the target modalities in row order."""
        return tuple(module.modality for module in self.targets)

    @property
    def tables(self) -> dict[str, int]:
        """Rows of each embedding table by name."""
        return {name: table.rows for name, table in tables.of(self).items()}

    def shared_rows(self, table: str) -> dict[str, tuple[int, int]]:
        """Rows (first, end) of a table that other modalities have, by modality."""
        return tables.claims(self, table)

    def output_rows(self, modality: str) -> int:
        """Rows of what predicts a target modality: its kernel's, or those of its whole table."""
        target = self.target(modality)
        return (self.tables[target.table.name] if target.logits_via_embedding
                else target.vocab_size)

    def target_adaptors(self, modality: str) -> int:
        """Numbers in the kernels that stand between a target's table, the layers and its head."""
        target = self.target(modality)
        width, found = self.emb_dim, 0
        if target.adaptor == "mlp":
            found += (target.table.features or width) * width + width**2
        return found + (width**2 if target.head == "mlp" else 0)

    @property
    def transformers(self) -> dict[str, Transformer]:
        """The transformers that inputs go through, by name."""
        found = (module.transformer for module in self.inputs)
        return {config.name: config for config in found if config is not None}

    @property
    def codecs(self) -> dict[str, Any]:
        """Configs of the codecs that the model holds, by target modality."""
        found = ((module.modality, getattr(module, "codec", None)) for module in self.targets)
        return {modality: codec for modality, codec in found if codec is not None}

    @property
    def codec_prefixes(self) -> tuple[str, ...]:
        """What names of the parameters of codecs begin with."""
        return tuple(f"{self.target(modality).module_name}/discrete_vae/"
                     for modality in self.codecs)

    @property
    def frozen_transformers(self) -> tuple[str, ...]:
        """Names of the transformers that no input teaches.

        An input that freezes the one it shares takes nothing from another that teaches it.
        """
        taught = {module.transformer.name for module in self.inputs
                  if module.transformer is not None and module.teaches_transformer}
        return tuple(name for name in self.transformers if name not in taught)

    @property
    def frozen_prefixes(self) -> tuple[str, ...]:
        """What names of parameters begin with that are never trained: those of codecs, and what
        inputs freeze."""
        parts = tuple(f"{module.module_name}/{part}/" for module in self.inputs
                      for part in module.frozen_parts)
        return (*self.codec_prefixes, *(f"{name}/" for name in self.frozen_transformers), *parts)

    @property
    def has_patterns(self) -> bool:
        """Whether the attention of some target is narrowed further than causal."""
        return any(module.pattern_width or module.dynamic_mask for module in self.targets)

    @property
    def patch_dims(self) -> dict[str, int]:
        """Numbers in a patch, by continuous input modality (for `core.batch.BatchSpec`)."""
        return {module.modality: module.patch_dim for module in self.inputs
                if module.patch_dim is not None}

    @property
    def most_a_row(self) -> dict[str, int]:
        """Images or spectrograms that a packed row may hold, by modality (for `BatchSpec`)."""
        return {module.modality: module.max_per_row for module in self.inputs
                if hasattr(module, "max_per_row")}

    def target(self, modality: str) -> TargetConfig:
        """Returns the config of a target modality; `UserError` if the model has none such."""
        one_of(modality, self.target_modalities, "target modality of this model")
        return self.targets[self.target_modalities.index(modality)]

    def dummy_batch(self) -> dict[str, Any]:
        """Returns the smallest batch that reaches every parameter: one row, one slot each."""
        import jax.numpy as jnp

        batch: dict[str, Any] = {}
        for module in self.inputs:
            batch.update({f"inputs/{module.modality}/{name}": array
                          for name, array in module.dummy().items()})
        for name in self.target_modalities:
            batch.update({f"targets/{name}/{field}": jnp.ones((1, 1), jnp.int32)
                          for field in ("inputs", "targets", "mask")})
        return batch
