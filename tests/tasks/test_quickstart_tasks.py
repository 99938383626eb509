"""The registered Tasks and the Mixture, read through SeqIO itself."""

from __future__ import annotations

import importlib
import pickle

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x_tasks import quickstart_sources as sources

FEATURES = {
    "quickstart_text_denoise": {"text": (1, "int32")},
    "quickstart_image_to_text": {"image_inputs": (3, "float32"), "text_inputs": (1, "int32"),
                                 "text_targets": (1, "int32"), "meta_digit": (0, "int32")},
    "quickstart_text_to_image": {"text_inputs": (1, "int32"), "image_targets": (3, "float32"),
                                 "image_target_codes": (1, "int32"), "meta_digit": (0, "int32")},
    "quickstart_audio_to_text": {"audio_inputs": (2, "float32"), "text_inputs": (1, "int32"),
                                 "text_targets": (1, "int32"), "meta_digit": (0, "int32")},
    "quickstart_image_text_denoise": {"image": (3, "float32"), "image_codes": (1, "int32"),
                                      "text": (1, "int32"), "meta_digit": (0, "int32")},
    "quickstart_codes_to_text": {"image_inputs": (3, "float32"), "image_input_codes": (1, "int32"),
                                 "text_inputs": (1, "int32"), "text_targets": (1, "int32"),
                                 "meta_digit": (0, "int32")},
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "not_made_yet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISHWAM_CACHE_DIR", str(cache))
        module = importlib.import_module("vishwam_t5x_tasks.quickstart")
        assert not cache.exists(), "registering the tasks must fit and write nothing"
        yield module


@pytest.fixture(scope="module")
def seqio(quickstart):
    return importlib.import_module("seqio")


def examples(seqio, name, split):
    dataset = seqio.TaskRegistry.get(name).get_dataset(split=split, shuffle=False)
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize("name", FEATURES)
def test_examples_have_the_features_the_objective_expects(quickstart, seqio, name):
    task = seqio.TaskRegistry.get(name)
    assert sorted(task.splits) == sorted(sources.SPLITS)
    for split in ("validation", "test"):
        found = examples(seqio, name, split)
        for example in found:
            assert {key: (value.ndim, value.dtype.name)
                    for key, value in example.items()} == FEATURES[name]
            for key, value in example.items():
                if key.startswith("text"):
                    # Neither padding, end nor unknown; only pieces of the vocabulary.
                    assert value.min() > 2 and value.max() < 1024
                if key.startswith("image") and value.ndim == 1:
                    assert value.shape == (16,) and 0 <= value.min() and value.max() < 64
        expected = task.num_input_examples(split)
        assert expected is None or len(found) == expected


def test_a_picture_is_named_in_its_question(quickstart, seqio):
    for example in examples(seqio, "quickstart_image_in_text", "test"):
        token = quickstart.WITH_IMAGE_TOKEN.layout.token("<image_input>")
        assert (example["text_inputs"] == token).sum() == 1 and token == 1056
        assert example["text_targets"].max() < 1024


def test_declared_numbers_of_examples_are_right(seqio):
    for name in FEATURES:
        declared = seqio.TaskRegistry.get(name).num_input_examples("train")
        if name == "quickstart_text_denoise":
            assert declared is None
        elif name == "quickstart_audio_to_text":
            assert declared == sources.NUM_TONES["train"]
        else:
            assert declared == len(sources.digits("train")[1])


def test_text_is_cut_without_loss(quickstart, seqio):
    for split in ("validation", "test"):
        pieces = [example["text"] for example in examples(seqio, "quickstart_text_denoise", split)]
        assert max(map(len, pieces)) <= quickstart.MAX_TEXT_TOKENS
        whole = [quickstart.VOCABULARY.encode(passage) for passage in sources.passages(split)]
        # tf_text and SentencePiece break ties of equal scores differently ("** ****"), so it is the
        # text and the number of tokens that must agree.
        assert sum(map(len, pieces)) == sum(map(len, whole))
        decode = quickstart.VOCABULARY.decode
        assert decode(np.concatenate(pieces).tolist()) == decode(np.concatenate(whole).tolist())


