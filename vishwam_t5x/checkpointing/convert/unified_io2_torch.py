"""Names of the parameters of Unified-IO 2's PyTorch port (github.com/allenai/unified-io-2.pytorch),
and ours.

Kernels lie there as (out, in), those of convolutions as (out, in, height, width); the kernel of the
transposed convolution is turned by half a circle as well.
"""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from etils import epath

from vishwam_t5x.checkpointing.convert import unified_io2
from vishwam_t5x.checkpointing.convert.report import read_part
from vishwam_t5x.checkpointing.convert.stores import dtype_named
from vishwam_t5x.checkpointing.sources import Source

FILE = "unified_io2.npz"
"""What we call the file."""

Change = Callable[[np.ndarray], np.ndarray]


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _turned(array: np.ndarray) -> np.ndarray:
    return np.transpose(np.flip(array, (0, 1)), (2, 3, 0, 1))


# What makes theirs of ours, and ours of theirs.
_KINDS: dict[str, tuple[Change, Change]] = {
    "same": (_same, _same),
    "kernel": (np.transpose, np.transpose),
    "convolution": (lambda array: np.transpose(array, (3, 2, 0, 1)),
                    lambda array: np.transpose(array, (2, 3, 1, 0))),
    "transposed convolution": (_turned, lambda array: np.flip(
        np.transpose(array, (2, 3, 0, 1)), (0, 1)))}

_FIELDS = {"n": r"\d+", "qkv": "query|key|value", "stack": "encoder|decoder", "w": r"\w+",
           "v": r"\w+", "z": r"\w*", "m": "image|audio", "s": "text|image|audio", "path": r"[\w/]+"}

_Rule = tuple[str, str, str]


def _rules() -> Iterator[_Rule]:
    """(the original's name, the port's with '/' for '.', kind); of several that fit the first."""
    yield "{s}_token_embedder/embedding", "{s}_token_embedder/weight", "same"
    yield "{stack}/{w}_norm/scale", "{stack}/{w}_norm/scale", "same"
    yield from _blocks("{stack}", "{stack}")
    yield "input_text_encoder/modality_embedding", "input_embedders/text/modality_embedding", "same"
    for ours, theirs in (("input_{m}_encoder", "input_embedders/{m}"),
                         ("input_encoders_{m}_history", "input_embedders/{m}_history"),
                         ("target_encoders_{s}", "target_embedders/{s}")):
        yield f"{ours}/modality_embedding", f"{theirs}/modality_embedding", "same"
    yield "input_{m}_encoder/projection/kernel", "input_embedders/{m}/projection/weight", "kernel"
    history, embedder = "input_encoders_{m}_history", "input_embedders/{m}_history"
    yield f"{history}/{{w}}_projection/kernel", f"{embedder}/{{w}}_projection/weight", "kernel"
    ours, theirs = f"{history}/resampler/PerceiverResampler_0", f"{embedder}/resampler/perceiver"
    yield f"{ours}/resampler_latents", f"{theirs}/latents", "same"
    yield f"{ours}/{{w}}_norm/scale", f"{theirs}/{{w}}_norm/scale", "same"
    yield from _blocks(ours, theirs)
    for place in ("{m}/image_encoder", "{m}_history/vit_image_encoder"):
        # The second where the input itself is not there: read, never written.
        yield from _transformer("image", place, ("class_embedding", "class_embedding"),
                                ("positional_embedding", "positional_embedding"))
        yield from _transformer("audio", place, ("cls_token", "cls_token"),
                                ("dist_token", "dist_token"),
                                ("pos_embed", "positional_embedding"))
    yield from _image_codec("target_encoders_image/discrete_vae", "target_embedders/image/vqgan")
    yield from _audio_codec("target_encoders_audio/discrete_vae", "target_embedders/audio/vqgan")


def _blocks(ours: str, theirs: str) -> Iterator[_Rule]:
    ours, theirs = f"{ours}/layers_{{n}}", f"{theirs}/layers_{{n}}"
    yield f"{ours}/pre_{{w}}_layer_norm/scale", f"{theirs}/pre_{{w}}_norm/scale", "same"
    yield f"{ours}/{{w}}/{{v}}_norm/scale", f"{theirs}/{{w}}/{{v}}_norm/scale", "same"
    yield f"{ours}/{{w}}/logit_scale", f"{theirs}/{{w}}/logit_scale", "same"
    yield f"{ours}/{{w}}/{{v}}/kernel", f"{theirs}/{{w}}/{{v}}/weight", "kernel"


def _transformer(modality: str, place: str, *vectors: tuple[str, str]) -> Iterator[_Rule]:
    ours = f"input_{modality}_encoder/image_encoder/vision_transformer"
    theirs = f"input_embedders/{place.format(m=modality)}/vision_transformer"
    for own, name in vectors:
        yield f"{ours}/{own}", f"{theirs}/{name}", "same"
    yield from _dense(f"{ours}/embedding", f"{theirs}/embedding")
    yield from _norm(f"{ours}/pre_ln", f"{theirs}/pre_ln")
    ours = f"{ours}/Transformer_0/ResidualAttentionBlock_{{n}}"
    theirs = f"{theirs}/transformer/resblocks/{{n}}"
    attention = f"{ours}/MultiHeadDotProductAttention_0"
    yield f"{attention}/{{qkv}}/kernel", f"{theirs}/attn/{{qkv}}_in_proj_weight", "kernel"
    yield f"{attention}/{{qkv}}/bias", f"{theirs}/attn/{{qkv}}_in_proj_bias", "same"
    yield from _dense(f"{attention}/out", f"{theirs}/attn/out_proj")
    image = modality == "image"
    for number, dense in enumerate(("c_fc", "c_proj") if image else ("fc1", "fc2"), 1):
        yield from _dense(f"{ours}/MLP_0/{dense}", f"{theirs}/mlp/fc{number}")
        yield from _norm(f"{ours}/{'ln_' if image else 'norm'}{number}", f"{theirs}/ln_{number}")


