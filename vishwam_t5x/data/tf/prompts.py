"""Prompts in tf.data: fields of an example become the text that is asked and its answer."""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.data import prompts
from vishwam_t5x.data.tf.refusals import ID, map_or_refuse
from vishwam_t5x.objectives.features import PROMPT


def ask(dataset: tf.data.Dataset, family: str, seed: int = 0,
        grid: tuple[int, int] | None = None, code_grid: tuple[int, int] | None = None,
        frames: str = "image_history_inputs") -> tf.data.Dataset:
    """Adds `text_inputs`, and `text_targets` if the answer is text, of one family of tasks.

    Families that restore what the objective hides get `text_prompt` instead. An example whose
    fields are missing a word is refused and counted.

    Args:
        dataset: examples with `meta_id` and the family's fields: strings, and `box`, float32 [4],
            y1, x1, y2, x2 as shares of the model's picture.
        family: one of `data.prompts.FAMILIES`.
        seed: with `meta_id` it decides the phrasing.
        grid: (rows, columns) of patches, for 'inpainting': `image_input_patches` are then the
            patches outside the box;
        code_grid: (rows, columns) of codes: `image_target_task_masks` are then those inside it.
        frames: feature whose length is the number of frames of a video.

    Raises:
        UserError: there is no such family, or the examples lack a field.
    """
    kind = prompts.family(family)
    if family == "inpainting" and (grid is None or code_grid is None):
        raise UserError("inpainting needs the grids of patches and of codes",
                        fix="grid=(24, 24), code_grid=(32, 32)")
    names = [ID, *(frames if field == "frames" else field for field in kind.fields)]
    if missing := sorted(set(names) - set(dataset.element_spec)):
        raise UserError(f"examples for '{family}' lack fields", got=", ".join(missing),
                        fix="they have: " + ", ".join(sorted(dataset.element_spec)))
    outputs = {PROMPT if kind.restores else "text_inputs": tf.TensorSpec((), tf.string)}
    if kind.answer is not None:
        outputs["text_targets"] = tf.TensorSpec((), tf.string)
    if grid is not None:
        outputs["image_input_patches"] = tf.TensorSpec((None,), tf.int32)
    if code_grid is not None:
        outputs["image_target_task_masks"] = tf.TensorSpec((None,), tf.int32)
    return map_or_refuse(dataset, functools.partial(_ask, family, seed, grid, code_grid), names,
                         outputs)


def _ask(family: str, seed: int, grid: tuple[int, int] | None, code_grid: tuple[int, int] | None,
         name: bytes, *values: np.ndarray | bytes) -> tuple[bytes | np.ndarray, ...]:
    given: dict[str, str | np.ndarray | int] = {}
    for field, value in zip(prompts.family(family).fields, values, strict=True):
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
    if code_grid is not None:
        out.append(prompts.codes_inside(np.asarray(given[prompts.BOX]), code_grid))
    return tuple(out)
