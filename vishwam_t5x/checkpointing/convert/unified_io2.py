"""Names of parameters in Unified-IO 2's checkpoints (arXiv 2312.17172), and ours.

The original names a transformer that two inputs share after the input that is built first, so that
a model without that input cannot find it in a full checkpoint. Ours has a name of its own. All else
is called alike, but for one level that ours lacks. Names are without 'target/' and 'params/'.
"""

from __future__ import annotations

import re

_SHARED = {
    "image_transformer/": "input_image_encoder/image_encoder/vision_transformer/",
    "audio_transformer/": "input_audio_encoder/image_encoder/vision_transformer/",
}
_ALONE = {
    f"{modality}_transformer/":
        f"input_encoders_{modality}_history/vit_image_encoder/vision_transformer/"
    for modality in ("image", "audio")}
"""Where the original keeps it in models without the image or audio input: read, never written."""

_RESAMPLERS = tuple(f"input_encoders_{modality}_history/resampler/"
                    for modality in ("image", "audio"))
_LEVEL = "PerceiverResampler_0/"
_MARK = "modality_embedding"
_CODEC_STATE = re.compile(r"opt_state/(?:.+/)?target_encoders_\w+/discrete_vae/")

# By the original's names.
_PARAMETER = re.compile(
    r"(?:text|image|audio)_token_embedder/embedding"
    r"|(?:encoder|decoder)/(?:(?:layers_\d+|encoder|decoder)/)?"
    r"(?:(?:attention|self_attention|encoder_decoder_attention)/"
    r"(?:(?:query|key|value|out)/kernel|(?:query|key)_norm/scale)"
    r"|mlp/(?:wi|wi_\d+|wo)/kernel"
    r"|(?:pre_\w+_layer_norm|encoder_norm|decoder_norm)/scale)"
    r"|input_text_encoder/modality_embedding"
    r"|input_(?:image|audio)_encoder/"
    r"(?:modality_embedding|projection/kernel|image_encoder/vision_transformer/.+)"
    r"|input_encoders_(?:image|audio)_history/"
    r"(?:modality_embedding|(?:pre|post)_projection/kernel|resampler/PerceiverResampler_0/.+)"
    r"|target_encoders_(?:text|image|audio)/modality_embedding"
    r"|target_encoders_(?:image|audio)/discrete_vae/.+")


def is_unified_io2(name: str) -> bool:
    """Whether a parameter, by our name or the original's, tells its network from a T5: all of the
    modalities have a learned embedding there.
    """
    return name.rpartition("/")[2] == _MARK


def is_moment_of_codec(name: str) -> bool:
    """Whether one of our names is that of an optimizer's state of a codec inside a model. The
    original has such; here codecs are never trained with a model, and have none.
    """
    return _CODEC_STATE.match(name) is not None


def has_place(theirs: str) -> bool:
    """Whether Unified-IO 2 has a parameter of this name, one of its own."""
    return _PARAMETER.fullmatch(theirs) is not None


def parameter_from_unified_io2(name: str) -> str:
    """Returns our name of one of Unified-IO 2's parameters."""
    for table in (_SHARED, _ALONE):
        for ours, theirs in table.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
    for prefix in _RESAMPLERS:
        if name.startswith(prefix + _LEVEL):
            return prefix + name.removeprefix(prefix + _LEVEL)
    return name


def parameter_to_unified_io2(name: str) -> str:
    """Returns Unified-IO 2's name of one of our parameters."""
    for ours, theirs in _SHARED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for prefix in _RESAMPLERS:
        if name.startswith(prefix):
            return prefix + _LEVEL + name.removeprefix(prefix)
    return name
