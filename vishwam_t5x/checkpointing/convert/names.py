"""T5X's names of parameters and of the optimizer's state, and ours.

T5X calls the tree of parameters `target`, and keeps Adafactor's moments and the step in `state`:
`target/decoder/logits_dense/kernel`, `state/param_states/decoder/logits_dense/kernel/v_row`,
`state/step`. Ours are `params/…`, `opt_state/param_states/…`, `opt_state/step` and `step`.
Unified-IO 2 was trained with T5X: its checkpoints are of this layout, with names of their own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

from vishwam_t5x.checkpointing.convert import unified_io2

EMBEDDING, LOGITS = "text_token_embedder/embedding", "target_encoders_text/logits_kernel"
"""Our names of the two parameters that are called otherwise in T5X."""

_THEIRS = {"token_embedder/embedding": EMBEDDING,
           "decoder/token_embedder/embedding": EMBEDDING,  # T5X's decoder-only example
           "decoder/logits_dense/kernel": LOGITS}
_MOMENT = re.compile(r"(?P<tree>.*)param_states/(?P<param>.+)/(?P<moment>m|v|v_row|v_col)")
# Adafactor alone, or as one link of a chain, such as behind a clipping by global norm.
_OUR_STATE = re.compile(r"opt_state/(?:\d+/)*")
# What the run keeps beside parameters and optimizer; T5X has nothing like it.
_BOOKKEEPING = re.compile(r"(loss_scale|stability|position)/.*")
# The parts of T5X's encoder, decoder and their layers; a parameter of any other is ours alone.
_T5_PARAMETER = re.compile(
    r"(encoder|decoder)/(?:(?:layers_\d+|encoder|decoder)/)?"
    r"(?:(?:attention|self_attention|encoder_decoder_attention)/(?:query|key|value|out)/kernel"
    r"|mlp/(?:wi|wi_\d+|wo)/kernel"
    r"|(?:pre_\w*layer_norm|layer_norm|encoder_norm|decoder_norm)/scale"
    r"|relpos_bias/rel_embedding)")


def parameter_from_t5x(name: str) -> str:
    """Returns our name of one of T5X's parameters, or Unified-IO 2's, without 'target/' and
    'params/'.
    """
    return _THEIRS.get(name) or unified_io2.parameter_from_unified_io2(name)


def parameter_to_t5x(name: str, decoder_only: bool = False) -> str | None:
    """Returns T5X's name of one of our parameters, or None if it has none.

    Args:
        name: ours, without 'params/'.
        decoder_only: the model has no encoder: then the embeddings are the decoder's.
    """
    if name == EMBEDDING:
        return f"{'decoder/' if decoder_only else ''}token_embedder/embedding"
    if name == LOGITS:
        return "decoder/logits_dense/kernel"
    return name if _T5_PARAMETER.fullmatch(name) else None


def spellings(name: str) -> set[str]:
    """Returns what one of our parameters is called in T5X, with and without an encoder, and in
    Unified-IO 2.
    """
    found = {parameter_to_t5x(name, decoder_only) for decoder_only in (False, True)}
    found.add(_to_unified_io2(name))
    return {theirs for theirs in found if theirs is not None}


def from_t5x(name: str) -> tuple[str, ...]:
    """Returns what an array of a T5X checkpoint is called in ours: two names of the step, else one;
    none if it has no place.
    """
    if name == "state/step":
        return ("step", "opt_state/step")
    if name.startswith("target/"):
        return (f"params/{parameter_from_t5x(name.removeprefix('target/'))}",)
    if (match := _MOMENT.fullmatch(name)) and match["tree"] == "state/":
        return (f"opt_state/param_states/{parameter_from_t5x(match['param'])}/{match['moment']}",)
    return ()


def all_to_t5x(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Finds the place in a T5X checkpoint of every array of ours.

    Returns:
        ({our name: T5X's}, those of the run's bookkeeping, those that have no place).
    """
    names = list(names)
    spelled: Callable[[str], str | None] = _to_unified_io2
    if not any(unified_io2.is_unified_io2(name) for name in names if name.startswith("params/")):
        decoder_only = not any(name.startswith("params/encoder/") for name in names)
        spelled = functools.partial(parameter_to_t5x, decoder_only=decoder_only)
    places: dict[str, str] = {}
    bookkeeping, homeless = [], []
    for name in names:
        place = _to_t5x(name, spelled)
        if _BOOKKEEPING.fullmatch(name):
            bookkeeping.append(name)
        elif place is None:
            homeless.append(name)
        elif place == "state/step" and name != "step":
            bookkeeping.append(name)  # T5X has one count of steps for both
        else:
            places[name] = place
    return places, tuple(bookkeeping), tuple(homeless)


def _to_unified_io2(name: str) -> str | None:
    theirs = unified_io2.parameter_to_unified_io2(name)
    return theirs if unified_io2.has_place(theirs) else None


def _to_t5x(name: str, spelled: Callable[[str], str | None]) -> str | None:
    if name == "step" or (_OUR_STATE.match(name) and _OUR_STATE.sub("", name) == "step"):
        return "state/step"
    if name.startswith("params/"):
        theirs = spelled(name.removeprefix("params/"))
        return theirs and f"target/{theirs}"
    if (match := _MOMENT.fullmatch(name)) and _OUR_STATE.fullmatch(match["tree"]):
        theirs = spelled(match["param"])
        return theirs and f"state/param_states/{theirs}/{match['moment']}"
    return None
