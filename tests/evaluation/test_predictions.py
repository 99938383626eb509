"""Predictions are one JSON object a line, and tables show numbers only."""

from __future__ import annotations

import json

import numpy as np

from vishwam_t5x.evaluation import predictions


def test_a_line_is_plain_json(tmp_path):
    line = predictions.Prediction(
        "task/a", 7, "[Text] [S] was ist das?", {"text": 6, "image": 16}, np.array([1, 2]),
        {"text": "sieben", "image": np.array([3], np.int32)}, float("-inf"),
        {"file": "x.png"}).to_json()
    path = predictions.write_lines(tmp_path / "deep" / predictions.file_name("task/a"), [line])
    assert path.name == "predictions-task_a.jsonl"
    assert list(predictions.read_lines(path)) == [json.loads(line)]
    assert json.loads(line) == {
        "task": "task/a", "example": 7, "inputs": "[Text] [S] was ist das?",
        "input_slots": {"text": 6, "image": 16}, "target": [1, 2],
        "prediction": {"text": "sieben", "image": [3]}, "score": "-inf", "file": "x.png"}


def test_table_names_a_task_once():
    text = predictions.table([{"task": "a", "loss": 1.23456, "n": 3, "none": None},
                              {"task": "bb", "loss": 2.0}])
    assert text.splitlines() == ["a   loss  1.235", "    n     3", "bb  loss  2"]
