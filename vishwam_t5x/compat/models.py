"""T5X's models: a network with its loss, optimizer and way to decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vishwam_t5x.compat import decoding, refused, seqio_names
from vishwam_t5x.compat.optimizers import OptimizerDef
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.evaluation.generator import DecodingConfig
from vishwam_t5x.objectives.losses import LossConfig

STANDS_FOR = "t5x.models"
NORMALIZATIONS = {"NUM_REAL_TARGET_TOKENS": "token", "NUM_TOTAL_TARGET_TOKENS": "position",
                  "AVERAGE_PER_SEQUENCE": "sequence"}
"""T5X's special loss normalizing factors, and ours."""


class Module(Protocol):
    """A network of T5X's names."""

    config: Any

    def ours(self, param_dtype: str = "float32") -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseTransformerModel:
    """What T5X's models share.

    Attributes:
        module: the network.
        optimizer_def: how its parameters move.
        decode_fn: how text is written.
        feature_converter_cls: none.
        label_smoothing: share of probability spread over the wrong tokens.
        z_loss: weight of log(Z)^2.
        loss_normalizing_factor: what the sum of the loss is divided by: a number, one of
            `NORMALIZATIONS`, or None: nothing.
    """

    module: Module
    optimizer_def: OptimizerDef
    decode_fn: Callable[..., DecodingConfig] = decoding.beam_search
    feature_converter_cls: Any = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_normalizing_factor: float | str | None = None

    def vocabulary_files(self) -> tuple[str, ...]:
        """Returns the SentencePiece models that are named."""
        named = (getattr(getattr(self, field.name), "sentencepiece_model_file", None)
                 for field in dataclasses.fields(self))
        return tuple(dict.fromkeys(file for file in named if file))

    def loss(self) -> LossConfig:
        """Returns how the loss is put together."""
        factor: Any = self.loss_normalizing_factor
        if isinstance(factor, str):
            factor = NORMALIZATIONS[one_of(factor, NORMALIZATIONS, "loss_normalizing_factor")]
        return LossConfig(z_loss=self.z_loss, label_smoothing=self.label_smoothing,
                          normalization="sum" if factor is None else factor)

    def predict_batch_with_aux(self, decoder_params: Mapping[str, Any] | None = None,
                               return_all_decodes: bool = False, num_decodes: int = 1,
                               prompt_with_targets: bool = False) -> DecodingConfig:
        """Returns how text is written; T5X's settings of a prediction are bound here.

        Args:
            decoder_params: none.
            return_all_decodes: only the best.
            num_decodes: beams, or sequences drawn.
            prompt_with_targets: begin every text with the target of its example.
        """
        refused.check(f"{STANDS_FOR}.EncoderDecoderModel", {
            "decoder_params": decoder_params, "return_all_decodes": return_all_decodes})
        return self.decode_fn(num_decodes=num_decodes, prompt_with_targets=prompt_with_targets)

    def _check_vocabulary(self, **vocabularies: Any) -> None:
        for name, vocabulary in vocabularies.items():
            if why := seqio_names.check_fits(vocabulary, self.module.config.vocab_size):
                raise UserError(f"{name} does not fit the network", got=why,
                                fix="raise vocab_size, or lower the vocabulary's extra_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderModel(BaseTransformerModel):
    """Text in, text out.

    Attributes:
        input_vocabulary: of the inputs.
        output_vocabulary: of the targets.
        default_decoder_params: none.
    """

    input_vocabulary: seqio_names.Vocabulary
    output_vocabulary: seqio_names.Vocabulary
    default_decoder_params: Any = None

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.EncoderDecoderModel", {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        self._check_vocabulary(input_vocabulary=self.input_vocabulary,
                               output_vocabulary=self.output_vocabulary)

    def predict_batch_with_aux(self, decoder_params: Mapping[str, Any] | None = None,
                               return_all_decodes: bool = False, num_decodes: int = 1,
                               prompt_with_targets: bool = False) -> DecodingConfig:
        """See `BaseTransformerModel.predict_batch_with_aux`."""
        return super().predict_batch_with_aux(decoder_params, return_all_decodes, num_decodes,
                                              prompt_with_targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOnlyModel(BaseTransformerModel):
    """A prefix LM.

    Attributes:
        vocabulary: of inputs and targets.
        decode_fn: how text is written.
        inputs_bidirectional_attention: True: every input sees every other.
    """

    vocabulary: seqio_names.Vocabulary
    decode_fn: Callable[..., DecodingConfig] = decoding.temperature_sample
    inputs_bidirectional_attention: bool = False

    def __post_init__(self) -> None:
        refused.check(f"{STANDS_FOR}.DecoderOnlyModel", {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        self._check_vocabulary(vocabulary=self.vocabulary)

    def predict_batch_with_aux(self, return_all_decodes: bool = False, num_decodes: int = 1,
                               decoder_params: Mapping[str, Any] | None = None) -> DecodingConfig:
        """See `BaseTransformerModel.predict_batch_with_aux`."""
        return super().predict_batch_with_aux(decoder_params, return_all_decodes, num_decodes)
