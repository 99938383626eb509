"""Names of parameters in Unified-IO 2's checkpoints (arXiv 2312.17172), and ours.

The original names a transformer that two inputs share after the input that is built first, so that
a model without that input cannot find it in a full checkpoint. Ours has a name of its own. All else
is called alike, but for one level that ours lacks. Names are without 'target/' and 'params/'.
"""

from __future__ import annotations

_SHARED = {
    "image_transformer/": "input_image_encoder/image_encoder/vision_transformer/",
    "audio_transformer/": "input_audio_encoder/image_encoder/vision_transformer/",
}
_ALONE = {
    "image_transformer/": "input_encoders_image_history/vit_image_encoder/vision_transformer/",
}
"""Where the original keeps it in models without the image input: read, never written."""

_RESAMPLERS = tuple(f"input_encoders_{modality}_history/resampler/"
                    for modality in ("image", "audio"))
_LEVEL = "PerceiverResampler_0/"


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
