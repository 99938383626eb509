"""The pretraining mixture is made of the corpora that have Tasks, and says which have none."""

from __future__ import annotations

import pytest
import seqio
import tensorflow as tf
from absl import logging

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.tf.features import text_feature
from vishwam_t5x.objectives.features import feature_roles
from vishwam_t5x_tasks import unified_io2_pretraining as pretraining


def test_shares_are_those_of_a_whole():
    names = [corpus.name for corpus in pretraining.CORPORA]
    assert len(set(names)) == len(names)
    assert sum(corpus.share for corpus in pretraining.CORPORA) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("corpus", pretraining.CORPORA, ids=lambda corpus: corpus.name)
def test_the_mixture_of_denoisers_knows_what_to_do_with_each(corpus):
    found = feature_roles(corpus.features, ("text", "image", "image_history", "audio",
                                            "audio_history"), ("text", "image"))
    assert not found.supervised and "text" in found.targets


def test_corpora_are_chosen_by_the_tasks_there_are(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *words: said.append(text % words))
    found = pretraining.chosen({"c4", "cc12m", "another"})
    assert [corpus.name for corpus in found] == ["c4", "cc12m"]
    assert "laion_400m" in said[0] and "c4," not in said[0]
    assert [c.name for c in pretraining.chosen({"c4", "cc12m"}, " cc12m")] == ["cc12m"]
    with pytest.raises(UserError, match="no Task gives") as caught:
        pretraining.chosen({"c4"}, "c4,arxiv")
    assert caught.value.got == "arxiv" and "my_corpora" in caught.value.fix
    with pytest.raises(UserError, match="unknown corpus"):
        pretraining.chosen({"c4"}, "c5")
    with pytest.raises(UserError, match="has no corpus"):
        pretraining.chosen(set())


def test_the_mixture_has_their_rates_and_checks_their_features():
    vocabulary = seqio.ByteVocabulary()
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({"text": ["a"]}),
        splits=("train",))
    try:
        seqio.TaskRegistry.add("wikipedia", source, preprocessors=[],
                               output_features={"text": text_feature(vocabulary)})
        assert [corpus.name for corpus in pretraining.register()] == ["wikipedia"]
        mixture = seqio.MixtureRegistry.get(pretraining.NAME)
        assert mixture.get_rate(mixture.tasks[0]) == pytest.approx(0.04 / 3)
        with pytest.raises(UserError, match="lacks features") as caught:
            pretraining.check_features([pretraining.Corpus("wikipedia", ("text", "image"), 1.0)])
        assert caught.value.fix == "add image"
    finally:
        seqio.MixtureRegistry.remove(pretraining.NAME)
        seqio.TaskRegistry.remove("wikipedia")
