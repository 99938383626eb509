"""T5X's `t5x.examples.scalable_t5.network`: T5 with its layers in one scan, and remat."""

from __future__ import annotations

import dataclasses

from vishwam_t5x.compat.t5 import network
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.models import config as models
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

STANDS_FOR = "t5x.examples.scalable_t5.network"


@dataclasses.dataclass(frozen=True)
class T5Config(network.T5Config):
    """Sizes of a T5, and how its layers are run.

    Attributes:
        scan_layers: one scan over stacked parameters.
        remat_policy: what the backward pass computes again, 'none', 'minimal' or 'full'.
        param_scan_axis: axis of the layers in stacked parameters.
    """

    scan_layers: bool = True
    remat_policy: str = "none"
    param_scan_axis: int = 1

    def ours(self, param_dtype: str = "float32") -> models.EncoderDecoderConfig:
        """See `network.T5Config.ours`."""
        if self.param_scan_axis != 1:
            raise UserError("stacked parameters have their layers on axis 1",
                            got=f"param_scan_axis = {self.param_scan_axis}",
                            fix="param_scan_axis = 1; checkpoints with another are restacked")
        return network.encoder_decoder_config(
            self, param_dtype, scan_layers=self.scan_layers, remat_policy=self.remat_policy)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The network of a config.

    Attributes:
        config: its sizes.
    """

    config: T5Config

    def ours(self, param_dtype: str = "float32") -> EncoderDecoder:
        """See `network.Transformer.ours`."""
        return EncoderDecoder(self.config.ours(param_dtype))
