"""What Hugging Face's config.json says of a T5, and what gin files and parameters say of it."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vishwam_t5x.checkpointing.manifest import Leaf
from vishwam_t5x.core.errors import UserError

KINDS = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration",
         "umt5": "UMT5ForConditionalGeneration"}
"""Hugging Face's `model_type`s that are a T5, with their classes; ByT5 and UL2 are a 't5'."""

GENERATION = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
"""What `generate` must know; transformers 5 looks for it in generation_config.json."""

# Hugging Face's names of activations and ours.
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu",
                "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu",
                "linear": "linear"}
_EPSILON = 1e-6

# What a published config.json may leave out.
_DEFAULTS = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
             "dropout_rate": 0.1, "layer_norm_epsilon": _EPSILON, "feed_forward_proj": "relu"}

Place = tuple[str, bool]
"""Name in a Hugging Face folder, and whether the array lies there transposed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Network:
    """Sizes and choices of a T5.

    Attributes:
        kind: Hugging Face's `model_type`, a key of `KINDS`; its mT5 predicts with no table scaled.
        vocab_size: rows of the embedding table.
        emb_dim: width of the residual stream.
        num_heads: heads of every attention.
        head_dim: features of a head.
        mlp_dim: hidden units of the MLP.
        mlp_activations: as in `EncoderDecoderConfig`.
        num_encoder_layers: encoder blocks.
        num_decoder_layers: decoder blocks.
        logits_via_embedding: predict with the embedding table.
        num_buckets: of the relative positions.
        max_distance: of the relative positions.
        dropout_rate: of training.
        unscaled_table: a folder without an output layer of its own predicts with the embedding
            table, but not scaled as `logits_via_embedding` scales it.
        assumed: settings that no parameter tells, in words; () if they were said.
    """

    kind: str
    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...]
    num_encoder_layers: int
    num_decoder_layers: int
    logits_via_embedding: bool
    num_buckets: int = 32
    max_distance: int = 128
    dropout_rate: float = 0.1
    unscaled_table: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def per_layer(self) -> bool:
        """Whether each layer has a table of relative positions."""
        return self.kind == "umt5"

    def places(self) -> dict[str, Place]:
        """Returns where each parameter of the unrolled model lies in a Hugging Face folder."""
        places = {"text_token_embedder/embedding": ("shared.weight", False)}
        if not self.logits_via_embedding:
            places["target_encoders_text/logits_kernel"] = ("lm_head.weight", True)
        for stack, layers in (("encoder", self.num_encoder_layers),
                              ("decoder", self.num_decoder_layers)):
            places[f"{stack}/{stack}_norm/scale"] = (f"{stack}.final_layer_norm.weight", False)
            if not self.per_layer:
                places[f"{stack}/relpos_bias/rel_embedding"] = (
                    f"{stack}.block.0.{_RELATIVE}", True)
            for number in range(layers):
                ours, theirs = f"{stack}/layers_{number}", f"{stack}.block.{number}"
                places.update((f"{ours}/{name}", (f"{theirs}.{place}", transposed))
                              for name, (place, transposed) in self._layer(stack))
        return places

    def _layer(self, stack: str) -> Iterator[tuple[str, Place]]:
        if self.per_layer:
            yield "relpos_bias/rel_embedding", (_RELATIVE, True)
        own = "attention" if stack == "encoder" else "self_attention"
        parts = [(own, "SelfAttention")]
        if stack == "decoder":
            parts.append(("encoder_decoder_attention", "EncDecAttention"))
        for number, (ours, theirs) in enumerate(parts):
            norm = ours.replace("encoder_decoder_attention", "cross_attention")
            yield f"pre_{norm}_layer_norm/scale", (f"layer.{number}.layer_norm.weight", False)
            for name in ("query", "key", "value", "out"):
                yield (f"{ours}/{name}/kernel",
                       (f"layer.{number}.{theirs}.{name[0]}.weight", True))
        last = f"layer.{len(parts)}"
        yield "pre_mlp_layer_norm/scale", (f"{last}.layer_norm.weight", False)
        inner = ["wi"] if len(self.mlp_activations) == 1 else [
            f"wi_{number}" for number in range(len(self.mlp_activations))]
        for name in (*inner, "wo"):
            yield f"mlp/{name}/kernel", (f"{last}.DenseReluDense.{name}.weight", True)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter of the unrolled model, by its name there."""
        joined = self.num_heads * self.head_dim
        shapes = {"embedding": (self.vocab_size, self.emb_dim), "scale": (self.emb_dim,),
                  "logits_kernel": (self.emb_dim, self.vocab_size),
                  "rel_embedding": (self.num_heads, self.num_buckets),
                  "out": (joined, self.emb_dim), "wo": (self.mlp_dim, self.emb_dim)}
        *_, module, last = name.split("/")
        if module.startswith("wi"):
            return self.emb_dim, self.mlp_dim
        return shapes.get(last) or shapes.get(module) or (self.emb_dim, joined)

    def gin_lines(self) -> list[str]:
        """Returns the lines that make this model of gin/models/t5/network.gin."""
        lines = ["include 'gin/models/t5/network.gin'", f"TEXT_VOCAB_SIZE = {self.vocab_size}",
                 f"config.TextOutput.logits_via_embedding = {self.logits_via_embedding}"]
        lines += [f"config.EncoderDecoderConfig.{name} = {getattr(self, name)!r}"
                  for name in _SIZES]
        usual = {"num_buckets": 32, "max_distance": 128, "per_layer": False}
        return lines + [f"config.RelativePositions.{name} = {getattr(self, name)!r}"
                        for name, value in usual.items() if getattr(self, name) != value]

    def differences(self, gin_text: str) -> list[str]:
        """Returns the gin lines that a preset of gin/models/ lacks; [] if it is this very model.

        Args:
            gin_text: of the preset's file, e.g. gin/models/t5_1_1/small.gin.
        """
        def bound(text: str) -> dict[str, Any]:
            return {name: ast.literal_eval(value)
                    for name, value in re.findall(r"(?m)^([\w.]+) = (.+)$", text)}

        preset, own = bound(gin_text), bound("\n".join(self.gin_lines()))
        preset.setdefault("config.RelativePositions.per_layer", False)
        own.setdefault("config.RelativePositions.per_layer", False)
        return [f"{name} = {value!r}" for name, value in own.items() if preset.get(name) != value]

    def nearest(self, presets: Mapping[str, str]) -> tuple[str, list[str]]:
        """Returns the name of the preset that differs least, and the lines that differ.

        Args:
            presets: name -> text of its gin file; at least one.
        """
        found = {name: self.differences(text) for name, text in presets.items()}
        best = min(found, key=lambda name: len(found[name]))
        return best, found[best]


