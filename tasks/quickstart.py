"""The quickstart: five small Tasks on real input, and their Mixture `quickstart`; and two Tasks
and Mixtures for models that bring pictures and text together in other ways.

Importing this module registers them with SeqIO; nothing is read or fitted until a Task is used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.tf.features import (
    audio_feature,
    codes_feature,
    image_feature,
    text_feature,
)
from vishwam_t5x.data.tf.multimodal_mixture import MultimodalMixture
from vishwam_t5x.data.tf.special_tokens import SpecialTokens
from vishwam_t5x.data.tf.text import LazyVocabulary, split_evenly
from vishwam_t5x.evaluation.metrics.text import exact_match
from vishwam_t5x_tasks import quickstart_fitted as fitted
from vishwam_t5x_tasks import quickstart_metrics as metrics
from vishwam_t5x_tasks import quickstart_sources as sources

MAX_TEXT_TOKENS = 64
"""Passages are cut into pieces of at most this many tokens."""
IMAGE_PATCH = (2, 2)
AUDIO_PATCH = (8, 8)
RATES = {
    "quickstart_text_denoise": 0.20,
    "quickstart_image_to_text": 0.35,
    "quickstart_text_to_image": 0.25,
    "quickstart_audio_to_text": 0.10,
    "quickstart_image_text_denoise": 0.10,
}
_PATCHES = (("image", IMAGE_PATCH), ("audio", AUDIO_PATCH))
VOCABULARY = LazyVocabulary(fitted.vocabulary_path)
WITH_IMAGE_TOKEN = SpecialTokens(VOCABULARY, num_sentinels=32, num_location_bins=0, num_history=0)
"""The same pieces, with the extra tokens of the quickstart's `VocabularyLayout`."""
_OTHERS = ("quickstart_codes_to_text", "quickstart_image_in_text")


