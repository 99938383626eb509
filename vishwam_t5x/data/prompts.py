"""What a model is asked, by family of tasks: several phrasings each, and boxes as location tokens.

The families are those of Unified-IO 2 (Lu et al. 2023, arXiv:2312.17172), the words our own. The
prefix token ([Text] [S], [Image] [S], [Audio] [S]) is not written here: the objective puts that of
the modality to be written in front of every input text. Pictures and sounds are called by their
tokens of `objectives.vocabulary.VocabularyLayout`: <image_input>, <audio_input>,
<image_history_1>, ….
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from vishwam_t5x.core.errors import UserError, did_you_mean

NUM_SENTINELS, NUM_BINS = 200, 1000
BOX = "box"
"""Field of a box: y1, x1, y2, x2, each a share of the height or width of the model's picture."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How examples of one kind are asked.

    Attributes:
        phrasings: texts with {fields} of the example; one is drawn for each.
        answer: the text to be written, with {fields}; None where the target is no text.
        restores: parts of a picture or a sound are hidden and to be restored: the objective hides
            them, and the text is its `text_prompt`.
    """

    phrasings: tuple[str, ...]
    answer: str | None
    restores: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The texts and boxes that an example must have, by name."""
        texts = (*self.phrasings, *([self.answer] if self.answer else []))
        names = {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name}
        return tuple(sorted(names))


FAMILIES: dict[str, Family] = {
    "captioning": Family((
        "Say in a sentence what <image_input> shows.",
        "Write a caption for <image_input>.",
        "What can be seen in <image_input>? Describe it briefly.",
        "Give a short description of the picture <image_input>."), "{caption}"),
    "question": Family((
        "<image_input> {question}",
        "Look at <image_input> and answer: {question}",
        "Answer a question about <image_input>. {question}",
        "Here is a picture: <image_input>. {question} Answer in a few words."), "{answer}"),
    "referring": Family((
        "Where in <image_input> is this: {expression}",
        "Find \"{expression}\" in <image_input> and give its box.",
        "Which region of <image_input> is meant by \"{expression}\"?",
        "Give the corners of the box around {expression} in <image_input>."), "{box}"),
    "region": Family((
        "What is inside the box {box} of <image_input>?",
        "Describe the region {box} of <image_input> so that it can be found.",
        "Name what lies at {box} in the picture <image_input>.",
        "Which words single out {box} in <image_input>?"), "{expression}"),
    "image_generation": Family((
        "Draw this: {caption}",
        "Make a picture of the following. {caption}",
        "Create an image that fits the description \"{caption}\".",
        "What would \"{caption}\" look like? Show it."), None),
    "inpainting": Family((
        "Fill in the region {box} of <image_input>: {caption}",
        "A part of <image_input> is missing at {box}. Complete the picture: {caption}",
        "Paint the gap {box} in <image_input>. It should show {caption}",
        "Restore what is hidden at {box} of <image_input>, given that it is {caption}"), None),
    "image_denoising": Family((
        "Restore the picture <image_input>, of which parts are hidden.",
        "Some pieces of <image_input> have been taken out. Show it whole.",
        "Complete <image_input> from the pieces that are left.",
        "Fill in everything that is missing in <image_input>."), None, restores=True),
    "audio_denoising": Family((
        "Restore the sound <audio_input>, of which parts are hidden.",
        "Some pieces of <audio_input> have been silenced. Play it whole.",
        "Complete <audio_input> from the pieces that are left.",
        "Make up for everything that is missing in <audio_input>."), None, restores=True),
    "audio_captioning": Family((
        "Describe the sound <audio_input>.",
        "What can be heard in <audio_input>?",
        "Say briefly what makes the sounds of <audio_input>.",
        "Write a caption for the recording <audio_input>."), "{caption}"),
    "transcription": Family((
        "Write down what is said in <audio_input>.",
        "Which words are spoken in <audio_input>?",
        "Put the speech of <audio_input> into writing.",
        "Transcribe the recording <audio_input>."), "{transcript}"),
    "audio_generation": Family((
        "Make this sound: {caption}",
        "Let me hear the following. {caption}",
        "What does \"{caption}\" sound like?",
        "Produce a recording of {caption}"), None),
    "video_captioning": Family((
        "Say in a sentence what happens in the video {frames}.",
        "Describe the video with these frames: {frames}",
        "What is going on in {frames}?",
        "Write a caption for the video {frames}."), "{caption}"),
    "instruction": Family((
        "{instruction} {input}",
        "Do as you are told: {instruction} {input}",
        "Task: {instruction} Given: {input}",
        "{input} {instruction}"), "{output}"),
}


def family(name: str) -> Family:
    """Returns a family of tasks.

    Raises:
        UserError: there is none of that name.
    """
    if name not in FAMILIES:
        raise UserError("there is no such family of tasks", got=repr(name),
                        fix=did_you_mean(name, FAMILIES) or "one of: " + ", ".join(FAMILIES))
    return FAMILIES[name]