_RELATIVE = "layer.0.SelfAttention.relative_attention_bias.weight"
_SIZES = ("emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers",
          "num_decoder_layers", "mlp_activations")


def from_config_json(config: Mapping[str, Any]) -> T5Network:
    """Returns the network that a config.json describes.

    Raises:
        UserError: it is no T5, or one that our network does not compute.
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise UserError("this Hugging Face folder holds no T5", got=f"model_type = {kind!r}",
                        fix=f"model_type is one of {', '.join(KINDS)} (UL2 and ByT5 are a t5)")
    config = {**_DEFAULTS, **config}
    try:
        sizes = {ours: _size(config, theirs) for ours, theirs in (
            ("vocab_size", "vocab_size"), ("emb_dim", "d_model"), ("num_heads", "num_heads"),
            ("head_dim", "d_kv"), ("mlp_dim", "d_ff"), ("num_encoder_layers", "num_layers"),
            ("num_buckets", "relative_attention_num_buckets"),
            ("max_distance", "relative_attention_max_distance"))}
    except KeyError as missing:
        raise UserError("config.json does not say all sizes", got=f"no {missing}") from None
    for name, kinds in (("feed_forward_proj", str), ("dense_act_fn", str),
                        ("tie_word_embeddings", bool), ("scale_decoder_outputs", bool),
                        ("layer_norm_epsilon", float), ("dropout_rate", (int, float))):
        if name in config and not isinstance(config[name], kinds):
            raise _no_value(config, name, "'relu' or 'gated-gelu', say" if kinds is str else
                            "true or false" if kinds is bool else "a number")
    if config["layer_norm_epsilon"] != _EPSILON:
        raise UserError("this T5 has another layer_norm_epsilon than all published ones",
                        got=config["layer_norm_epsilon"], fix=f"our norms add {_EPSILON:g}")
    scaled = _scales_output(config)
    decoder = config.get("num_decoder_layers") is not None  # null: as many as the encoder
    return T5Network(
        kind=_kind(kind, scaled), **sizes, mlp_activations=_activations(config),
        num_decoder_layers=_size(config, "num_decoder_layers") if decoder
        else sizes["num_encoder_layers"],
        logits_via_embedding=scaled, dropout_rate=float(config["dropout_rate"]),
        unscaled_table=not scaled and config.get("tie_word_embeddings") is True)


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _no_value(config, name, "a whole number above 0")
    return value


def _no_value(config: Mapping[str, Any], name: str, wanted: str) -> UserError:
    return UserError(f"config.json has no value for {name} that a T5 has",
                     got=f"{name} = {json.dumps(config[name])}",
                     fix=f"{wanted}; or copy config.json again")


def _kind(kind: str, scaled: bool) -> str:
    """transformers 5 never scales what its mT5 predicts with: a T5 computes the same, and does."""
    return "t5" if kind == "mt5" and scaled else kind


def _scales_output(config: Mapping[str, Any]) -> bool:
    """Whether the decoder's output is scaled by 1/√d_model, as T5 1.0 does where tables are tied.

    transformers 4 does so if `tie_word_embeddings`; 5 always writes that to be true, has a setting
    of its own, and never scales an mT5.
    """
    if "scale_decoder_outputs" in config:
        return bool(config["scale_decoder_outputs"])
    version = str(config.get("transformers_version", "4")).partition(".")[0]
    kind = config["model_type"]
    if kind == "mt5" and version.isdigit() and int(version) >= 5:
        return False
    return bool(config.get("tie_word_embeddings", kind != "mt5"))


def _activations(config: Mapping[str, Any]) -> tuple[str, ...]:
    said = config["feed_forward_proj"]
    gate, name = said.startswith("gated-"), said.removeprefix("gated-")
    if said == "gated-gelu":
        name = "gelu_new"  # so they read it; a plain 'gelu' is the exact one
    name = config.get("dense_act_fn") or name
    if name not in _ACTIVATIONS:
        raise UserError("this T5 has an activation that we do not know", got=f"{said!r}, {name!r}",
                        fix=f"one of {', '.join(_ACTIVATIONS)}")
    return (_ACTIVATIONS[name], "linear") if gate else (_ACTIVATIONS[name],)


def to_config_json(network: T5Network, dtype: str) -> dict[str, Any]:
    """Returns the config.json with which `from_pretrained` builds the network.

    Args:
        network: what to describe.
        dtype: of the stored parameters.

    Raises:
        UserError: Hugging Face's T5 has no such activation.
    """
    scale = {} if network.kind == "mt5" else {"scale_decoder_outputs": network.logits_via_embedding}
    return {
        "architectures": [KINDS[network.kind]], "model_type": network.kind,
        "is_encoder_decoder": True, "vocab_size": network.vocab_size, "d_model": network.emb_dim,
        "d_kv": network.head_dim, "d_ff": network.mlp_dim, "num_heads": network.num_heads,
        "num_layers": network.num_encoder_layers,
        "num_decoder_layers": network.num_decoder_layers,
        "feed_forward_proj": _feed_forward(network.mlp_activations),
        "relative_attention_num_buckets": network.num_buckets,
        "relative_attention_max_distance": network.max_distance,
        "tie_word_embeddings": network.logits_via_embedding, **scale,
        "dropout_rate": network.dropout_rate, "layer_norm_epsilon": _EPSILON,
        "initializer_factor": 1.0, "use_cache": True, "torch_dtype": dtype, **GENERATION}


def _feed_forward(activations: tuple[str, ...]) -> str:
    first = {"gelu_tanh": "gelu"}.get(activations[0], activations[0])
    if activations[1:] == ("linear",) and first in ("gelu", "silu", "relu"):
        return f"gated-{first}"
    plain = {"relu": "relu", "silu": "silu", "gelu": "gelu_new", "gelu_exact": "gelu"}
    if len(activations) == 1 and first in plain:
        return plain[first]
    raise UserError("Hugging Face's T5 cannot compute these mlp_activations", got=activations,
                    fix="('relu',), ('gelu', 'linear') or ('silu', 'linear')")


def from_model(config: Any) -> T5Network:
    """Returns the network of an `EncoderDecoderConfig` (not imported here: it is no lower floor).

    Raises:
        UserError: it is no T5, with the settings that make it none.
    """
    positions, text = config.position, config.targets[0]
    per_layer = getattr(positions, "per_layer", False)
    wrong = [line for line, bad in (
        ("more modalities than text",
         config.input_modalities != ("text",) or config.target_modalities != ("text",)),
        ("modality_embedding = True", any(getattr(part, "modality_embedding", False)
                                          for part in (*config.inputs, *config.targets))),
        ("qk_norm = True", config.qk_norm),
        ("scale_attention_logits = True", config.scale_attention_logits),
        (f"num_kv_heads = {config.kv_heads}", config.kv_heads != config.num_heads),
        (f"position = {type(positions).__name__}", not hasattr(positions, "max_distance")),
    ) if bad]
    if wrong:
        raise UserError("this model is no T5: Hugging Face has no class for it",
                        got=", ".join(wrong), fix="models of gin/models/t5_1_1/ and its like fit")
    tied = text.logits_via_embedding
    gated = len(config.mlp_activations) > 1
    return T5Network(
        kind="umt5" if per_layer else "mt5" if gated and not tied and text.vocab_size > 200_000
        else "t5", vocab_size=text.vocab_size, logits_via_embedding=tied,
        num_buckets=positions.num_buckets, max_distance=positions.max_distance,
        dropout_rate=config.dropout_rate, **{name: getattr(config, name) for name in _SIZES})


def from_leaves(leaves: Mapping[str, Leaf], kind: str | None = None) -> T5Network:
    """Returns the network that parameters under our names are of, their layers stacked or not.

    What no parameter tells (the activation, how far positions are told apart, dropout) is as in
    the published models, and said in `assumed`.

    Args:
        leaves: '/'-joined name -> shape and dtype.
        kind: Hugging Face's `model_type`; None: 'umt5' with a table of positions in each layer,
            else 't5'. An 'mt5' that predicts with its embedding table is a 't5'.

    Raises:
        UserError: they are no T5's.
    """
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    embedding = shapes.get("text_token_embedder/embedding")
    relative = [name for name in shapes if name.startswith("encoder/")
                and name.endswith("relpos_bias/rel_embedding")]
    query = _first(shapes, "encoder", "attention/query/kernel")
    gated = _first(shapes, "encoder", "mlp/wi_0/kernel")
    inner = gated or _first(shapes, "encoder", "mlp/wi/kernel")
    if embedding is None or not relative or query is None or inner is None:
        raise UserError("these parameters are of no T5: Hugging Face has no class for them",
                        got=", ".join(sorted(shapes)[:8]),
                        fix="a model of gin/models/t5/ and its like, with relative positions")
    table = shapes[relative[0]]
    per_layer = "encoder/relpos_bias/rel_embedding" not in shapes
    # [heads, layers, buckets] where layers are stacked
    heads, buckets = table[0], table[-1]
    activations = ("gelu", "linear") if gated else ("relu",)
    tied = "target_encoders_text/logits_kernel" not in shapes
    return T5Network(
        kind=_kind(kind or ("umt5" if per_layer else "t5"), tied), vocab_size=embedding[0],
        emb_dim=embedding[1], num_heads=heads, head_dim=query[-1] // heads, mlp_dim=inner[-1],
        mlp_activations=activations, num_buckets=buckets,
        num_encoder_layers=_count(shapes, "encoder"), num_decoder_layers=_count(shapes, "decoder"),
        logits_via_embedding=tied,
        assumed=(f"mlp_activations = {activations}", "RelativePositions.max_distance = 128",
                 "dropout_rate = 0.1"))


def _first(shapes: Mapping[str, tuple[int, ...]], stack: str, rest: str
           ) -> tuple[int, ...] | None:
    return shapes.get(f"{stack}/layers_0/{rest}") or shapes.get(f"{stack}/{stack}/{rest}")


def _count(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    stacked = shapes.get(f"{stack}/{stack}/mlp/wo/kernel")
    if stacked is not None:
        return stacked[1]
    numbers = [int(match[1]) for name in shapes
               if (match := re.match(rf"{stack}/layers_(\d+)/", name))]
    return max(numbers, default=-1) + 1
