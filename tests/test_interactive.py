"""The model of a notebook: what it says is what the verbs say, and it learns what it is shown."""

from __future__ import annotations

import dataclasses
import doctest
import json
import pathlib
import shutil

import pytest
from evaluation import small_model, small_run

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.predictions import read_lines
from vishwam_t5x.infer import infer
from vishwam_t5x.interactive import InteractiveModel, _text_of_tasks
from vishwam_t5x.objectives.text_to_text import TextToText
from vishwam_t5x.training.run_dir import RunDir

GIN = """
include 'gin/runs/pretrain.gin'
include 'gin/optimizers/adafactor.gin'
TRAIN_STEPS = 10
"""
TEXTS = ["what is this", "draw a one two"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(gin file, cache directory, MODEL_DIR)."""
    folder = tmp_path_factory.mktemp("run")
    module = small_model.model()
    cache_dir, model_dir = small_run.write(folder, module, small_model.params(module))
    gin_file = folder / "tiny.gin"
    gin_file.write_text(f"{GIN}{small_run.GIN}\nVOCABULARY_PATH = '{cache_dir}/text.model'\n"
                        "config.EncoderDecoderConfig.dropout_rate = %DROPOUT_RATE\n"
                        f"CACHE_DIR = '{cache_dir}'\nMODEL_DIR = '{model_dir}'\n")
    return str(gin_file), cache_dir, model_dir


@pytest.fixture(scope="module")
def asked(run):
    gin_file, _, model_dir = run
    return InteractiveModel.from_gin([gin_file], {"DECODE_BATCH_SIZE": 2,
                                                  "INITIAL_CHECKPOINT_PATH": model_dir})


def test_it_says_what_the_verb_says(run, asked, tmp_path, monkeypatch):
    _, cache_dir, model_dir = run
    monkeypatch.setenv("VISHWAM_CACHE_DIR", cache_dir)
    (tmp_path / "in.jsonl").write_text("".join(
        json.dumps({"text": text, "target": "one two"}) + "\n" for text in TEXTS))
    for mode in ("predict_with_aux", "score"):
        infer(asked._ready.model, model_dir, small_model.objective(),
              small_model.dataset_config(cache_dir=cache_dir), mode=mode,
              input_file=str(tmp_path / "in.jsonl"), output_file=str(tmp_path / f"{mode}.jsonl"),
              decoding=asked._ready.generator._configs, vocabulary=f"{cache_dir}/text.model")
    lines = list(read_lines(tmp_path / "predict_with_aux.jsonl"))
    assert asked.predict(TEXTS) == [line["prediction"] for line in lines]
    predictions, aux = asked.predict_with_aux([{"text": text} for text in TEXTS])
    assert predictions == [line["prediction"] for line in lines]
    for name in ("scores", "token_scores"):
        for mine, line in zip(aux[name], lines, strict=True):
            assert mine == pytest.approx(line["aux"][name], rel=1e-5)
    scores = [line["score"] for line in read_lines(tmp_path / "score.jsonl")]
    assert asked.score(TEXTS, ["one two"] * 2) == pytest.approx(scores, rel=1e-5)
    judged = asked.evaluate([{"inputs": text, "targets": "one"} for text in TEXTS],
                            [lambda targets, predictions: {
                                "right": sum(map(str.__eq__, targets, predictions)),
                                "seen": len(predictions)}])
    assert judged == {"seen": 2, "right": sum(text == "one" for text in predictions)}


def test_it_chooses_what_the_verb_chooses(run, asked, tmp_path, monkeypatch):
    _, cache_dir, model_dir = run
    monkeypatch.setenv("VISHWAM_CACHE_DIR", cache_dir)
    options = ["one two", "seven"]
    asking = [{"text": text, "options": options} for text in TEXTS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asking))
    infer(asked._ready.model, model_dir, small_model.objective(),
          small_model.dataset_config(cache_dir=cache_dir), input_file=str(tmp_path / "in.jsonl"),
          output_file=str(tmp_path / "out.jsonl"), vocabulary=f"{cache_dir}/text.model")
    lines = list(read_lines(tmp_path / "out.jsonl"))
    best, scores = asked.choose(asking)
    assert best == [line["prediction"] for line in lines] == asked.predict(asking)
    for row, line in enumerate(lines):
        each = [asked.score([TEXTS[row]], [option])[0] for option in options]
        assert list(line["scores"]) == options
        assert list(line["scores"].values()) == pytest.approx(each, rel=1e-4)
        assert list(scores[row].values()) == pytest.approx(each, rel=1e-4)
        assert line["score"] == pytest.approx(max(each), rel=1e-4)
    with pytest.raises(UserError, match="no options"):
        asked.choose(TEXTS)
    with pytest.raises(UserError, match="to be scored"):
        asked.score(asking, ["one"] * 2)


def test_t5_s_text_gets_its_end(asked, monkeypatch):
    monkeypatch.setattr(asked, "_ready", dataclasses.replace(
        asked._ready, objective=TextToText(6, 4)))
    request, = asked._requests([{"inputs": "one two", "targets": "one"}], "text", True)
    one, two = asked._codec.encode("one"), asked._codec.encode("one two")
    assert request.inputs["inputs/text/tokens"].tolist() == [*two, 1]
    assert request.targets["targets/text/targets"].tolist() == [*one, 1]
    with pytest.raises(UserError, match="example 1: the target is too long"):
        asked.train_step([{"text": "one", "target": text} for text in ("one", "one " * 9)])


def test_a_checkpoint_is_neither_replaced_nor_written_beside_a_run(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "_output_dir", str(tmp_path))
    under_way = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    under_way.mkdir(parents=True)
    with RunDir.open(tmp_path).held(0.0), pytest.raises(UserError, match="another process"):
        asked.save_checkpoint()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [under_way.name]
    saved = asked.save_checkpoint()
    assert pathlib.Path(saved).name == "0" and under_way.exists()
    before = (tmp_path / "checkpoints" / "0" / "manifest.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="there is a checkpoint of step 0(.|\n)*runs/another"):
        asked.save_checkpoint()
    (tmp_path / "checkpoints" / "9").mkdir()  # newer: restoring an older one leaves it where it is
    asked.restore(saved)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "0", "5.orbax-checkpoint-tmp", "9"]
    assert (tmp_path / "checkpoints" / "0" / "manifest.json").stat().st_mtime_ns == before


def test_a_checkpoint_of_another_vocabulary_than_the_tasks_is_refused(run, asked, tmp_path,
                                                                      monkeypatch):
    checkpoint = tmp_path / "checkpoints" / "7"
    shutil.copytree(pathlib.Path(run[2]) / "checkpoints" / "7", checkpoint)
    (tmp_path / "data.json").write_text('{"captions": {"vocabulary": "34"}}')
    config = small_model.dataset_config(mixture_or_task_name=small_run.MIXTURE, split="train",
                                        cache_dir=run[1])
    given = _text_of_tasks(config, small_model.objective())
    monkeypatch.setattr(asked, "_tasks", given["tasks"])
    monkeypatch.setattr(asked, "_vocabulary", None)
    with pytest.raises(UserError, match="the vocabulary of task .* is not the checkpoint's"):
        asked.restore(str(checkpoint))


def test_mistakes_name_the_example(asked):
    with pytest.raises(UserError, match="example 1: the text is too long"):
        asked.predict(["one", "one " * 60])
    with pytest.raises(UserError, match='example 0: there is no "target" to score'):
        asked.score(["one"])
    with pytest.raises(UserError, match="nobody reads: 'txt'"):
        asked.predict([{"txt": "one"}])
    with pytest.raises(UserError, match="a list of examples"):
        asked.predict("one")
    with pytest.raises(UserError, match="takes one batch"):
        asked.train_step([{"text": "one", "target": "two"}] * 3)


def test_the_example_of_the_docstring_and_going_on(run, tmp_path):
    """Learns the examples it is given; saved and restored, it goes on as if it had not been."""
    names = {"InteractiveModel": InteractiveModel, "RECIPE": run[0], "FOLDER": str(tmp_path)}
    example = doctest.DocTestFinder().find(InteractiveModel, "InteractiveModel", globs=names)[0]
    failed = doctest.DocTestRunner().run(example, clear_globs=False)
    assert failed.failed == 0 and failed.attempted > 5
    model, examples = example.globs["model"], example.globs["examples"]
    again = InteractiveModel.from_gin([run[0]], {"BATCH_SIZE": 4}, output_dir=str(tmp_path))
    assert again.step == 3 and pathlib.Path(example.globs["path"]).name == "3"
    assert again.score(examples) == model.score(examples)
    assert again.train_step(examples) == model.train_step(examples)
    assert again.score(examples) == model.score(examples)

