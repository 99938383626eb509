"""How many floating-point operations training takes: the numerator of MFU.

Counted are the matmuls a step cannot do without, each multiply-add as two. Not counted are
recomputation (remat), lookups, norms and softmax; a causal attention matrix counts whole. So the
figure depends on shapes alone, and MFU compares between runs. `compiled.cost_analysis()` does not:
it counts the body of a scan over layers once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

BACKWARD_AND_FORWARD = 3
"""A backward pass does each matmul twice: for the gradient of either operand."""


@dataclasses.dataclass(frozen=True)
class EncoderDecoderShape:
    """Dimensions of an encoder-decoder that decide its FLOPs.

    Attributes:
        emb_dim: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads (grouped-query attention).
        head_dim: features of a head.
        mlp_dim: hidden units of the MLP.
        num_encoder_layers: encoder blocks; 0: decoder-only, over inputs and targets in one row.
        num_decoder_layers: decoder blocks.
        gated_mlp: whether the MLP has a gate, and so three kernels instead of two.
    """

    emb_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    gated_mlp: bool = True


def block_flops(shape: EncoderDecoderShape, length: int, cross_length: int = 0) -> float:
    """Returns the forward FLOPs of one block for one sequence.

    Args:
        shape: dimensions of the model.
        length: positions of the sequence.
        cross_length: encoder positions attended to; 0 for an encoder block.
    """
    attention_dim = shape.num_heads * shape.head_dim
    kv_dim = shape.num_kv_heads * shape.head_dim
    query_and_out = 2 * shape.emb_dim * attention_dim
    key_and_value = 2 * shape.emb_dim * kv_dim
    mlp = (3 if shape.gated_mlp else 2) * shape.emb_dim * shape.mlp_dim
    flops = 2 * length * (query_and_out + key_and_value + mlp) + 4 * length**2 * attention_dim
    if cross_length:
        flops += (2 * length * query_and_out + 2 * cross_length * key_and_value
                  + 4 * length * cross_length * attention_dim)
    return float(flops)


def forward_flops(shape: EncoderDecoderShape, input_length: int, target_length: int,
                  vocab_sizes: Mapping[str, tuple[int, int]] | None = None,
                  projections: Mapping[str, tuple[int, int]] | None = None) -> float:
    """Returns the forward FLOPs of one example, or of one packed row.

    In a packed row attention is counted as the full square of the row, as it is computed.

    Args:
        shape: dimensions of the model.
        input_length: encoder positions.
        target_length: decoder positions.
        vocab_sizes: by target modality, (positions, size of the output table).
        projections: by input modality, (positions, features of a patch) of linear patch embeddings.
    """
    if shape.num_encoder_layers:
        flops = shape.num_encoder_layers * block_flops(shape, input_length)
        flops += shape.num_decoder_layers * block_flops(shape, target_length, input_length)
    else:
        flops = shape.num_decoder_layers * block_flops(shape, input_length + target_length)
    for positions, size in (*(vocab_sizes or {}).values(), *(projections or {}).values()):
        flops += 2 * positions * shape.emb_dim * size
    return flops


def train_flops(shape: EncoderDecoderShape, input_length: int, target_length: int,
                vocab_sizes: Mapping[str, tuple[int, int]] | None = None,
                projections: Mapping[str, tuple[int, int]] | None = None) -> float:
    """Returns the FLOPs of a training step per example or packed row: three times the forward ones.

    A patch projection has no gradient of its input, so it counts twice and not three times.
    Arguments as in `forward_flops`.
    """
    flops = BACKWARD_AND_FORWARD * forward_flops(
        shape, input_length, target_length, vocab_sizes, projections)
    for positions, size in (projections or {}).values():
        flops -= 2 * positions * shape.emb_dim * size
    return flops


def transformer_flops(shape: EncoderDecoderShape, patches: int, patch_dim: int) -> float:
    """Returns the forward FLOPs of a transformer over patches, such as a ViT or an AST.

    Args:
        shape: dimensions of the transformer, its blocks those of the encoder.
        patches: of one picture, or of the row of pictures that is attended to at once; the few
            tokens beside them are not counted.
        patch_dim: numbers in a patch.
    """
    return (shape.num_encoder_layers * block_flops(shape, patches)
            + 2 * patches * patch_dim * shape.emb_dim)


def resampler_flops(shape: EncoderDecoderShape, latents: int, features: int, cross_layers: int
                    ) -> float:
    """Returns the forward FLOPs of a perceiver resampler that reads one frame.

    Args:
        shape: dimensions of the resampler, its layers those of the encoder.
        latents: vectors it gives.
        features: vectors it reads, as wide as it is.
        cross_layers: layers that read them; the other ones attend to the latents alone.
    """
    attention = 2 * shape.emb_dim * shape.num_heads * shape.head_dim  # two kernels of four
    joined = 4 * latents * shape.num_heads * shape.head_dim
    alone = block_flops(shape, latents)
    reading = alone + 2 * (features - latents) * attention + joined * (features - latents)
    return cross_layers * reading + (shape.num_encoder_layers - cross_layers) * alone


def mfu(flops: float, seconds: float, num_devices: int, peak: float | None) -> float | None:
    """Returns the share of the devices' peak that was used, or None if the peak is not known.

    Args:
        flops: FLOPs of a step, all devices together.
        seconds: duration of the step.
        num_devices: devices that worked on it.
        peak: FLOP/s of one device.
    """
    if peak is None or seconds <= 0:
        return None
    return flops / (seconds * num_devices * peak)
