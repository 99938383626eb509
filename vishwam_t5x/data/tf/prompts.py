"""Prompts in tf.data: fields of an example become the text that is asked and its answer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.data import prompts
from vishwam_t5x.data.tf.refusals import ID, map_or_refuse


def ask(dataset: tf.data.Dataset, family: str, seed: int = 0,
        grid: tuple[int, int] | None = None, frames: str = "image_history_inputs"
        ) -> tf.data.Dataset:
    """Adds `text_inputs`, and `text_targets` if the answer is text, of one family of tasks.

    An example whose fields are missing a word is refused and counted.

    Args:
        dataset: examples with `meta_id` and the family's fields: strings, and `box`, float32 [4],
            y1, x1, y2, x2 as shares of the model's picture.
        family: one of `data.prompts.FAMILIES`.
        seed: with `meta_id` it decides the phrasing.
        grid: (rows, columns) of patches, for 'inpainting': `image_input_patches` are then the
            patches outside the box.
        frames: feature whose length is the number of frames of a video.

    Raises:
        UserError: there is no such family, or the examples lack a field.
    """
    fields = prompts.family(family).fields
    if grid is None and family == "inpainting":
        raise UserError("inpainting needs the grid of patches", fix="grid=(24, 24)")
    names = [ID, *(frames if field == "frames" else field for field in fields)]
    if missing := sorted(set(names) - set(dataset.element_spec)):
        raise UserError(f"examples for '{family}' lack fields", got=", ".join(missing),
                        fix="they have: " + ", ".join(sorted(dataset.element_spec)))
    outputs = {"text_inputs": tf.TensorSpec((), tf.string)}
    if prompts.family(family).answer is not None:
        outputs["text_targets"] = tf.TensorSpec((), tf.string)
    if grid is not None:
        outputs["image_input_patches"] = tf.TensorSpec((None,), tf.int32)
    return map_or_refuse(dataset, functools.partial(_ask, family, fields, seed, grid), names,
                         outputs)


def _ask(family: str, fields: Sequence[str], seed: int, grid: tuple[int, int] | None, name: bytes,
         *values: np.ndarray | bytes) -> tuple[bytes | np.ndarray, ...]:
    given: dict[str, str | np.ndarray | int] = {}
    for field, value in zip(fields, values, strict=True):
        if field == "frames":
            given[field] = len(value)
        elif field == prompts.BOX:
            given[field] = np.asarray(value)
        else:
            given[field] = bytes(value).decode("utf-8", "replace")
    name_of = bytes(name).decode("utf-8", "replace")
    asked, answer = prompts.ask(family, given,
                                example_generator(seed, 0, f"prompt/{family}/{name_of}"))
    out: list[bytes | np.ndarray] = [asked.encode()]
    if answer is not None:
        out.append(answer.encode())
    if grid is not None:
        out.append(prompts.patches_outside(np.asarray(given[prompts.BOX]), grid))
    return tuple(out)
