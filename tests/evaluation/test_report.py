"""The page's parts follow from the samples, and its numbers from the metrics."""

from __future__ import annotations

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation import page, report
from vishwam_t5x.evaluation.evaluator import Sample, TaskResult
from vishwam_t5x.evaluation.predictions import Prediction


def sample(inputs, prediction, target, output=None, **clean):
    line = Prediction("t", 0, inputs, {}, target, prediction, -1.0)
    return Sample(clean, line, target, prediction if output is None else output)


PICTURE = np.ones((4, 4, 1), np.float32)
RESULTS = [
    TaskResult("quick_caption", {"loss": 1.0, "loss/text": 1.0, "exact_match": 0.5,
                                 "num_examples": 3, "note": "text"}, [],
               [sample("[Text] [S] what", "a one", "a two", image_inputs=PICTURE)] * 3),
    TaskResult("quick_draw", {"recognised": 0.25}, [],
               [sample("[Image] [S] draw a three", np.arange(4), 3, output=PICTURE)] * 2),
    TaskResult("quick_tone", {}, [],
               [sample("[Text] [S] hear", "one", "one", audio_inputs=np.ones((8, 4)))]),
    TaskResult("quick_text", {"loss/text": 3.1, "cross_entropy/text": 3.0, "unigram/text": 5.0},
               [], [sample("[Text] [R] x <extra_id_0>", "<extra_id_0> y", "<extra_id_0> z")] * 8),
    TaskResult("quick_codes", {}, [], [sample("[Image] [R]", np.arange(4), np.arange(4))]),
]


def test_each_task_is_shown_as_what_it_is(tmp_path):
    curves = tmp_path / "metrics.jsonl"
    curves.write_text('{"step": 1, "loss/text": 4.0}\n')
    figures, caption, draw, tone, text, training = report.sections(
        RESULTS, report.PageConfig(num_samples=8), curves)
    assert figures.values == {"caption exact match": 0.5, "draw recognised": 0.25,
                              "text: loss": 3.0, "text: unigram": 5.0}
    assert isinstance(caption, page.Captioned) and caption.expected == ["a two"] * 3
    assert caption.kind == "image" and tone.kind == "spectrogram" and tone.said == ["one"]
    assert draw.asked == ["draw a three"] * 2 and draw.said == ["3"] * 2
    assert isinstance(text, page.Texts) and len(text.rows) == 2
    assert training.levels == {"unigram model, text": 5.0}


def test_only_the_tasks_named_in_their_order(tmp_path):
    config = report.PageConfig(tasks=("quick_tone", "quick_caption"))
    _, first, second = report.sections(RESULTS, config, tmp_path / "none.jsonl")
    assert (first.title, second.title) == ("quick tone", "quick caption")
    with pytest.raises(UserError, match="is not evaluated"):
        report.sections(RESULTS, report.PageConfig(tasks=("quick",)), None)


def test_a_page_is_written_only_if_there_is_something_to_show(tmp_path):
    assert report.write(tmp_path / "a.png", "t", [TaskResult("t", {})], report.PageConfig(), None,
                        "") is None
    path = report.write(tmp_path / "a.png", "t", RESULTS, report.PageConfig(), None, "sub")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_stays_in_the_model_directory():
    for file in ("a.jpg", "../a.png", "deep/a.png"):
        with pytest.raises(UserError, match="PNG file in MODEL_DIR"):
            report.PageConfig(file=file)
