"""The multimodal encoder-decoder: modality modules, packed rows, two stacks, logits and losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from vishwam_t5x.core.batch import Batch
from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.core.sequence import InputSequence, Pattern, TargetSequence
from vishwam_t5x.models import modalities, patterns, placement, positions, prefix, rows, tables
from vishwam_t5x.models.cache import DecodeCache
from vishwam_t5x.models.config import EncoderDecoderConfig
from vishwam_t5x.models.decoder import Decoder, Encoded
from vishwam_t5x.models.encoder import RESIDUAL, Encoder
from vishwam_t5x.models.layers import Embed
from vishwam_t5x.models.scan import stack_layers
from vishwam_t5x.objectives.chunked_loss import projected_cross_entropy_sums
from vishwam_t5x.objectives.losses import LossConfig, LossSums, loss_weights
from vishwam_t5x.parallelism.sharding import (
    batch_parts,
    constrain,
    current_partitioning,
    current_platform,
)

LOGITS = ("batch", "length", "vocab")
"""Logical axes of logits."""


@struct.dataclass
class ModelOutput:
    """What a forward pass returns.

    Attributes:
        encoder_output: [B, L, D], encoded slots in row order; those of padding mean nothing. Of a
            decoder-only model: the embedded inputs.
        hidden: by target modality [B, M, D], decoder output after the final norm in the slots of
            the modality's own arrays; zero in slots that no row column uses.
    """

    encoder_output: Float[Array, "B L D"]
    hidden: dict[str, Float[Array, "B M D"]]


class EncoderDecoder(nn.Module):
    """Encoder-decoder over the modalities of its config (arXiv 2312.17172, arXiv 1910.10683).

    Every method takes a flat batch (see `core.batch`): arrays of each modality and, for packed
    rows, `inputs/row/index` and `targets/row/index`. A batch may leave configured modalities out;
    one that has others is refused. Several answers to the same inputs may follow each other in one
    target: `subsegment_ids` [B, M] tells them apart, and none sees another.

    Attributes:
        config: sizes, modalities, precision.
    """

    config: EncoderDecoderConfig

    def setup(self) -> None:
        cfg, policy = self.config, self.config.policy
        self.embedders = {
            name: Embed(table.rows, table.features or cfg.emb_dim,
                        cfg.one_hot_embeddings, policy.compute_dtype, policy.param_dtype,
                        "unmodeled" if table.features else "embed",
                        name=f"{name}_token_embedder")
            for name, table in tables.of(cfg).items()}

        def embedder(module: Any) -> Any:
            return None if module.table is None else self.embedders[module.table.name]

        self.transformers = {name: transformer.build(policy, cfg.remat_policy)
                             for name, transformer in cfg.transformers.items()}

        def transformer(module: Any) -> nn.Module | None:
            return (None if module.transformer is None
                    else self.transformers[module.transformer.name])

        self.input_encoders = {
            module.modality: module.build(cfg, embedder(module), transformer(module))
            for module in cfg.inputs}
        self.target_encoders = {
            module.modality: module.build(cfg, embedder(module)) for module in cfg.targets}
        if not cfg.decoder_only:
            self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)

    @nn.nowrap
    def init(self, rngs: Any, batch: Batch | None = None,  # type: ignore[override]
             **kwargs: Any) -> Any:
        """Returns freshly initialized variables, boxed with their logical axes.

        The numbers depend on `rngs` alone, and are the same with and without `scan_layers`: a
        stacked model is initialized layer by layer as if unrolled, then stacked.

        Args:
            rngs: a key, or {'params': key}.
            batch: shapes to initialize with; modalities it lacks, or all, are made up.
            **kwargs: as in `flax.linen.Module.init`.
        """
        batch = {**_without_row(self.config.dummy_batch(), batch), **(batch or {})}
        if not self.config.scan_layers:
            return super().init(rngs, batch, **kwargs)
        unrolled = self.clone(config=dataclasses.replace(self.config, scan_layers=False))
        variables = unrolled.init(rngs, batch, **kwargs)
        return {**variables, "params": stack_layers(variables["params"])}

    def __call__(self, batch: Batch, enable_dropout: bool = False) -> ModelOutput:
        """Runs encoder and decoder with the targets of the batch as decoder inputs.

        Args:
            batch: flat batch.
            enable_dropout: whether to drop; needs the rng 'dropout'.

        Raises:
            UserError: the batch has a modality the model lacks, or lacks an array.
        """
        encoded = self.encode(batch, enable_dropout)
        return ModelOutput(encoded.hidden, self.decode(batch, encoded, enable_dropout))

    def encode(self, batch: Batch, enable_dropout: bool = False) -> Encoded:
        """Returns the encoded input side of the batch, in row order.

        Without an encoder that is the embedded inputs: the decoder reads them as a prefix.
        """
        fields = _fields(batch, "inputs", self.config.input_modalities)
        parts = {name: self.input_encoders[name](part) for name, part in fields.items()}
        sequence = InputSequence.concatenate(list(parts.values()))
        index = batch.get("inputs/row/index")
        placeholders = {module.modality: module.placeholders for module in self.config.inputs
                        if module.placeholders and module.modality in parts}
        if placeholders and "text" in parts:
            columns = sequence.segment_ids.shape[1] if index is None else index.shape[1]
            index = placement.at_placeholders(parts, fields, placeholders, columns)
        if index is not None:
            sequence = InputSequence(*_to_row(sequence, index))
        if self.config.decoder_only:
            return Encoded(sequence.embeddings, None, sequence.segment_ids)
        return Encoded(self.encoder(sequence, enable_dropout), sequence.angles,
                       sequence.segment_ids)

    def decode(self, batch: Batch, encoded: Encoded, enable_dropout: bool = False
               ) -> dict[str, Float[Array, "B M D"]]:
        """Returns the decoder's hidden states for the batch's targets; see `ModelOutput.hidden`."""
        fields = _fields(self.with_codes(batch), "targets", self.config.target_modalities)
        parts = [self._embed_target(name, part) for name, part in fields.items()]
        sequence = TargetSequence.concatenate(parts)
        index = batch.get("targets/row/index")
        if index is None:
            hidden = self._decode_row(sequence, encoded, enable_dropout)
        else:
            num_slots = sequence.segment_ids.shape[1]
            sequence = TargetSequence(*_to_row(sequence, index))
            hidden = self._decode_row(sequence, encoded, enable_dropout)
            hidden = constrain(rows.permute(hidden, rows.invert(index, num_slots), index), RESIDUAL)
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.segment_ids.shape[1])
        return {name: hidden[:, start:end]
                for name, start, end in zip(fields, starts[:-1], starts[1:], strict=True)}

    def with_codes(self, batch: Batch) -> Batch:
        """Returns the batch with what its codecs make of pixels and spectrograms instead of them.
        """
        done = dict(batch)
        for name, codec in self.config.codecs.items():
            signals = done.pop(f"targets/{name}/{codec.signal.name}", None)
            if signals is not None:
                done |= {f"targets/{name}/{field}": array for field, array in
                         self.target_encoders[name].tokens(signals).items()}
        return done

    def render(self, codes: Int[Array, "b n"], modality: str) -> Float[Array, "b *one"]:
        """Returns the pictures in [0, 1], or the spectrograms, of codes from 0, by the model's own
        codec."""
        return self.target_encoders[modality].render(codes)

    def _decode_row(self, sequence: TargetSequence, encoded: Encoded, enable_dropout: bool
                    ) -> Float[Array, "B M D"]:
        cfg = self.config
        if not cfg.decoder_only:
            return self.decoder(sequence, encoded, enable_dropout)
        joined = prefix.join(encoded.hidden, encoded.segment_ids, sequence, self._bos_leads)
        row = joined.sequence
        if cfg.rope_theta is not None:
            row = dataclasses.replace(row, angles=positions.text_angles(
                prefix.positions_of(row), cfg.head_dim, cfg.rope_theta))
        return joined.read(self.decoder(row, None, enable_dropout))

    @property
    def _bos_leads(self) -> bool:
        return len(self.config.targets) == 1

    def logits(self, batch: Batch, enable_dropout: bool = False
               ) -> dict[str, Float[Array, "B M V"]]:
        """Returns logits by target modality in the policy's output dtype.

        They are those of the modality's own tokens, also where `loss_sums` takes one softmax over a
        table that modalities share.
        """
        return self.target_logits(batch, self.encode(batch, enable_dropout), enable_dropout)

    def target_logits(self, batch: Batch, encoded: Encoded, enable_dropout: bool = False
                      ) -> dict[str, Float[Array, "B M V"]]:
        """Returns `logits` of the batch's targets, given the encoded inputs."""
        hidden = self.decode(batch, encoded, enable_dropout)
        return {name: self._logits(name, part) for name, part in hidden.items()}

    def logits_of(self, hidden: Float[Array, "B M D"], modality: str) -> Float[Array, "B M V"]:
        """Returns `logits` of some positions, given what `decode` made of them."""
        return self._logits(modality, hidden)

    def loss_sums(self, batch: Batch, loss: LossConfig, enable_dropout: bool = False
                  ) -> dict[str, LossSums]:
        """Returns loss sums by target modality; big logits are taken in chunks, see `losses`."""
        batch = self.with_codes(batch)
        hidden = self(batch, enable_dropout).hidden
        return self.hidden_loss_sums(hidden, batch, loss)

    def hidden_loss_sums(self, hidden: Mapping[str, jax.Array], batch: Batch, loss: LossConfig
                         ) -> dict[str, LossSums]:
        """Returns the loss sums of decoder output already at hand."""
        here = current_partitioning()
        batch_shards = 1 if here is None else batch_parts(here.mesh, here.rules)
        sums = {}
        for name, part in hidden.items():
            encoder = self.target_encoders[name]
            table, scale = encoder.output_table()
            sums[name] = projected_cross_entropy_sums(
                encoder.head_input(part), table,
                batch[f"targets/{name}/targets"] + encoder.first_row,
                loss_weights(batch, name, loss), loss, scale=scale,
                batch_shards=batch_shards, constrain=constrain,
                platform=current_platform())
        return sums

    def init_cache(self, encoded: Encoded, max_length: int, num_decodes: int = 1,
                   task_mask: Int[Array, "B T"] | None = None) -> DecodeCache:
        """Returns an empty cache for decoding one modality; see `Decoder.init_cache`.

        A decoder-only model reads its prefix here, once for all decodes of an example.

        Args:
            encoded: the inputs.
            max_length: most tokens T to be decoded.
            num_decodes: rows to decode for each example (beams or samples).
            task_mask: 1 where the task hides from the encoder what is to be written, for
                `CodeOutput.mask_token` and `dynamic_mask`; None: nowhere.
        """
        cache = self._empty_cache(encoded, max_length, num_decodes)
        return cache if task_mask is None else dataclasses.replace(cache, hidden=task_mask > 0)

    def _empty_cache(self, encoded: Encoded, max_length: int, num_decodes: int) -> DecodeCache:
        cfg = self.config
        if cfg.decoder_only:
            bos = None
            if self._bos_leads:
                zeros = jnp.zeros((encoded.hidden.shape[0], 1), jnp.int32)
                bos, _ = self.target_encoders[cfg.target_modalities[0]](zeros, zeros)
            sequence = prefix.align_right(bos, encoded.hidden, encoded.segment_ids)
            angles = prefix.column_angles(0, sequence.segment_ids.shape[1], cfg.head_dim,
                                          cfg.rope_theta)
            return self.decoder.prefill(
                dataclasses.replace(sequence, angles=angles), max_length, num_decodes,
                last_predicts=self._bos_leads)
        return self.decoder.init_cache(encoded, max_length, num_decodes)

    def decode_step(self, tokens: Int[Array, "R"], cache: DecodeCache, modality: str
                    ) -> tuple[Float[Array, "R V"], DecodeCache]:
        """Decodes one token in every row.

        Args:
            tokens: the token before the one to predict; 0 (BOS) at first.
            cache: of `init_cache`, or of the step before.
            modality: the target modality, the same in all steps of a cache; but a decoder-only
                model whose targets see each other may go on to the next one, from its BOS.

        Returns:
            Logits [R, V] of the next token in the policy's output dtype, and the new cache.
        """
        target, visible = self.config.target(modality), None
        if cache.hidden is not None:
            hidden = jnp.repeat(cache.hidden, cache.num_decodes, axis=0)
            tokens = target.next_inputs(tokens, hidden, cache.index)
            if target.dynamic_mask:
                visible = patterns.visible_inputs(hidden, jnp.arange(hidden.shape[1])[None])
        position = cache.index.reshape(1, 1)
        x, angles = self.target_encoders[modality](tokens[:, None], position)
        if self.config.decoder_only:
            angles = prefix.column_angles(cache.cross_bias.shape[-1] + cache.index, 1,
                                          self.config.head_dim, self.config.rope_theta)
        x, cache = self.decoder.step(x, angles, cache, target.pattern_width, visible)
        return self._logits(modality, x)[:, 0], cache

    def _embed_target(self, name: str, fields: modalities.Fields) -> TargetSequence:
        target, where = self.config.target(name), f"targets/{name}"
        inputs = target.decoder_inputs(fields)
        mask = modalities.require(fields, "mask", where)
        pos_ids = modalities.positions_or_default(fields, inputs.shape)
        embeddings, angles = self.target_encoders[name](inputs, pos_ids)
        segments = fields.get("segment_ids", mask) * (mask > 0)
        number = self.config.target_modalities.index(name) if self.config.isolate_targets else 0
        modality = jnp.full(inputs.shape, number, jnp.int32)
        if "subsegment_ids" in fields:
            if self.config.decoder_only and self._bos_leads:
                raise UserError("several answers to the same inputs need an encoder",
                                got=f"'{where}/subsegment_ids', num_encoder_layers 0",
                                fix="give each answer an example of its own")
            modality = modality + len(self.config.targets) * fields["subsegment_ids"]
        pattern = None
        if self.config.has_patterns:
            visible = jnp.ones(inputs.shape, jnp.bool_)
            if target.dynamic_mask and "task_mask" in fields:
                visible = patterns.visible_inputs(fields["task_mask"], pos_ids)
            pattern = Pattern(pos_ids, jnp.full(inputs.shape, target.pattern_width), visible)
        return TargetSequence(embeddings, angles, segments.astype(jnp.int32), modality, None,
                              pattern)

    def _logits(self, name: str, hidden: jax.Array) -> jax.Array:
        logits = constrain(self.target_encoders[name].logits(hidden), LOGITS)
        return logits.astype(self.config.policy.output_dtype)


