"""Files of parameters, `.npz` or `.safetensors`, under our names whosever names they have.

Known are those of Unified-IO 2's PyTorch port, and of the sources of its parts (`parts`). Others
are taken as they are: a flat file of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.checkpointing.convert import parts, unified_io2_torch
from vishwam_t5x.checkpointing.manifest import Leaf
from vishwam_t5x.checkpointing.sources import NpzSource, Request, Source, place
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError

Made = tuple[str, Callable[[np.ndarray], np.ndarray]]
"""An array's name in a file, and what makes ours of it."""

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
           "I64": "int64", "I32": "int32", "BOOL": "bool", "U8": "uint8"}


def open_files(place: epath.Path) -> Relaid | Joined:
    """Opens a file of parameters, or several whose paths are joined by commas.

    Raises:
        UserError: as `open_file`; one is not there, or two have an array of the same name.
    """
    several = directories.several_files(place)
    return Joined({str(path): open_file(path) for path in several}) if several else (
        open_file(place))


def open_file(path: epath.Path) -> Relaid:
    """Opens a file of parameters; what has no name of ours keeps its own.

    Raises:
        UserError: it is no `.npz` or `.safetensors`, or holds Python objects.
    """
    source: Source = (SafetensorsSource(path) if path.name.endswith(".safetensors")
                      else NpzSource(path))
    shapes = {name: leaf.shape for name, leaf in source.leaves.items()}
    made = unified_io2_torch.recipes(shapes) or parts.recipes(shapes)
    taken = {name for name, _ in made.values()}
    made.update((name, (name, _same)) for name in shapes if name not in taken)
    return Relaid(source, made)


def _same(array: np.ndarray) -> np.ndarray:
    return array


class Relaid:
    """Arrays made of another source's, each of one whole array.

    Attributes:
        source: where they lie.
        made: our name -> its own, and what makes ours of it.
    """

    def __init__(self, source: Source, made: Mapping[str, Made]) -> None:
        """Finds the shapes, by making each array of one that takes no memory."""
        self.source, self.made = source, dict(made)
        self._leaves = {}
        for name, (own, make) in self.made.items():
            leaf = source.leaves[own]
            like = np.broadcast_to(np.zeros((), np.int8), leaf.shape)
            self._leaves[name] = Leaf(make(like).shape, leaf.dtype)

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return self._leaves

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`."""
        found: dict[str, Any] = {}
        for name, request in requests.items():
            own, make = self.made[name]
            array = self.source.read({own: Request(request.dtype, None)})[own]
            found[name] = place(np.ascontiguousarray(make(array)), request.sharding)
        return found


class Joined:
    """The arrays of several files.

    Attributes:
        made: our name -> its file and its own name there, and what makes ours of it.
    """

    def __init__(self, files: Mapping[str, Relaid]) -> None:
        """Raises `UserError` where two have an array of the same name."""
        self._files: dict[str, Relaid] = {}
        self.made: dict[str, Made] = {}
        for path, file in files.items():
            for name, (own, make) in file.made.items():
                if name in self.made:
                    raise UserError("two files have an array of the same name",
                                    got=f"{name}: {self.made[name][0]} and {path}: {own}",
                                    fix="leave one of the files out")
                self._files[name], self.made[name] = file, (f"{path}: {own}", make)

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return {name: file.leaves[name] for name, file in self._files.items()}

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`."""
        return {name: self._files[name].read({name: request})[name]
                for name, request in requests.items()}


class SafetensorsSource:
    """A `.safetensors` file under its own names."""

    def __init__(self, path: epath.Path) -> None:
        """Reads names, shapes and dtypes.

        Raises:
            UserError: no such file, a damaged one, or a dtype that parameters do not have.
        """
        from safetensors import SafetensorError, safe_open

        self._copy = contextlib.ExitStack()  # of a remote file, as long as this object lives
        try:
            local = self._copy.enter_context(storage.as_local(path))
            self._file = safe_open(local, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError("this safetensors file is damaged", got=f"{path}: {error}",
                            fix="copy it again") from error
        self._leaves = {}
        for name in list(self._file.keys()):
            found = self._file.get_slice(name)
            if (dtype := _DTYPES.get(found.get_dtype())) is None:
                raise UserError("this array has a dtype that parameters do not have",
                                got=f"{name}: {found.get_dtype()}", fix=", ".join(_DTYPES))
            self._leaves[name] = Leaf(tuple(found.get_shape()), dtype)

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """See `Source.leaves`."""
        return self._leaves

    def read(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """See `Source.read`."""
        return {name: place(np.asarray(self._file.get_tensor(name)).astype(request.dtype),
                            request.sharding) for name, request in requests.items()}
