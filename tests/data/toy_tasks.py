"""SeqIO Tasks for the tests of `vishwam cache`: run in a process of its own, never by pytest."""

from __future__ import annotations

import functools
import os

import numpy as np
import seqio
import tensorflow as tf

from vishwam_t5x.data.tf.features import image_feature
from vishwam_t5x.data.tf.multimodal_mixture import MultimodalMixture

NUMBERS = seqio.PassThroughVocabulary(1000)
TOKENS = seqio.Feature(NUMBERS, add_eos=False, dtype=tf.int32)


def _squares(split, shuffle_files, seed=None):
    count = {"train": 40, "test": 7}[split]

    def generate():
        for number in range(count):
            image = np.full((4, 4, 1), number / 100, np.float32)
            if split == "train" and number == 5:
                image[0, 0] = np.nan
            if split == "train" and number == 9:
                image[0, 0] = 200.0
            tokens = np.arange(number % 5 + 1, dtype=np.int32) + number
            if split == "train" and number == 11:
                tokens[0] = -4
            yield {"image_inputs": image, "text_targets": tokens, "meta_name": f"square {number}",
                   "surplus": number}

    return tf.data.Dataset.from_generator(generate, output_signature={
        "image_inputs": tf.TensorSpec((4, 4, 1), tf.float32),
        "text_targets": tf.TensorSpec((None,), tf.int32),
        "meta_name": tf.TensorSpec((), tf.string), "surplus": tf.TensorSpec((), tf.int32)})


seqio.TaskRegistry.add(
    "toy_squares", source=seqio.FunctionDataSource(_squares, splits=("train", "test")),
    preprocessors=[], output_features={"image_inputs": image_feature(), "text_targets": TOKENS},
    metric_fns=[])


def _numbers(dataset):
    @seqio.map_over_dataset
    def parse(line):
        return {"text": tf.strings.to_number(tf.strings.split(line), tf.int32)}
    return parse(dataset)


def _with_noise(dataset):
    @seqio.map_over_dataset(num_seeds=1)
    def add(example, seed):
        noise = tf.random.stateless_uniform([1], seed, 0, 1000, tf.int32)
        return {"text": tf.concat([example["text"], noise], 0)}
    return add(dataset)


# Three files: a source that can be read in parts. The test writes them.
_FILES = os.path.join(os.environ.get("TOY_FILES", "."), "lines-*.txt")
seqio.TaskRegistry.add(
    "toy_lines", source=seqio.TextLineDataSource({"train": _FILES}),
    preprocessors=[_numbers, _with_noise], output_features={"text": TOKENS}, metric_fns=[])


def _cut_for_rows(dataset, sequence_length):
    """As T5's span_corruption does: it makes pieces that fill a row of the given lengths."""
    length = sequence_length["inputs"]

    @seqio.map_over_dataset(num_seeds=1)
    def cut(example, seed):
        begin = tf.random.stateless_uniform([], seed, 0, 1000 - length, tf.int32)
        tokens = begin + tf.range(length)
        return {"inputs": tokens, "targets": tokens[:sequence_length["targets"]]}
    return cut(dataset)


seqio.TaskRegistry.add(
    "toy_rows", source=seqio.TextLineDataSource({"train": _FILES}),
    preprocessors=[_cut_for_rows], output_features={"inputs": TOKENS, "targets": TOKENS},
    metric_fns=[])


def _chunks(dataset, sequence_length=None):
    """As preprocessors of T5's do that can go without: pieces no longer than a row."""
    length = sequence_length["inputs"] if sequence_length else None
    return dataset.map(lambda example: {
        **example, "inputs": example["text"][:length], "targets": example["text"][:1]})


seqio.TaskRegistry.add(
    "toy_chunks", source=seqio.TextLineDataSource({"train": _FILES}),
    preprocessors=[_numbers, functools.partial(_chunks, sequence_length=None), _chunks,
                   seqio.preprocessors.append_eos_after_trim],
    output_features={"inputs": TOKENS, "targets": TOKENS}, metric_fns=[])


def _broken(split, shuffle_files, seed=None):
    dataset = tf.data.Dataset.range(10)
    return dataset.map(lambda number: {"text": tf.debugging.check_numerics(
        1.0 / tf.cast(6 - number, tf.float32), "no such number")[None]})


seqio.TaskRegistry.add(
    "toy_broken", source=seqio.FunctionDataSource(_broken, splits=("train",)),
    preprocessors=[seqio.map_over_dataset(
        lambda example: {"text": tf.cast(example["text"], tf.int32)})],
    output_features={"text": TOKENS}, metric_fns=[])

seqio.MixtureRegistry.add("toy", [("toy_squares", 2.0), ("toy_lines", lambda task: 0.5)],
                          mixture_cls=MultimodalMixture)

if "TOY_PLAIN_MIXTURE" in os.environ:
    seqio.MixtureRegistry.add("toy_plain", [("toy_squares", 2.0), ("toy_lines", 1.0)])


def task_metadata(name: str) -> dict:
    return {"written_by": "toy_tasks", "task": name}