def ask(name: str, fields: Mapping[str, str | np.ndarray | int], rng: np.random.Generator
        ) -> tuple[str, str | None]:
    """Returns what a model is asked, and the text it should answer (None: no text).

    Args:
        name: of the family.
        fields: of the example: texts; `box`, four shares; `frames`, the number of frames. An empty
            `input` of an instruction is one that needs none.
        rng: draws the phrasing.

    Raises:
        UserError: there is no such family, or a field is missing, empty, or no box.
    """
    kind = family(name)
    values = {}
    for field in kind.fields:
        if field not in fields:
            raise UserError(f"an example of '{name}' has no '{field}'",
                            got=", ".join(sorted(fields)) or "no field",
                            fix="its fields: " + ", ".join(kind.fields))
        values[field] = _written(field, fields[field])
        if not values[field] and field != "input":
            raise UserError(f"the {field} is empty")
    phrasing = kind.phrasings[int(rng.integers(len(kind.phrasings)))]
    asked = phrasing.format_map(values).strip()  # lines and columns of an example's text stay
    if not values.get("input", "-"):
        asked = asked.removesuffix(" Given:")
    return asked, None if kind.answer is None else kind.answer.format_map(values)


def _written(field: str, value: str | np.ndarray | int) -> str:
    if field == BOX:
        return box_tokens(np.asarray(value, np.float64))
    if field == "frames":
        number = int(value)
        if number < 1:
            raise UserError("the video has no frames")
        return " ".join(f"<image_history_{i + 1}>" for i in range(number))
    return str(value).strip()


def box_tokens(box: Float[np.ndarray, "4"]) -> str:
    """Returns a box as the names of four location tokens, y1 x1 y2 x2.

    Bin b of a share v is floor(v * 999), its name <extra_id_{200 + b}>: the 1,000 bins and 200
    sentinels of Unified-IO 2.

    Args:
        box: shares of the height (y) and width (x), in [0, 1].

    Raises:
        UserError: it is none: not four numbers in [0, 1], or ends before it begins.
    """
    if box.shape != (4,) or not ((box >= 0) & (box <= 1)).all():
        raise UserError("a box is y1, x1, y2, x2, shares from 0 to 1", got=box.tolist())
    if box[2] <= box[0] or box[3] <= box[1]:
        raise UserError("the box is empty", got=box.tolist())
    return " ".join(f"<extra_id_{NUM_SENTINELS + int(share * (NUM_BINS - 1))}>" for share in box)


def placed_box(box: Float[np.ndarray, "4"], size: tuple[int, int], wanted: tuple[int, int]
               ) -> Float[np.ndarray, "4"]:
    """Returns where a box of a picture is once that is fitted into another size and centred.

    As `pictures.place` fits it without drawing.

    Args:
        box: y1, x1, y2, x2 in pixels of the picture.
        size: its height and width in pixels.
        wanted: those of the model.

    Returns:
        shares of the model's height and width; what sticks out of the picture is cut.
    """
    scale = min(wanted[0] / size[0], wanted[1] / size[1])
    out = np.empty((4,), np.float64)
    for axis in (0, 1):
        begin = (wanted[axis] - round(size[axis] * scale)) // 2
        shares = (np.clip(box[axis::2], 0, size[axis]) * scale + begin) / wanted[axis]
        out[axis::2] = np.clip(shares, 0, 1)
    return out


def codes_inside(box: Float[np.ndarray, "4"], grid: tuple[int, int]) -> np.ndarray:
    """Returns for each code whether its centre is in a box, int32 row-major: what inpainting fills.

    Args:
        box: y1, x1, y2, x2, shares.
        grid: rows and columns of codes.

    Raises:
        UserError: the box holds no code.
    """
    inside = _inside(box, grid)
    if not inside.any():
        raise UserError("the box holds none of the image's codes", got=box.tolist())
    return inside.reshape(-1).astype(np.int32)


def _inside(box: Float[np.ndarray, "4"], grid: tuple[int, int]) -> np.ndarray:
    rows = (np.arange(grid[0]) + 0.5) / grid[0]
    columns = (np.arange(grid[1]) + 0.5) / grid[1]
    return (((rows >= box[0]) & (rows < box[2]))[:, None]
            & ((columns >= box[1]) & (columns < box[3])))


def patches_outside(box: Float[np.ndarray, "4"], grid: tuple[int, int]) -> np.ndarray:
    """Returns the numbers of the patches whose centre is not in a box, int32: for inpainting.

    Args:
        box: y1, x1, y2, x2, shares.
        grid: rows and columns of patches.

    Raises:
        UserError: the box leaves no patch to see, or hides none.
    """
    hidden = _inside(box, grid)
    if hidden.all() or not hidden.any():
        raise UserError("the box hides all or none of the image's patches", got=box.tolist())
    return np.flatnonzero(~hidden.reshape(-1)).astype(np.int32)
