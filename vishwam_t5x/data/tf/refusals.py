"""Preprocessors in NumPy that may refuse an example: it is counted and left out, never a crash."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.tf.examples import REFUSED

ID = "meta_id"
"""Feature that names an example in messages: a string, such as the name of its file."""


def map_or_refuse(dataset: tf.data.Dataset, function: Callable[..., Sequence[np.ndarray]],
                  inputs: Sequence[str], outputs: Mapping[str, tf.TensorSpec],
                  ) -> tf.data.Dataset:
    """Gives features of each example to a NumPy function, and what it returns to the example.

    An example that the function refuses with a UserError gets zeros (of unknown sizes: nothing) and
    the reason, with the example's `meta_id` if it has one, as its feature `refused`: caches and
    live streams then leave it out, say so and count it. One refused before is not looked at again.

    Args:
        dataset: examples with the features `inputs`.
        function: takes their values (strings as bytes), returns a value for each of `outputs`.
        inputs: names.
        outputs: names and types of what is added or replaced; unknown sizes are None.
    """
    types = [spec.dtype for spec in outputs.values()]

    def call(name: bytes, refused: bytes, *values: np.ndarray) -> list:
        why = bytes(refused)
        if not why:
            try:
                found = function(*values)
                return [b"", *(np.asarray(value, kind.as_numpy_dtype)
                               for value, kind in zip(found, types, strict=True))]
            except UserError as error:
                got = "" if error.got is None else f" ({error.got})"
                where = f"{bytes(name).decode('utf-8', 'replace')}: " if name else ""
                why = f"{where}{error.problem}{got}".encode()
        return [why, *(_nothing(spec) for spec in outputs.values())]

    def each(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        name, refused = example.get(ID, tf.constant(b"")), example.get(REFUSED, tf.constant(b""))
        if name.dtype != tf.string:
            name = tf.strings.as_string(name)
        why, *values = tf.numpy_function(
            call, [name, refused, *(example[key] for key in inputs)], [tf.string, *types])
        why.set_shape(())
        for value, spec in zip(values, outputs.values(), strict=True):
            value.set_shape(spec.shape)
        return {**example, REFUSED: why, **dict(zip(outputs, values, strict=True))}

    return dataset.map(each, num_parallel_calls=tf.data.AUTOTUNE)


def _nothing(spec: tf.TensorSpec) -> np.ndarray | bytes:
    if spec.dtype == tf.string:
        return b""
    return np.zeros([size or 0 for size in spec.shape], spec.dtype.as_numpy_dtype)


def read_bytes(dataset: tf.data.Dataset, feature: str) -> tf.data.Dataset:
    """Replaces the path in `feature`, or each of a list, by the content of that file.

    A file that cannot be read is refused, with its path. The path becomes the example's `meta_id`
    if it has none.

    Args:
        dataset: examples whose `feature` is a string, or strings [n].
        feature: name.

    Raises:
        UserError: examples with lists of paths have no `meta_id`.
    """
    several = dataset.element_spec[feature].shape.rank == 1

    def one(path: bytes) -> bytes:
        try:
            return storage.read_bytes(path.decode())
        except OSError as error:
            raise UserError("the file cannot be read",
                            got=f"{path.decode()}: {error.strerror or error}") from error

    def read(given: bytes | np.ndarray) -> tuple[bytes | np.ndarray]:
        if not several:
            return (one(bytes(given)),)
        return (np.asarray([one(path) for path in given], object),)

    if ID not in dataset.element_spec:
        if several:
            raise UserError("examples with lists of files need names", got=f"no feature '{ID}'",
                            fix=f"let the source give each example a '{ID}'")
        dataset = dataset.map(lambda example: {**example, ID: example[feature]})
    return map_or_refuse(dataset, read, [feature], {
        feature: tf.TensorSpec((None,) if several else (), tf.string)})
