"""How a target modality enters the decoder; shared by text and by codes of a grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vishwam_t5x.models import masks, tables
from vishwam_t5x.models.layers import (
    ACTIVATIONS,
    MLP_KERNEL,
    Dense,
    Embed,
    MlpAdaptor,
    modality_embedding,
    named,
)
from vishwam_t5x.parallelism.sharding import constrain

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig
    from vishwam_t5x.models.modalities import TargetConfig


class TargetEncoder(nn.Module):
    """Token embedding and, if configured, the modality's own vector; and its output layer.

    Tokens are the modality's own, from 0: where the table is another modality's, they are moved to
    its rows here, and the logits of its rows back.
    """

    config: EncoderDecoderConfig
    target: TargetConfig
    embedder: Embed

    def setup(self) -> None:
        cfg = self.config
        if self.target.modality_embedding:
            self.modality_embedding = modality_embedding(self, cfg.emb_dim, cfg.policy)
        dtype, param_dtype = cfg.policy.compute_dtype, cfg.policy.param_dtype
        if self.target.adaptor == "mlp":
            self.adaptor = MlpAdaptor(cfg.emb_dim, self.embedder.axis, dtype=dtype,
                                      param_dtype=param_dtype)
        if self.target.head == "mlp":
            self.head = Dense(cfg.emb_dim, ("embed", "mlp"), use_bias=True, dtype=dtype,
                              param_dtype=param_dtype)
        if not self.target.logits_via_embedding:
            self.logits_kernel = self.param(
                "logits_kernel", named(MLP_KERNEL, "embed", "vocab"),
                (cfg.emb_dim, self.target.vocab_size), cfg.policy.param_dtype)

    def __call__(self, inputs: Int[Array, "B M"], pos_ids: Int[Array, "B M"]
                 ) -> tuple[Float[Array, "B M D"], Float[Array, "B M P"] | None]:
        """Returns embeddings of decoder inputs, and the rotary angles of what they predict.

        Args:
            inputs: ids shifted right, 0 at the start of an example.
            pos_ids: place of the predicted token in its own example.
        """
        x = self.embedder(inputs + self.target.offset)
        if self.target.adaptor == "mlp":
            x = self.adaptor(x)
        if self.is_initializing():
            self.head_input(x)  # whose parameters a forward pass to hidden states does not ask for
        if self.target.modality_embedding:
            x = x + self.modality_embedding
        return x, self.angles(pos_ids)

    def angles(self, pos_ids: Int[Array, "*batch"]) -> Float[Array, "*batch P"] | None:
        """Returns the rotary angles of positions of this modality; None without rotary ones."""
        cfg = self.config
        if cfg.rope_theta is None:
            return None
        return self.target.angles(pos_ids, cfg.head_dim, cfg.rope_theta)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Returns logits of the modality's tokens, accumulated and returned in float32.

        Of a shared table: those of its own rows, as good as -inf where they are another modality's.
        """
        table, scale = self.output_table()
        first, size = self.first_row, self.target.vocab_size
        table = table if size == table.shape[0] else table[first:first + size]
        rows = self.head_input(hidden).reshape(-1, hidden.shape[-1]).astype(table.dtype)
        y = jax.lax.dot_general(rows, table, (((1,), (1,)), ((), ())),
                                preferred_element_type=jnp.float32)
        y = y * scale if scale != 1.0 else y
        if self.target.logits_via_embedding:
            for begin, end in tables.rows_of_others(self.config, self.target):
                y = y.at[:, begin - first:end - first].set(masks.masked_logit(
                    self.config.policy.output_dtype))
        return y.reshape(*hidden.shape[:-1], size)

    def head_input(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Returns what the rows of `output_table` are multiplied with."""
        if self.target.head == "linear":
            return hidden
        return ACTIVATIONS["gelu_exact"](self.head(hidden))

    @property
    def first_row(self) -> int:
        """Row of `output_table` that predicts token 0."""
        return self.target.offset if self.target.logits_via_embedding else 0

    def output_table(self) -> tuple[Float[Array, "V D"], float]:
        """Returns the table that predicts, in the compute dtype, and the scale of its logits."""
        if self.target.logits_via_embedding:
            return self.embedder.table(), 1 / math.sqrt(self.config.emb_dim)
        kernel = self.logits_kernel.astype(self.config.policy.compute_dtype)
        return constrain(kernel.T, ("vocab", "embed")), 1.0