def _dense(ours: str, theirs: str, kind: str = "kernel") -> Iterator[_Rule]:
    yield f"{ours}/kernel", f"{theirs}/weight", kind
    yield f"{ours}/bias", f"{theirs}/bias", "same"


def _norm(ours: str, theirs: str) -> Iterator[_Rule]:
    yield f"{ours}/scale", f"{theirs}/weight", "same"
    yield f"{ours}/bias", f"{theirs}/bias", "same"


def _image_codec(ours: str, theirs: str) -> Iterator[_Rule]:
    yield f"{ours}/quantize/embedding", f"{theirs}/quantize/embedding/weight", "same"
    yield from _norm(f"{ours}/{{path}}/norm{{z}}", f"{theirs}/{{path}}/norm{{z}}")
    yield from _dense(f"{ours}/{{path}}", f"{theirs}/{{path}}", "convolution")


def _audio_codec(ours: str, theirs: str) -> Iterator[_Rule]:
    yield f"{ours}/quantize/embedding", f"{theirs}/quantize/embedding/weight", "same"
    yield (f"{ours}/decoder/ConvTranspose_0/kernel", f"{theirs}/decoder/conv_transpose/weight",
           "transposed convolution")
    stack, other = f"{ours}/{{stack}}/Transformer_0", f"{theirs}/{{stack}}/transformer"
    yield from _norm(f"{stack}/encoder_norm", f"{other}/encoder_norm")
    stack, other = f"{stack}/encoderblock_{{n}}", f"{other}/encoderblock_{{n}}"
    yield (f"{stack}/MultiHeadDotProductAttention_0/{{w}}/kernel", f"{other}/attn/{{w}}/weight",
           "kernel")
    for number in (0, 1):
        yield from _dense(f"{stack}/MlpBlock_0/DenseGeneral_{number}",
                          f"{other}/mlp/fc{number + 1}")
        yield from _norm(f"{stack}/LayerNormWithBias_{number}", f"{other}/ln_{number + 1}")
    yield from _dense(f"{ours}/{{stack}}/{{w}}", f"{theirs}/{{stack}}/{{w}}")


@functools.cache
def _table(from_ours: bool) -> list[tuple[re.Pattern, str, Change]]:
    table = []
    for ours, theirs, kind in _rules():
        pattern, result = (ours, theirs) if from_ours else (theirs, ours)
        table.append((_pattern(pattern), result, _KINDS[kind][0 if from_ours else 1]))
    return table


def _pattern(template: str) -> re.Pattern:
    seen: set[str] = set()

    def field(match: re.Match) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{_FIELDS[name]})"

    return re.compile(re.sub(r"\{(\w+)\}", field, template))


def _looked_up(name: str, from_ours: bool) -> tuple[str, Change] | None:
    for pattern, result, change in _table(from_ours):
        if match := pattern.fullmatch(name):
            return result.format(**match.groupdict()), change
    return None


def parameter_to_torch(name: str) -> tuple[str, Change] | None:
    """Returns the port's name of one of our parameters and what makes its array of ours; None if it
    has none. Layers are not stacked there: see `unrolled`.
    """
    found = _looked_up(unified_io2.parameter_to_unified_io2(name), True)
    return found and (found[0].replace("/", "."), found[1])


def parameter_from_torch(name: str) -> tuple[str, Change] | None:
    """Returns our name of one of the port's parameters and what makes our array of it."""
    found = None if "/" in name else _looked_up(name.replace(".", "/"), False)
    return found and (unified_io2.parameter_from_unified_io2(found[0]), found[1])


def recipes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, Change]]:
    """Returns our name -> (the port's, what makes our array of it); {} if it is not the port's.

    Args:
        shapes: of the arrays of a file, by name.
    """
    if not any(re.fullmatch(r"(input|target)_embedders\..+\.modality_embedding", name)
               for name in shapes):
        return {}
    found = ((name, parameter_from_torch(name)) for name in shapes)
    return {ours[0]: (name, ours[1]) for name, ours in found if ours is not None}


def write_torch(source: Source, names: Mapping[str, str], folder: epath.Path,
                dtypes: Mapping[str, str]) -> None:
    """Writes the port's parameters as an `.npz` into a folder, array by array.

    Args:
        source: where our arrays are, 'params/…'.
        names: the port's name -> the source's.
        folder: exists.
        dtypes: the port's name -> dtype to write.
    """
    with (folder / FILE).open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, ours in names.items():
            whole = tuple(slice(0, length) for length in source.leaves[ours].shape)
            array = np.asarray(read_part(source, ours, whole), dtype_named(dtypes[name]))
            found = parameter_to_torch(ours.removeprefix("params/"))
            assert found is not None  # or it would not be in `names`
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(found[1](array)),
                                          allow_pickle=False)