def test_captions_say_the_digit(quickstart, seqio):
    for name in ("quickstart_image_to_text", "quickstart_audio_to_text"):
        for example in examples(seqio, name, "test")[:30]:
            said = quickstart.VOCABULARY.decode(example["text_targets"].tolist())
            assert said == sources.caption(int(example["meta_digit"]))
    for example in examples(seqio, "quickstart_text_to_image", "test")[:30]:
        request = quickstart.VOCABULARY.decode(example["text_inputs"].tolist())
        assert sources.DIGIT_NAMES[int(example["meta_digit"])] in request.split()


def test_codes_are_those_of_the_pixels(quickstart, seqio):
    for name, pixels, codes in (("quickstart_text_to_image", "image_targets",
                                 "image_target_codes"),
                                ("quickstart_image_text_denoise", "image", "image_codes")):
        found = examples(seqio, name, "test")
        expected = quickstart.fitted.codebook().encode(np.stack([e[pixels] for e in found]))
        np.testing.assert_array_equal(np.stack([e[codes] for e in found]), expected)


def test_reading_twice_gives_the_same(seqio):
    for name in FEATURES:
        for first, second in zip(examples(seqio, name, "validation"),
                                 examples(seqio, name, "validation"), strict=True):
            for key in first:
                np.testing.assert_array_equal(first[key], second[key])


def test_metadata_can_be_used_without_seqio(quickstart, seqio, run_python):
    import json

    for name in FEATURES:
        metadata = quickstart.task_metadata(name)
        assert json.loads(json.dumps(metadata))["vocabulary"]["size"] == 1024
        assert ("codebook" in metadata) == any("codes" in key for key in FEATURES[name])
    assert quickstart.task_metadata("quickstart_audio_to_text")["patch_sizes"] == {"audio": (8, 8)}
    names = [address for name in FEATURES for address in (
        *quickstart.task_metadata(name)["metric_fns"],
        quickstart.task_metadata(name)["postprocess_fn"]) if address]
    assert len(names) == 8
    run_python(f"""
        import importlib, sys
        for address in {names!r}:
            module, function = address.split(":")
            assert callable(getattr(importlib.import_module(module), function)), address
        assert not {{"tensorflow", "seqio"}} & set(sys.modules)
    """)
    with pytest.raises(UserError, match="not a Task"):
        quickstart.task_metadata("quickstart")


def test_every_module_describes_its_own_tasks_only(quickstart, seqio, monkeypatch):
    from vishwam_t5x.data.tf import examples

    modules = examples.import_task_modules(())
    found = examples.task_metadata(modules, "quickstart_text_to_image")
    assert found == quickstart.task_metadata("quickstart_text_to_image")
    monkeypatch.setenv("VISHWAM_SPOKEN_DIGITS", "/here")
    found = examples.task_metadata(modules, "spoken_digits")
    assert found["folder"] == "/here" and found["patch_sizes"] == {"audio": (4, 40)}
    assert found["postprocess_fn"] == "vishwam_t5x_tasks.quickstart_metrics:caption_text"


def test_the_mixture_streams_all_tasks_at_their_rates(quickstart, seqio):
    mixture = seqio.MixtureRegistry.get("quickstart")
    assert [task.name for task in mixture.tasks] == sorted(quickstart.RATES)
    assert sum(mixture.get_rate(task) for task in mixture.tasks) == pytest.approx(1.0)
    assert not any(feature.required for feature in mixture.output_features.values())
    dataset = mixture.get_dataset(split="validation", shuffle=False, seed=0, num_epochs=None)
    seen = dict.fromkeys(quickstart.RATES, 0)
    for example in dataset.take(600).as_numpy_iterator():
        present = {key for key, value in example.items() if value.size}
        names = [name for name, features in FEATURES.items()
                 if present == {key for key in features if not key.startswith("meta_")}]
        assert len(names) == 1, present
        seen[names[0]] += 1
    for name, rate in quickstart.RATES.items():
        assert abs(seen[name] / 600 - rate) < 0.07, seen


