"""Hugging Face's folders of T5, mT5, umT5, UL2 and ByT5 as a source of parameters.

Arrays are read out of safetensors files, lazily and only the rows and columns that are wanted;
PyTorch's pickles are refused. Kernels lie there as (out, in), ours are (in, out).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vishwam_t5x.checkpointing.convert import t5_network
from vishwam_t5x.checkpointing.convert.report import Slices
from vishwam_t5x.checkpointing.convert.t5_network import T5Network
from vishwam_t5x.checkpointing.manifest import Leaf
from vishwam_t5x.checkpointing.sources import Request
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError

CONFIG, ONE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
VOCABULARY = "spiece.model"

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_TABLE, _LOGITS = "text_token_embedder/embedding", "target_encoders_text/logits_kernel"
# Early exports carry it; no T5 has relative positions in cross-attention, and nobody reads it.
_DEAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_ROWS = 8192  # compared at a time


def open_huggingface(place: epath.Path) -> HuggingFaceSource | None:
    """Returns the parameters in a Hugging Face folder; None if it is no such folder.

    Raises:
        UserError: it is one, but of no T5, without safetensors, damaged, or at odds with itself.
    """
    found = set(storage.names(place))
    if CONFIG not in found:
        return None
    config = read_json(place, CONFIG)
    files = {ONE, INDEX} & found
    if "model_type" not in config and not files:
        return None
    network = t5_network.from_config_json(config)
    if not files:
        pickled = sorted(found & set(_PICKLES))
        raise UserError(
            "this Hugging Face folder holds no safetensors" + (
                ", and pickles are never loaded: they may run code" if pickled else ""),
            got=", ".join(pickled or sorted(found)),
            fix="where transformers is installed: "
                "T5ForConditionalGeneration.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)")
    return HuggingFaceSource(place, network, _files(place, found))


def describe(place: epath.Path) -> T5Network:
    """Returns what the folder's config.json says of the network."""
    return t5_network.from_config_json(read_json(place, CONFIG))


def vocabulary(place: epath.Path) -> str | None:
    """Returns the path of the folder's SentencePiece vocabulary; None if it has none."""
    return storage.join(place, VOCABULARY) if VOCABULARY in storage.names(place) else None


