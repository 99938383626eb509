"""Names of what Unified-IO 2's parts come from, and ours: an image transformer of OpenCLIP
(github.com/mlfoundations/open_clip), a spectrogram transformer of AST (github.com/YuanGongND/ast),
and a VQGAN of taming-transformers (github.com/CompVis/taming-transformers).

A VQGAN gets the names of our image codec alone. What a file has beside, such as CLIP's text tower,
keeps its own names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Change = Callable[[np.ndarray], np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Made = tuple[str, str, Change]

AST_GRID = (8, 64)
"""(mel bands, time steps) of the positions of an AST with patches of 16 at steps of 16."""
TIME_STEPS = 16
"""Time steps of Unified-IO 2's spectrograms."""

_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MLP_0"


def recipes(shapes: Shapes) -> dict[str, tuple[str, Change]]:
    """Returns our name -> (the file's, what makes our array of it); {} if nobody's names are known.

    Args:
        shapes: of the arrays of a file, by name.
    """
    for marker, made in ((r"(?P<root>(?:.*\.)?)conv1\.weight", _open_clip),
                         (r"(?P<root>(?:.*\.)?)v\.patch_embed\.proj\.weight", _ast),
                         (r"(?P<root>(?:.*\.)?)encoder\.down\.0\.block\.0\.norm1\.weight",
                          _taming)):
        for name in shapes:
            if match := re.fullmatch(marker, name):
                found = {ours: (theirs, change) for ours, theirs, change in
                         made(match["root"], shapes) if theirs in shapes}
                if len(found) > 1:
                    return found
    return {}


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def _third(array: np.ndarray, which: int) -> np.ndarray:
    """Query, key or value of an array that has all three one after the other."""
    size = array.shape[0] // 3
    return array[which * size:(which + 1) * size].T


def _convolution(array: np.ndarray) -> np.ndarray:
    return np.transpose(array, (2, 3, 1, 0))


def _pixels(array: np.ndarray) -> np.ndarray:
    """(out, colours, rows, columns) to (rows · columns · colours, out)."""
    return _convolution(array).reshape(-1, array.shape[0])


def _bands(array: np.ndarray) -> np.ndarray:
    """(out, 1, bands, steps) to (steps · bands, out): our spectrograms have time first."""
    return np.transpose(array, (3, 2, 1, 0)).reshape(-1, array.shape[0])


def lay_positions(array: np.ndarray) -> np.ndarray:
    """Returns AST's table [1, 2 + n, d] as ours has it, [2 + n, d].

    Ours looks band by band at a table of `TIME_STEPS` steps. Of a longer table the steps in its
    middle come first, as AST itself cuts it, and then the others, which nobody looks at.
    """
    table = array[0]
    bands, steps = AST_GRID
    if len(table) != 2 + bands * steps:
        return table
    grid = table[2:].reshape(bands, steps, -1)
    first = steps // 2 - TIME_STEPS // 2
    middle = np.arange(first, first + TIME_STEPS)
    rest = np.setdiff1d(np.arange(steps), middle)
    return np.concatenate([table[:2], *(grid[:, part].reshape(-1, table.shape[1])
                                        for part in (middle, rest))])


def _norm(ours: str, theirs: str) -> Iterator[Made]:
    yield f"{ours}/scale", f"{theirs}.weight", _same
    yield f"{ours}/bias", f"{theirs}.bias", _same


def _dense(ours: str, theirs: str, change: Change = np.transpose) -> Iterator[Made]:
    yield f"{ours}/kernel", f"{theirs}.weight", change
    yield f"{ours}/bias", f"{theirs}.bias", _same


def _numbers(pattern: str, shapes: Shapes) -> list[int]:
    found = (re.match(pattern, name) for name in shapes)
    return sorted({int(match[1]) for match in found if match})


def _block(ours: str, theirs: str, joined: tuple[str, str], out: str) -> Iterator[Made]:
    for which, name in enumerate(("query", "key", "value")):
        third = functools.partial(_third, which=which)
        yield f"{ours}/{_ATTENTION}/{name}/kernel", f"{theirs}.{joined[0]}", third
        yield f"{ours}/{_ATTENTION}/{name}/bias", f"{theirs}.{joined[1]}", third
    yield from _dense(f"{ours}/{_ATTENTION}/out", f"{theirs}.{out}")


def _open_clip(root: str, shapes: Shapes) -> Iterator[Made]:
    ours = "image_transformer"
    yield f"{ours}/embedding/kernel", f"{root}conv1.weight", _pixels
    for name in ("class_embedding", "positional_embedding"):
        yield f"{ours}/{name}", f"{root}{name}", _same
    yield from _norm(f"{ours}/pre_ln", f"{root}ln_pre")
    for number in _numbers(re.escape(root) + r"transformer\.resblocks\.(\d+)\.", shapes):
        block = f"{ours}/Transformer_0/ResidualAttentionBlock_{number}"
        theirs = f"{root}transformer.resblocks.{number}"
        yield from _block(block, theirs, ("attn.in_proj_weight", "attn.in_proj_bias"),
                          "attn.out_proj")
        for norm, dense in (("ln_1", "c_fc"), ("ln_2", "c_proj")):
            yield from _norm(f"{block}/{norm}", f"{theirs}.{norm}")
            yield from _dense(f"{block}/{_MLP}/{dense}", f"{theirs}.mlp.{dense}")


def _ast(root: str, shapes: Shapes) -> Iterator[Made]:
    ours, root = "audio_transformer", f"{root}v."
    yield from _dense(f"{ours}/embedding", f"{root}patch_embed.proj", _bands)
    for name in ("cls_token", "dist_token"):
        yield f"{ours}/{name}", f"{root}{name}", _flat
    yield f"{ours}/pos_embed", f"{root}pos_embed", lay_positions
    for number in _numbers(re.escape(root) + r"blocks\.(\d+)\.", shapes):
        block = f"{ours}/Transformer_0/ResidualAttentionBlock_{number}"
        theirs = f"{root}blocks.{number}"
        yield from _block(block, theirs, ("attn.qkv.weight", "attn.qkv.bias"), "attn.proj")
        for norm, dense in (("norm1", "fc1"), ("norm2", "fc2")):
            yield from _norm(f"{block}/{norm}", f"{theirs}.{norm}")
            yield from _dense(f"{block}/{_MLP}/{dense}", f"{theirs}.mlp.{dense}")


def _taming(root: str, shapes: Shapes) -> Iterator[Made]:
    top = max(_numbers(re.escape(root) + r"encoder\.down\.(\d+)\.", shapes))
    yield "quantize/embedding", f"{root}quantize.embedding.weight", _same
    for theirs in shapes:
        if not re.match(re.escape(root) + r"(?:encoder|decoder|quant_conv|post_quant_conv)\.",
                        theirs):
            continue
        *modules, leaf = theirs.removeprefix(root).split(".")
        path = "/".join(modules)
        path = re.sub(r"\bmid/", "mid_", path)
        # Theirs counts the decoder's levels from whole pictures, ours from the codes.
        path = re.sub(r"\bup/(\d+)/", lambda match: f"up_{top - int(match[1])}_", path)
        path = re.sub(r"\bdown/(\d+)/", r"down_\1_", path)
        path = re.sub(r"_(block|attn)/(\d+)/", r"_\1_\2/", path)
        norm = modules[-1].startswith("norm")
        if leaf == "bias":
            yield f"{path}/bias", theirs, _same
        elif leaf == "weight":
            yield (f"{path}/scale", theirs, _same) if norm else (
                f"{path}/kernel", theirs, _convolution)
