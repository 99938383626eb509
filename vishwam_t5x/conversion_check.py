"""The logits of a converted checkpoint: our model's beside those of the program it comes from."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from vishwam_t5x.core.errors import UserError

if TYPE_CHECKING:
    from vishwam_t5x.checkpointing.convert.conversion import Conversion
    from vishwam_t5x.checkpointing.convert.t5_network import T5Network

_ROWS, _INPUTS, _TARGETS = 2, 12, 8  # of the batch that both sides compute
_TOLERANCE = 2e-3  # of the largest logit; rounding of float32 is a hundredth of it


def compare_logits(plan: Conversion, network: T5Network | None) -> str:
    """Computes the logits of a small random batch on both sides, where there is another side.

    Args:
        plan: a conversion that has been written.
        network: of the model; None: as its parameters tell.

    Returns:
        What was found, or why nothing could be, in a sentence.

    Raises:
        UserError: the logits differ.
    """
    from vishwam_t5x.checkpointing.convert import conversion, t5_network, t5x

    places = {plan.opened.kind: plan.opened.place, plan.kind: plan.target}
    theirs = next((kind for kind in (conversion.HUGGINGFACE, t5x.LEGACY) if kind in places), None)
    libraries = {conversion.HUGGINGFACE: ("torch", "transformers"),
                 t5x.LEGACY: ("t5x.examples.t5.network",)}.get(theirs or "", ())
    absent = [name for name in libraries if not _is_installed(name)]
    if theirs is None or absent:
        return "no forward pass: " + (
            f"{' and '.join(name.partition('.')[0] for name in absent)} not installed"
            if absent else "neither side is one whose own program could compute it here")
    leaves = {name.removeprefix("params/"): leaf for name, leaf in plan.source.leaves.items()
              if name.startswith("params/")}
    try:
        network = network or t5_network.from_leaves(leaves)
    except UserError as error:
        return f"no forward pass: {error.problem.partition(':')[0]}, an encoder and a decoder"
    if theirs == t5x.LEGACY and (why := _beyond_t5x(network, leaves)):
        return f"no forward pass: {why}"
    batch = random_batch(network.vocab_size)
    # Both sides in float32, from what each was stored as.
    ours = our_logits(plan.opened.place if theirs == plan.kind else plan.target, network, batch)
    if theirs == conversion.HUGGINGFACE:
        from vishwam_t5x.checkpointing.convert.huggingface import reference_logits

        want = reference_logits(places[theirs], batch)
    else:
        want = _t5x_logits(places[theirs], network, batch)
    largest = float(np.abs(want).max())
    difference = float(np.abs(ours - want).max())
    said = f"largest difference of logits {difference:.2g}, of {largest:.3g}"
    allowed = _TOLERANCE if plan.dtype in (None, "float32") else 0.1  # rounded on one side
    if not difference <= allowed * max(1.0, largest):
        raise UserError("the two sides compute different logits", got=said, fix=(
            "give the model: --gin_file=gin/models/…; assumed were " + ", ".join(network.assumed)
            if network.assumed else "the model is not the one these parameters are of"))
    return f"forward pass of both sides: {said}"


def _beyond_t5x(network: T5Network, leaves: Mapping[str, Any]) -> str | None:
    """Why T5X's plain network (t5x.examples.t5) cannot compute a model; None if it can."""
    if any(name.startswith("encoder/encoder/") for name in leaves):
        return "T5X's plain network has no stacked layers"
    if network.per_layer:
        return "T5X's plain network has no positions in each layer, as a umT5 has"
    if (network.num_buckets, network.max_distance) != (32, 128):
        return (f"T5X's plain network has 32 buckets of positions up to 128, this one "
                f"{network.num_buckets} up to {network.max_distance}")
    return None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def random_batch(vocab_size: int) -> dict[str, np.ndarray]:
    """Returns a batch of tokens, some inputs padded, as `vishwam forward` completes it."""
    from vishwam_t5x.evaluation.batch_file import read_batch

    random = np.random.default_rng(0)
    inputs = random.integers(2, vocab_size, (_ROWS, _INPUTS)).astype(np.int32)
    inputs[-1, -3:] = 0
    targets = random.integers(2, vocab_size, (_ROWS, _TARGETS)).astype(np.int32)
    with tempfile.TemporaryDirectory(prefix="vishwam-") as folder:
        path = os.path.join(folder, "batch.npz")
        np.savez(path, encoder_input_tokens=inputs, decoder_target_tokens=targets)
        return read_batch(path, ("text",), ("text",))


def our_logits(place: epath.Path, network: T5Network, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the float32 logits of our model with the parameters of a checkpoint."""
    import jax
    from flax.core import meta

    from vishwam_t5x.checkpointing.restore import restore_params
    from vishwam_t5x.models import config as configs
    from vishwam_t5x.models.encoder_decoder import EncoderDecoder

    size = network.vocab_size
    model = EncoderDecoder(configs.EncoderDecoderConfig(
        emb_dim=network.emb_dim, num_heads=network.num_heads, head_dim=network.head_dim,
        mlp_dim=network.mlp_dim, num_encoder_layers=network.num_encoder_layers,
        num_decoder_layers=network.num_decoder_layers, mlp_activations=network.mlp_activations,
        qk_norm=False, scale_attention_logits=False, float32_attention_logits=False,
        precision="float32", position=configs.RelativePositions(
            num_buckets=network.num_buckets, max_distance=network.max_distance,
            per_layer=network.per_layer),
        inputs=(configs.TextInput(vocab_size=size, modality_embedding=False),),
        targets=(configs.TextOutput(vocab_size=size, modality_embedding=False,
                                    logits_via_embedding=network.logits_via_embedding),)))
    wanted = meta.unbox(jax.eval_shape(model.init, jax.random.key(0))["params"])
    params, _ = restore_params(place, wanted)
    found = model.apply({"params": params}, batch, method="logits")
    return np.asarray(found["text"], np.float32)


def _t5x_logits(place: epath.Path, network: T5Network, batch: dict[str, np.ndarray]) -> Any:
    """The logits of T5X's own network, with the parameters as T5X itself loads them."""
    import jax.numpy as jnp
    from t5x import checkpoints
    from t5x.examples.t5 import network as theirs

    state = checkpoints.load_t5x_checkpoint(str(place), lazy_parameters=False)
    names = {"gelu_tanh": "gelu", "silu": "swish"}
    model = theirs.Transformer(theirs.T5Config(
        vocab_size=network.vocab_size, dtype=jnp.float32, emb_dim=network.emb_dim,
        num_heads=network.num_heads, num_encoder_layers=network.num_encoder_layers,
        num_decoder_layers=network.num_decoder_layers, head_dim=network.head_dim,
        mlp_dim=network.mlp_dim, dropout_rate=0.0,
        mlp_activations=tuple(names.get(name, name) for name in network.mlp_activations),
        logits_via_embedding=network.logits_via_embedding))
    return np.asarray(model.apply(
        {"params": state["target"]}, encoder_input_tokens=batch["inputs/text/tokens"],
        decoder_input_tokens=batch["targets/text/inputs"],
        decoder_target_tokens=batch["targets/text/targets"], enable_dropout=False), np.float32)