def test_a_mixture_of_disagreeing_tasks_is_refused(quickstart, seqio):
    from vishwam_t5x.data.tf import features
    from vishwam_t5x.data.tf.multimodal_mixture import MultimodalMixture

    def task(name, feature):
        source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=("train",))
        return seqio.Task(name, source, {"text": feature})

    same = task("a", features.text_feature(quickstart.VOCABULARY))
    other = task("b", features.codes_feature(64))
    with pytest.raises(UserError, match="disagree about feature 'text'"):
        MultimodalMixture("mixed", [same, other], default_rate=1.0)


def test_the_vocabulary_is_lazy_and_picklable(quickstart, seqio, tmp_path):
    from vishwam_t5x.data.tf.text import LazyVocabulary

    calls = []
    lazy = LazyVocabulary(lambda: calls.append(1) or quickstart.VOCABULARY.model_file)
    assert (lazy.eos_id, lazy.unk_id, lazy.pad_id) == (1, 2, 0) and not calls
    assert lazy.vocab_size == 1024 and calls == [1]
    copy = pickle.loads(pickle.dumps(quickstart.VOCABULARY))
    assert copy == quickstart.VOCABULARY and hash(copy) == hash(quickstart.VOCABULARY)
    assert copy.encode("the digit two") == quickstart.VOCABULARY.encode("the digit two")
    assert lazy != quickstart.VOCABULARY
    assert lazy.encode_tf("the digit two").numpy().tolist() == lazy.encode("the digit two")


def test_the_serving_tokenizer_agrees_with_seqio(quickstart, seqio):
    from vishwam_t5x.serving.tokenizer import Tokenizer

    tokenizer = Tokenizer(quickstart.VOCABULARY.model_file)
    for example in examples(seqio, "quickstart_text_denoise", "test"):
        text = quickstart.VOCABULARY.decode(example["text"].tolist())
        assert tokenizer.decode(example["text"]) == text
    for passage in sources.passages("test"):
        assert tokenizer.encode(passage).tolist() == list(quickstart.VOCABULARY.encode(passage))


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 20, 21, 22])
def test_split_evenly(quickstart, length):
    import tensorflow as tf

    from vishwam_t5x.data.tf.text import split_evenly

    tokens = np.arange(length, dtype=np.int32)
    dataset = tf.data.Dataset.from_tensors({"text": tokens, "meta_id": np.int32(9)})
    pieces = list(split_evenly(dataset, "text", 7).as_numpy_iterator())
    sizes = [len(piece["text"]) for piece in pieces]
    assert len(pieces) == -(-length // 7)
    assert np.array_equal(np.concatenate([[], *[piece["text"] for piece in pieces]]), tokens)
    assert not sizes or (max(sizes) <= 7 and max(sizes) - min(sizes) <= 1)
    assert all(piece["meta_id"] == 9 for piece in pieces)
    with pytest.raises(UserError, match="positive"):
        split_evenly(dataset, "text", 0)


def test_rename(quickstart):
    import tensorflow as tf

    from vishwam_t5x.data.tf.text import rename

    dataset = tf.data.Dataset.from_tensors({"inputs": 1, "kept": 2})
    assert next(rename(dataset, {"inputs": "text_inputs"}).as_numpy_iterator()) == {
        "text_inputs": 1, "kept": 2}
    with pytest.raises(UserError, match="lack"):
        rename(dataset, {"input": "text_inputs"})


def test_features_refuse_what_cannot_be(quickstart):
    import tensorflow as tf

    from vishwam_t5x.data.tf import features

    assert features.image_feature(tf.uint8).dtype == tf.uint8
    with pytest.raises(UserError, match="uint8"):
        features.image_feature(tf.float16)
    with pytest.raises(UserError, match="at least one code"):
        features.codes_feature(0)
