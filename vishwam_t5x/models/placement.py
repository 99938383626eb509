"""Where features stand in the prefix of a decoder-only model: in the place of a text token.

As LLaVA (arXiv 2304.08485) splices a picture into its prompt: the slot of the placeholder, such as
`<image_input>`, gives way to the slots of the picture. A picture whose placeholder is not in the
text of its example stands in front of it; a placeholder without a picture stays a token, and of
several the first one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.sequence import InputSequence
from vishwam_t5x.models.modalities import Fields

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig

TEXT = "text"
_LAST = jnp.iinfo(jnp.int32).max


def check(config: EncoderDecoderConfig) -> None:
    """Raises `UserError` unless the placeholders of a config are text tokens of its prefix."""
    seen: dict[int, str] = {}
    rows = config.tables.get(TEXT)
    for module in config.inputs:
        where = f"modality '{module.modality}', placeholder {module.placeholders}"
        if not module.placeholders:
            continue
        if not config.decoder_only:
            raise UserError("features take the place of a text token in the prefix of a "
                            "decoder-only model: an encoder knows them by their own positions",
                            got=where, fix="placeholder = None, or num_encoder_layers = 0")
        if TEXT not in config.input_modalities or rows is None:
            raise UserError("there is no text whose token could give way", got=where,
                            fix="add @config.TextInput() to EncoderDecoderConfig.inputs")
        for token in module.placeholders:
            if isinstance(token, bool) or not isinstance(token, int) or not 2 < token < rows:
                raise UserError("a placeholder is a token of the text vocabulary",
                                got=f"{where}, the table has {rows} rows",
                                fix="placeholder = @vocabulary.token_id(), which takes a name")
            if token in seen:
                raise UserError("two kinds of pictures have the same placeholder",
                                got=f"token {token}: '{seen[token]}' and '{module.modality}'",
                                fix="give each a token of its own")
            seen[token] = module.modality


def at_placeholders(parts: Mapping[str, InputSequence], fields: Mapping[str, Fields],
                    placeholders: Mapping[str, tuple[int, ...]], columns: int
                    ) -> Int[Array, "B L"]:
    """Returns which slot each column of a row has, -1 for none: a `row/index`.

    Args:
        parts: the embedded modalities, 'text' among them, in the order of their slots.
        fields: the arrays of each; 'frame_ids' say which picture of its example a frame is.
        placeholders: by modality, the tokens of its pictures 0, 1, …; others stand behind the text.
        columns: of a row; slots that are no padding fit in it.
    """
    tokens, own = fields[TEXT]["tokens"], parts[TEXT].segment_ids
    length = tokens.shape[1]
    taken = jnp.zeros(tokens.shape, jnp.bool_)
    places: dict[str, Array] = {TEXT: jnp.broadcast_to(1 + jnp.arange(length), tokens.shape)}
    for name, part in parts.items():
        segments = part.segment_ids
        if name == TEXT:
            continue
        if name not in placeholders:
            places[name] = jnp.full_like(segments, length + 1)
            continue
        wanted = _wanted(fields[name], segments, placeholders[name])
        found = ((segments[:, :, None] == own[:, None, :]) & (segments > 0)[:, :, None]
                 & (tokens[:, None, :] == wanted[:, :, None]))
        first, there = jnp.argmax(found, axis=-1), jnp.any(found, axis=-1)
        places[name] = jnp.where(there, 1 + first, 0)
        taken = taken | jnp.any(
            there[:, :, None] & (first[:, :, None] == jnp.arange(length)), axis=1)
    segments = jnp.concatenate([jnp.where(taken, 0, own) if name == TEXT else part.segment_ids
                                for name, part in parts.items()], axis=1)
    place = jnp.concatenate([places[name] for name in parts], axis=1)
    key = jnp.where(segments > 0, segments * (length + 2) + place, _LAST)
    order = jnp.argsort(key, axis=1, stable=True).astype(jnp.int32)
    ordered = jnp.take_along_axis(segments, order, axis=1)
    return jnp.where(ordered > 0, order, -1)[:, :columns]


def _wanted(fields: Fields, segments: Int[Array, "B N"], tokens: tuple[int, ...]
            ) -> Int[Array, "B N"]:
    """The placeholder of each slot's picture, -1 where there is none for it."""
    numbers = jnp.zeros_like(segments)
    if fields["input" if "input" in fields else "tokens"].ndim == 4:  # frames, of several slots
        shape = fields["input"].shape[:2]
        frames = fields.get("frame_ids", jnp.broadcast_to(jnp.arange(shape[1]), shape))
        numbers = jnp.repeat(frames, segments.shape[1] // shape[1], axis=1)
    known = jnp.asarray(tokens, jnp.int32)
    return jnp.where(numbers < len(tokens), known[jnp.minimum(numbers, len(tokens) - 1)], -1)
