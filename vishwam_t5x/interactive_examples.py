"""What is given to an interactive model, as requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.evaluation import input_codes, options
from vishwam_t5x.evaluation.input_file import OPTIONS, TARGET, InputReader
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.evaluation_setup import Prepared
from vishwam_t5x.task_lookup import TextCodec

Example = str | Mapping[str, Any]
"""Text; or {'text': …, 'image': path, 'audio': path}, and for training 'target': text, for choosing
'options': texts. T5X's 'inputs' and 'targets' are other names of 'text' and 'target'."""

_NAMES = {"inputs": "text", "targets": TARGET}


def fields(example: Example) -> dict[str, str]:
    """Returns what an example says, but for its options, by the names that a file of inputs has.

    Raises:
        UserError: a field that nobody reads.
    """
    found = {"text": example} if isinstance(example, str) else {
        _NAMES.get(name, name): value for name, value in example.items() if name != OPTIONS}
    for name, value in found.items():
        if name not in ("text", "image", "audio", TARGET) or not isinstance(value, str):
            raise UserError(f"an example has a field that nobody reads: {name!r}",
                            got=repr(value),
                            fix="text (or inputs), image, audio, target (or targets), all strings, "
                                "and options, a list of them")
    return found


def options_of(example: Example) -> tuple[str, ...]:
    """Returns the options of an example; () where it has none.

    Raises:
        UserError: they are not two texts or more.
    """
    if isinstance(example, str) or OPTIONS not in example:
        return ()
    return options.checked(example[OPTIONS])


def requests(examples: Sequence[Example], ready: Prepared, codec: TextCodec, ends: Sequence[str],
             target: str, needs_target: bool, resize: Literal["exact", "fast"] = "exact"
             ) -> list[Request]:
    """Returns what is asked of a generator, one an example, tagged with their numbers.

    Args:
        examples: as given.
        ready: the model.
        codec: text to ids.
        ends: which of 'inputs' and 'targets' get an end, where the objective adds none.
        target: modality to be written.
        needs_target: whether an example without a target cannot be used.
        resize: how pictures are read, see `pictures.PictureConfig`.

    Raises:
        UserError: an example cannot be used: which, and why.
    """
    if isinstance(examples, str | Mapping):
        raise UserError("give a list of examples", got=repr(examples), fix="[…] around it")
    config = ready.model.config
    one_of(target, config.target_modalities, "target modality of this model")
    grids = {module.modality: module.grid for module in config.inputs if hasattr(module, "grid")}
    reader = InputReader(ready.objective, target, codec.encode, ready.spec, grids, None,
                         needs_target, ready.generator.is_prompted(target), ends,
                         coded=input_codes.coded_inputs(config, {}, None, resize), resize=resize)
    found = []
    for number, example in enumerate(examples):
        try:
            request = Request.from_example(reader.example(fields(example), ""), number)
            found.append(dataclasses.replace(
                request, options=reader.option_ids(options_of(example))))
        except UserError as error:
            raise UserError(f"example {number}: {error.problem}", error.got, error.fix) from error
    return found