def _passages(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # one in-memory source: there are no files to shuffle
    return tf.data.Dataset.from_tensor_slices({"text": list(sources.passages(split))})


def _asked(questions: tuple[str, ...], split: str, labels: np.ndarray, purpose: str
           ) -> dict[str, Any]:
    """A question about each digit, and its answer."""
    return {"text_inputs": [sources.choose(questions, split, number, purpose)
                            for number in range(len(labels))],
            "text_targets": [sources.caption(digit) for digit in labels],
            "meta_digit": labels}


def _image_to_text(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    images, labels = sources.digits(split)
    return tf.data.Dataset.from_tensor_slices({
        "image_inputs": images,
        **_asked(sources.IMAGE_QUESTIONS, split, labels, "question"),
    })


def _text_to_image(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    images, labels = sources.digits(split)
    requests = [sources.choose(sources.DRAWING_REQUESTS, split, i, "request").format(
        sources.DIGIT_NAMES[digit]) for i, digit in enumerate(labels)]
    return tf.data.Dataset.from_tensor_slices({
        "text_inputs": requests,
        "image_targets": images,
        "image_target_codes": fitted.codebook().encode(images),
        "meta_digit": labels,
    })


def _audio_to_text(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    spectrograms, labels = sources.tones(split)
    return tf.data.Dataset.from_tensor_slices({
        "audio_inputs": spectrograms,
        **_asked(sources.AUDIO_QUESTIONS, split, labels, "audio question"),
    })


def _image_text(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    images, labels = sources.digits(split)
    return tf.data.Dataset.from_tensor_slices({
        "image": images,
        "image_codes": fitted.codebook().encode(images),
        "text": [sources.caption(digit) for digit in labels],
        "meta_digit": labels,
    })


def _codes_to_text(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    images, labels = sources.digits(split)
    return tf.data.Dataset.from_tensor_slices({
        "image_inputs": images,
        "image_input_codes": fitted.codebook().encode(images),
        **_asked(sources.IMAGE_QUESTIONS, split, labels, "question"),
    })


def _image_in_text(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    images, labels = sources.digits(split)
    return tf.data.Dataset.from_tensor_slices({
        "image_inputs": images,
        **_asked(sources.QUESTIONS_AROUND, split, labels, "question"),
    })


def _source(dataset_fn: Any, num_examples: dict[str, int] | None) -> seqio.FunctionDataSource:
    return seqio.FunctionDataSource(dataset_fn, splits=sources.SPLITS,
                                    num_input_examples=num_examples)


_NUM_DIGITS = {"train": 1438, "validation": 179, "test": 180}
_TOKENIZE = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)

seqio.TaskRegistry.add(
    "quickstart_text_denoise",
    source=_source(_passages, None),
    preprocessors=[
        _TOKENIZE,
        functools.partial(split_evenly, feature="text", max_length=MAX_TEXT_TOKENS),
    ],
    output_features={"text": text_feature(VOCABULARY)},
    metric_fns=[])

seqio.TaskRegistry.add(
    "quickstart_image_to_text",
    source=_source(_image_to_text, _NUM_DIGITS),
    preprocessors=[_TOKENIZE],
    output_features={"image_inputs": image_feature(), "text_inputs": text_feature(VOCABULARY),
                     "text_targets": text_feature(VOCABULARY)},
    postprocess_fn=metrics.caption_text,
    metric_fns=[exact_match])

seqio.TaskRegistry.add(
    "quickstart_text_to_image",
    source=_source(_text_to_image, _NUM_DIGITS),
    preprocessors=[_TOKENIZE],
    output_features={"text_inputs": text_feature(VOCABULARY), "image_targets": image_feature(),
                     "image_target_codes": codes_feature(fitted.NUM_CODES)},
    postprocess_fn=metrics.digit_image,
    metric_fns=[metrics.recognised])

seqio.TaskRegistry.add(
    "quickstart_audio_to_text",
    source=_source(_audio_to_text, sources.NUM_TONES),
    preprocessors=[_TOKENIZE],
    output_features={"audio_inputs": audio_feature(), "text_inputs": text_feature(VOCABULARY),
                     "text_targets": text_feature(VOCABULARY)},
    postprocess_fn=metrics.caption_text,
    metric_fns=[exact_match])

seqio.TaskRegistry.add(
    "quickstart_image_text_denoise",
    source=_source(_image_text, _NUM_DIGITS),
    preprocessors=[_TOKENIZE],
    output_features={"image": image_feature(), "image_codes": codes_feature(fitted.NUM_CODES),
                     "text": text_feature(VOCABULARY)},
    metric_fns=[])

# For models that bring pictures and text together in other ways, see gin/modalities/.
seqio.TaskRegistry.add(
    "quickstart_codes_to_text",
    source=_source(_codes_to_text, _NUM_DIGITS),
    preprocessors=[_TOKENIZE],
    output_features={"image_inputs": image_feature(),
                     "image_input_codes": codes_feature(fitted.NUM_CODES),
                     "text_inputs": text_feature(VOCABULARY),
                     "text_targets": text_feature(VOCABULARY)},
    postprocess_fn=metrics.caption_text,
    metric_fns=[exact_match])

seqio.TaskRegistry.add(
    "quickstart_image_in_text",
    source=_source(_image_in_text, _NUM_DIGITS),
    preprocessors=[_TOKENIZE],
    output_features={"image_inputs": image_feature(),
                     "text_inputs": text_feature(WITH_IMAGE_TOKEN),
                     "text_targets": text_feature(WITH_IMAGE_TOKEN)},
    postprocess_fn=metrics.caption_text,
    metric_fns=[exact_match])

seqio.MixtureRegistry.add("quickstart", list(RATES.items()), mixture_cls=MultimodalMixture)
seqio.MixtureRegistry.add(
    "quickstart_codes", [("quickstart_codes_to_text", 0.5), ("quickstart_text_to_image", 0.5)],
    mixture_cls=MultimodalMixture)
seqio.MixtureRegistry.add(
    "quickstart_images", [("quickstart_image_to_text", 0.5), ("quickstart_text_to_image", 0.5)],
    mixture_cls=MultimodalMixture)


def task_metadata(task_name: str) -> dict[str, Any]:
    """Returns what a cache's manifest records of a Task of this module beside its examples.

    Returns:
        As `remembered`; 'patch_sizes': (rows, columns) of a patch by modality; and, where codes
        occur, 'codebook': {'path', 'sha256', 'size', 'patch'} (fitted now if need be).

    Raises:
        UserError: the Task is not one of the quickstart's.
    """
    out = remembered(task_name, (*RATES, *_OTHERS))
    names = seqio.TaskRegistry.get(task_name).output_features
    if any(name.endswith("_codes") for name in names):
        out["codebook"] = {**fitted.describe(fitted.codebook_path()), "patch": fitted.PATCH}
    modalities = {name.split("_")[0] for name in names}
    out["patch_sizes"] = {modality: size for modality, size in _PATCHES if modality in modalities}
    return out


def remembered(task_name: str, own: Sequence[str]) -> dict[str, Any]:
    """Returns what a manifest records of any Task that has the quickstart's vocabulary.

    Args:
        task_name: of the Task.
        own: names of the Tasks of the module that is asked.

    Returns:
        'vocabulary': {'path', 'sha256', 'size'} (fitted now if need be); 'metric_fns' and
        'postprocess_fn' as 'module:name', importable without TensorFlow.

    Raises:
        UserError: the Task is not the module's own.
    """
    if task_name not in own:
        raise UserError("this is not a Task of the module", got=task_name,
                        fix="one of: " + ", ".join(own))
    task = seqio.TaskRegistry.get(task_name)
    return {"vocabulary": fitted.describe(fitted.vocabulary_path()),
            "metric_fns": [_address(fn) for fn in task.metric_fns],
            "postprocess_fn": _address(task.postprocessor) if task.postprocessor else None}


def _address(function: Any) -> str:
    return f"{function.__module__}:{function.__qualname__}"