def read_json(place: epath.Path, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file of a folder; `UserError` if it holds none."""
    try:
        found = json.loads(storage.read_text(place / name))
    except ValueError as error:
        raise UserError("this file is no JSON", got=f"{place / name}: {error}") from error
    if not isinstance(found, dict):
        raise UserError("this file holds no JSON object", got=place / name)
    return found


def _files(place: epath.Path, found: set[str]) -> dict[str, str | None]:
    """The folder's safetensors files; by array name where an index names them, else {ONE: None}."""
    if INDEX not in found:
        return {}
    index = read_json(place, INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise UserError("the index of the safetensors files has no weight_map", got=place / INDEX)
    absent = sorted(set(index.values()) - found)
    if absent:
        raise UserError("files that the index names are not in the folder",
                        got=f"{place}: {', '.join(absent)}", fix="copy the folder again")
    return index


class HuggingFaceSource:
    """The parameters of a folder under our names, layers unrolled.

    Attributes:
        place: the folder.
        network: what its config.json says.
        unused: array in the folder -> why nothing is made of it, where that loses nothing.
        notes: what else is to be said of it.
    """

    def __init__(self, place: epath.Path, network: T5Network, index: Mapping[str, str]) -> None:
        """Reads names, shapes and dtypes.

        Args:
            place: the folder.
            network: of its config.json.
            index: array -> file; empty: all are in one file.

        Raises:
            UserError: a file is damaged, or arrays that must be equal are not.
        """
        self.place, self.network = place, network
        self._copies = contextlib.ExitStack()  # of remote files, as long as this object lives
        self._files: dict[str, Any] = {}
        held = {name: file for file in sorted(set(index.values())) or [ONE]
                for name in list(self._open(file).keys())}
        differing = sorted(set(index) ^ set(held)) if index else []
        if differing:
            raise UserError("index and safetensors files name different arrays",
                            got=", ".join(differing[:8]), fix="copy the folder again")
        self._held = held
        self._places = network.places()
        table = next((name for name in (self._places[_TABLE][0], *_TIES) if name in held), None)
        if table is not None:
            self._places[_TABLE] = (table, False)
        self.unused, self.notes = self._unused(table), ()
        if network.unscaled_table and "lm_head.weight" not in held and table is not None:
            self._places[_LOGITS] = (table, True)
            self.notes = (f"{_LOGITS} is made of {table}: the folder has no lm_head.weight, and "
                          "its config.json ties them without T5 1.0's scale",)
        wanted = {name: where[0] for name, where in self._places.items()}
        self._leaves = {name: self._leaf(name) for name, where in wanted.items() if where in held}
        # What we have no name for keeps its own, so that whoever reads this finds it left over.
        for name in held.keys() - set(wanted.values()) - self.unused.keys():
            self._places[name] = (name, False)
            self._leaves[name] = self._leaf(name)

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return self._leaves

    def remarks(self) -> list[str]:
        """Returns what a report must say of the folder: arrays left out, and its vocabulary."""
        lines = [f"{name} left out: {why}" for name, why in self.unused.items()]
        pieces = vocabulary(self.place)
        return [*lines, *self.notes, *([f"its vocabulary: {pieces}"] if pieces else [])]

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`."""
        return {name: self._read(name, request) for name, request in requests.items()}

    def read_part(self, name: str, part: Slices) -> np.ndarray:
        """See `report.PartSource.read_part`."""
        theirs, transposed = self._places[name]
        if not transposed:
            return self._slice(theirs)[part]
        return self._slice(theirs)[part[::-1]].T

    def _open(self, file: str) -> Any:
        if file not in self._files:
            from safetensors import SafetensorError, safe_open

            try:
                path = self._copies.enter_context(storage.as_local(self.place / file))
                self._files[file] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError("this safetensors file is damaged",
                                got=f"{self.place / file}: {error}", fix="copy it again"
                                ) from error
        return self._files[file]

    def _slice(self, name: str) -> Any:
        return self._open(self._held[name]).get_slice(name)

    def _leaf(self, name: str) -> Leaf:
        theirs, transposed = self._places[name]
        found = self._slice(theirs)
        dtype = _DTYPES.get(found.get_dtype())
        if dtype is None:
            raise UserError("this array has a dtype that T5 parameters do not have",
                            got=f"{theirs}: {found.get_dtype()}", fix=", ".join(_DTYPES))
        shape = tuple(found.get_shape())
        return Leaf(shape[::-1] if transposed else shape, dtype)

    def _read(self, name: str, request: Request) -> Any:
        shape = self._leaves[name].shape

        @functools.cache  # devices that hold the same part share one
        def bounded(*bounds: tuple[int | None, int | None]) -> np.ndarray:
            part = self.read_part(name, tuple(slice(*ends) for ends in bounds))
            return part.astype(request.dtype, copy=False)

        if request.sharding is None:
            return bounded(*((None, None),) * len(shape))

        return jax.make_array_from_callback(
            shape, request.sharding, lambda index: bounded(*((at.start, at.stop) for at in index)))

    def _unused(self, table: str | None) -> dict[str, str]:
        unused = {_DEAD: "read by no T5"} if _DEAD in self._held else {}
        for name in _TIES:
            own = name == "lm_head.weight" and not self.network.logits_via_embedding
            if name not in self._held or own or name == table:
                continue
            if not self._equal(table, name):
                raise UserError(
                    f"{table} and {name} differ, though they are one array in a T5"
                    + (" whose config.json says tie_word_embeddings" if name == "lm_head.weight"
                       else ""),
                    got=self.place,
                    fix='if the output layer is its own, write "tie_word_embeddings": false into '
                        "config.json" if name == "lm_head.weight" else
                        "our network has one table for both sides")
            unused[name] = f"equal to {table}"
        return unused

    def _equal(self, first: str, second: str) -> bool:
        one, other = self._slice(first), self._slice(second)
        if one.get_shape() != other.get_shape():
            return False
        rows = one.get_shape()[0]
        blocks = (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
        return all(np.array_equal(one[block], other[block]) for block in blocks)


def reference_logits(place: epath.Path, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the float32 logits of Hugging Face's own model of the folder.

    Args:
        place: a Hugging Face folder on this machine.
        batch: `inputs/text/tokens`, `targets/text/inputs`; slots of token 0 in the inputs are not
            attended to.

    Raises:
        UserError: PyTorch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError("Hugging Face's side needs PyTorch and transformers", got=error,
                        fix="pip install 'vishwam_t5x[bench]', or convert without --verify"
                        ) from error
    network = describe(place)
    model = getattr(transformers, t5_network.KINDS[network.kind]).from_pretrained(
        str(place), torch_dtype=torch.float32)
    inputs, targets = (torch.tensor(np.asarray(batch[name]), dtype=torch.long)
                       for name in ("inputs/text/tokens", "targets/text/inputs"))
    with torch.no_grad():
        found = model.eval()(input_ids=inputs, attention_mask=(inputs > 0).long(),
                             decoder_input_ids=targets)
    return np.asarray(found.logits.numpy(), jnp.float32)