def _without_row(dummy: dict[str, Any], batch: Batch | None) -> dict[str, Any]:
    """The made-up arrays of the modalities that `batch` lacks, with as many rows as it has."""
    if not batch:
        return dummy
    present = {tuple(key.split("/")[:2]) for key in batch}
    num_rows = next(iter(batch.values())).shape[0]
    return {key: jnp.repeat(array, num_rows, axis=0) for key, array in dummy.items()
            if tuple(key.split("/")[:2]) not in present}


def _fields(batch: Batch, side: str, known: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The arrays of one side by modality, in the order of the config."""
    found: dict[str, dict[str, Any]] = {}
    for key, array in batch.items():
        key_side, _, rest = key.partition("/")
        modality, _, field = rest.partition("/")
        if key_side == side and modality != "row":
            found.setdefault(modality, {})[field] = array
    for modality in found:
        if modality not in known:
            raise UserError(f"the batch has {side} of a modality the model does not have",
                            got=modality, fix=did_you_mean(modality, known)
                            or f"the model has: {', '.join(known)}")
    if not found:
        raise UserError(f"the batch has no {side}", got=", ".join(sorted(batch)) or "no arrays",
                        fix=f"keys '{side}/<modality>/…', modalities: {', '.join(known)}")
    return {name: found[name] for name in known if name in found}


def _to_row(sequence: Any, index: Int[Array, "B L"]) -> list[Any]:
    """The fields of a sequence gathered into row order; embeddings come first."""
    embeddings, *others = (getattr(sequence, field.name)
                           for field in dataclasses.fields(sequence))
    inverse = rows.invert(index, embeddings.shape[1])
    gathered = constrain(rows.permute(embeddings, index, inverse), RESIDUAL)
    return [gathered, *(jax.tree.map(lambda array: rows.take(array, index), part)
                        for part in others)]
