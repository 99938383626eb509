"""Questions with a picture and options to choose from, in a folder of yours, as a Task.

`VISHWAM_MULTIPLE_CHOICE` names the folder. Its `data.jsonl` has a question a line:
{"question": "What is <image 1>?", "options": ["a cat", "a dog"], "answer": "B",
"image_1": "images/7.png"}, as the examples of MMMU-Pro (Yue et al. 2024, arXiv:2409.02813). It is
for judging, so there is only a test split. A question of several pictures is left out and counted.
The letters are the options of an example (`evaluation.options`): the most probable is the answer.
"""

from __future__ import annotations

import functools
import json
import os
import re
import string
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.rng import example_generator
from vishwam_t5x.data.tf import refusals
from vishwam_t5x.data.tf.features import codes_feature, image_feature, text_feature
from vishwam_t5x.data.tf.image import PictureConfig, decode_picture
from vishwam_t5x.data.tf.special_tokens import SpecialTokens, tokenize
from vishwam_t5x.evaluation.metrics.text import exact_match
from vishwam_t5x.evaluation.options import FEATURE as OPTIONS
from vishwam_t5x_tasks.quickstart import VOCABULARY, remembered

NAME = "multiple_choice"
FOLDER_VARIABLE = "VISHWAM_MULTIPLE_CHOICE"
FILE = "data.jsonl"
SEED = 6
PICTURE = PictureConfig(384, 384)
PATCH_SIZE = 16
NUM_PATCHES = (384 // PATCH_SIZE) ** 2
PHRASINGS = (
    "{question}\n{options}\nAnswer with the letter of the right option.",
    "Choose the right option.\n{question}\n{options}",
    "{question} Which of these is right?\n{options}\nGive its letter.",
    "Question: {question}\nOptions:\n{options}\nThe letter of the answer is")
TEXT = SpecialTokens(VOCABULARY)
_IMAGE = re.compile(r"<image (\d+)>")


def folder() -> str:
    """Returns the folder of questions.

    Raises:
        UserError: the environment names none.
    """
    value = os.environ.get(FOLDER_VARIABLE)
    if not value:
        raise UserError(f"the Task '{NAME}' needs a folder of questions",
                        got=f"{FOLDER_VARIABLE} is not set",
                        fix=f"{FOLDER_VARIABLE}=FOLDER, with a file {FILE} of lines like "
                            '{"question": "What is <image 1>?", "options": ["a cat", "a dog"], '
                            '"answer": "B", "image_1": "images/7.png"}')
    return value


def ask(line: str, number: int) -> tuple[str, str, str, str]:
    """Returns what is asked, the letter of the answer, all letters, and the path of the picture.

    Args:
        line: of the file.
        number: of the line, from 1: it draws the phrasing.

    Raises:
        UserError: it is no such question, or one of several pictures.
    """
    try:
        fields = json.loads(line)
        question, options, answer = (fields[name] for name in ("question", "options", "answer"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("the line is no question with options and an answer",
                        got=f"{type(error).__name__}: {error}") from error
    if not isinstance(question, str) or not isinstance(options, list) or not all(
            isinstance(option, str) for option in options):
        raise UserError("the question must be a text and its options a list of texts")
    letters = string.ascii_uppercase[:len(options)]
    if len(options) > len(letters):
        raise UserError("the question has more options than there are letters",
                        got=len(options))
    if len(options) < 2 or not isinstance(answer, str) or answer not in tuple(letters):
        raise UserError("the answer must be the letter of one of the options",
                        got=f"{answer!r} of {len(options)} options")
    listed = "\n".join(f"({letter}) {option}"
                       for letter, option in zip(letters, options, strict=True))
    named = {int(n) for n in _IMAGE.findall(f"{question}\n{listed}")}
    # Exports of a table have a null in each column of pictures that a question does not use.
    images = {name: value for name, value in fields.items()
              if name.startswith("image_") and value is not None}
    if len(images) != 1 or named - {1} or not isinstance(images.get("image_1"), str):
        raise UserError("the question must have one picture, image_1",
                        got=", ".join(sorted(images)) or "none")
    rng = example_generator(SEED, number, NAME)
    phrasing = PHRASINGS[int(rng.integers(len(PHRASINGS)))]
    text = _IMAGE.sub("<image_input>", phrasing.format(question=question.strip(), options=listed))
    if not named:
        text = f"<image_input>\n{text}"
    return text, answer, letters, images["image_1"]


def _source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del split, shuffle_files, seed
    path = folder()
    try:
        # Not splitlines(), which ends a line at U+2028 too: JSON may hold it within a text.
        lines = storage.read_text(os.path.join(path, FILE)).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("the file of questions cannot be read",
                        got=f"{os.path.join(path, FILE)}: {error}",
                        fix=f"mend {FOLDER_VARIABLE}") from error
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise UserError("the file of questions is empty", got=os.path.join(path, FILE))
    return tf.data.Dataset.from_tensor_slices({
        "line": [line for _, line in kept],
        "number": np.asarray([number for number, _ in kept], np.int32),
        "folder": [path] * len(kept),
        "meta_id": [f"{FILE}:{number}" for number, _ in kept]})


def _ask(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def read(line: bytes, number: np.ndarray, path: bytes) -> tuple[bytes, bytes, bytes, bytes]:
        asked, answer, letters, image = ask(line.decode(), int(number))
        return (asked.encode(), answer.encode(), json.dumps(list(letters)).encode(),
                os.path.join(path.decode(), image).encode())

    text = tf.TensorSpec((), tf.string)
    return refusals.map_or_refuse(dataset, read, ["line", "number", "folder"], {
        "text_inputs": text, "text_targets": text, OPTIONS: text, "image_inputs": text})


seqio.TaskRegistry.add(
    NAME,
    source=seqio.FunctionDataSource(_source, splits=("test",)),
    preprocessors=[
        _ask,
        functools.partial(refusals.read_bytes, feature="image_inputs"),
        functools.partial(decode_picture, feature="image_inputs", config=PICTURE,
                          patches="image_input_patches", patch_size=PATCH_SIZE),
        tokenize],
    output_features={"image_inputs": image_feature(tf.uint8),
                     "image_input_patches": codes_feature(NUM_PATCHES),
                     "text_inputs": text_feature(TEXT), "text_targets": text_feature(TEXT)},
    metric_fns=[exact_match])


def task_metadata(task_name: str) -> dict[str, Any]:
    """Returns what a cache's manifest records of the Task.

    Raises:
        UserError: it is another Task.
    """
    return remembered(task_name, (NAME,)) | {
        "folder": folder(), "patch_sizes": {"image": (PATCH_SIZE, PATCH_SIZE)}}
