"""`vishwam evaluate` and `vishwam infer` on a tiny run, in process and as a user would."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import small_model, small_run
from PIL import Image

from helpers import ROOT, vishwam
from vishwam_t5x.core import distributed
from vishwam_t5x.core.errors import EXIT_USER_ERROR, UserError
from vishwam_t5x.data import fast_pictures
from vishwam_t5x.evaluate import evaluate
from vishwam_t5x.evaluation.generator import DecodingConfig
from vishwam_t5x.evaluation.loss_evaluator import LossEvaluator
from vishwam_t5x.evaluation.predictions import read_lines
from vishwam_t5x.evaluation.report import PageConfig
from vishwam_t5x.infer import infer
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.parallelism.mesh import make_mesh

SHORT = {"text": DecodingConfig(max_length=6)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(module, parameters, cache directory, MODEL_DIR)."""
    module = small_model.model()
    params = small_model.params(module)
    cache_dir, model_dir = small_run.write(tmp_path_factory.mktemp("run"), module, params)
    (pathlib.Path(model_dir) / "metrics.jsonl").write_text(
        '{"step": 1, "loss/text": 4.0}\n{"step": 2, "loss/text": 3.5}\n')
    return module, params, cache_dir, model_dir


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of compiled programs that these tests share; jax's own setting comes back."""
    before = (jax.config.jax_compilation_cache_dir,
              jax.config.jax_persistent_cache_min_compile_time_secs)
    yield str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture
def settings(run, compiled, monkeypatch):
    """Arguments that both verbs share."""
    module, _, cache_dir, model_dir = run
    # The verbs set it for the tasks' own code; it must not leak into other tests.
    monkeypatch.setenv("VISHWAM_CACHE_DIR", cache_dir)
    return {"model": module, "model_dir": model_dir, "objective": small_model.objective(),
            "dataset_cfg": small_model.dataset_config(
                mixture_or_task_name=small_run.MIXTURE, split="test", cache_dir=cache_dir),
            "decoding": SHORT, "decode_batch_size": 4, "compilation_cache_dir": compiled}


def alone_where_process_0_writes(monkeypatch):
    """Fails where what process 0 does alone would wait for the others."""
    agree, inside = distributed.refuse_together, []

    def refuse_together(name, *arguments):
        assert "evaluation written" not in inside, f"only process 0 would come to {name!r}"
        inside.append(name)
        agree(name, *arguments)
        inside.pop()

    monkeypatch.setattr(distributed, "refuse_together", refuse_together)


def test_evaluate_writes_metrics_predictions_and_a_page(run, settings, monkeypatch):
    module, params, cache_dir, model_dir = run
    alone_where_process_0_writes(monkeypatch)
    found = evaluate(**settings, page=PageConfig(num_samples=4, tasks=("drawings", "captions")))
    assert found.directory == pathlib.Path(model_dir) / "evaluation" / "7"
    rows = {row["task"]: row for row in read_lines(found.directory / "metrics.jsonl")}
    assert list(rows) == ["captions", "drawings", "texts", "(all tasks)"]
    assert {row["step"] for row in rows.values()} == {7}
    assert rows["captions"]["exact_match"] == 0.0 and rows["captions"]["num_examples"] == 6
    assert 0 < rows["drawings"]["brightness"] < 1
    loss = LossEvaluator(module, LossConfig(), small_model.objective(), settings["dataset_cfg"],
                         make_mesh())(params)
    assert rows["(all tasks)"]["loss/text"] == pytest.approx(loss["loss/text"])
    for task, modality in (("captions", "text"), ("drawings", "image"), ("texts", "text")):
        assert rows[task][f"loss/{modality}"] == pytest.approx(loss[f"loss/{task}/{modality}"])
    assert rows["(all tasks)"]["num_examples"] == 18

    lines = list(read_lines(found.directory / "predictions-drawings.jsonl"))
    assert [line["example"] for line in lines] == list(range(5))
    assert all(len(line["prediction"]) == 4 for line in lines)
    assert lines[0]["target"] == small_model.image_task(5).read(0)["image_target_codes"].tolist()
    assert lines[0]["inputs"].startswith("[Image] [S] ")
    assert len(list(read_lines(found.directory / "predictions-captions.jsonl"))) == 6
    # No metric looks at it: only the page's samples are written.
    assert len(list(read_lines(found.directory / "predictions-texts.jsonl"))) == 4
    assert found.page == pathlib.Path(model_dir) / "what_it_learned.png"
    with Image.open(found.page) as page:
        assert page.width > 1000 and page.height > 500
    assert "exact_match" in found.table()


def test_the_unigram_baseline_counts_the_training_targets(run, settings):
    found = evaluate(**settings, tasks=("texts",), split="test")
    metrics = found.results[0].metrics
    objective, counts = small_model.objective(), np.ones(128)
    for record in range(20):
        example = objective.apply(small_model.denoising_task(20).read(record), seed=0,
                                  example=record)
        np.add.at(counts, example["targets/text/targets"], 1)
    total, weight = 0.0, 0
    for record in range(7):
        example = objective.apply(small_model.denoising_task(7).read(record), seed=0,
                                  example=record)
        targets = example["targets/text/targets"]
        total, weight = total - np.log(counts / counts.sum())[targets].sum(), weight + len(targets)
    assert metrics["unigram/text"] == pytest.approx(total / weight)
    assert metrics["weight_sum/text"] == weight
    assert len(found.results) == 1
    other = evaluate(**settings, tasks=("drawings",), split="train")
    assert other.directory == found.directory / "train"
    assert other.results[0].metrics["num_examples"] == 20
    without = evaluate(**settings, tasks=("texts",), baseline_examples=0, page=PageConfig(
        tasks=("captions",)))
    assert "unigram/text" not in without.results[0].metrics
    assert without.page is None  # it would replace that of all tasks


@pytest.mark.parametrize(("change", "message"), [
    ({"tasks": ("caption",)}, "did you mean 'captions'"),
    ({"checkpoint_path": "8"}, "no checkpoint of step 8"),
    ({"checkpoint_path": "/nowhere"}, "nowhere"),
    ({"decoding": {"audio": DecodingConfig()}}, "target modality of this model"),
    ({"max_examples": 0}, "at least 1"),
    ({"page": PageConfig(tasks=("captoins",))}, "did you mean 'captions'"),
])
def test_mistakes_of_evaluate(settings, change, message):
    with pytest.raises(UserError, match=message):
        evaluate(**{**settings, **change})


def test_infer_predicts_a_split_and_writes_pictures(run, settings, tmp_path):
    output = tmp_path / "deep" / "out.jsonl"
    found = infer(**settings, output_file=str(output), decode_image=small_run.pixels)
    lines = list(read_lines(output))
    assert found.num_predictions == len(lines) == 18
    drawn = [line for line in lines if line["task"] == "drawings"]
    for line in drawn:
        with Image.open(output.with_name(line["picture"])) as image:
            expected = np.rint(small_run.pixels(np.array(line["prediction"])) * 255)
            assert np.array_equal(np.asarray(image), expected[..., 0])
    assert len({line["picture"] for line in drawn}) == 5
    # Those of another output in the same folder would have other names.
    assert all(line["picture"] == f"out-drawings-{line['example']}.png" for line in drawn)
    judged = evaluate(**settings).results[0].predictions
    assert [line["prediction"] for line in lines[:6]] == [line.prediction for line in judged]


def write_inputs(folder):
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"no picture")
    lines = [{"text": "what is this", "image": "a.png"}, {"text": "draw a one"}, {"txt": "x"},
             {"text": "one " * 60}, {"image": "broken.png"}, {"text": "x", "audio": "a.wav"},
             {"text": 3}, []]
    path = folder / "inputs.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), "", "{", json.dumps({"image": "a.png"})]))
    return path


def test_what_a_constraint_leaves_nothing_is_left_out_by_name(run, settings, tmp_path, caplog):
    """Drawings that begin as the first one does may not go on."""
    drawn = {"method": "sample", "temperature": 3.0}
    freely = {**settings, "decoding": {"image": DecodingConfig(**drawn)}}

    def first_codes(path):
        return {line["example"]: line["prediction"][0] for line in read_lines(path)}

    def constrained(bad):
        def allowed(tokens, position):
            goes_on = (tokens[:, 0] != bad + 2) | (position == 0)
            return jnp.broadcast_to(goes_on[:, None], (len(tokens), 18))
        return {**settings, "decoding": {"image": DecodingConfig(**drawn, allowed=allowed)}}

    infer(**freely, tasks=("drawings",), output_file=str(tmp_path / "all.jsonl"))
    free = first_codes(tmp_path / "all.jsonl")
    gone = {example for example, code in free.items() if code == free[0]}
    assert 0 < len(gone) < len(free) == 5
    found = infer(**constrained(free[0]), tasks=("drawings",),
                  output_file=str(tmp_path / "some.jsonl"))
    assert first_codes(tmp_path / "some.jsonl") == {
        example: code for example, code in free.items() if example not in gone}
    assert [why.split(": ")[0] for why in found.left_out] == [
        f"drawings record {example}" for example in sorted(gone)]
    assert all("DecodingConfig.allowed left nothing to write" in why for why in found.left_out)
    assert caplog.text.count("left out: drawings record") == len(gone)

    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in small_run.WORDS)
                    + json.dumps({"unknown": 1}))
    as_file = {"input_file": str(path), "target": "image", "decode_image": small_run.pixels}
    infer(**freely, **as_file, output_file=str(tmp_path / "free.jsonl"))
    free = first_codes(tmp_path / "free.jsonl")
    gone = [number for number, code in free.items() if code == free[1]]
    assert 0 < len(gone) < len(free)
    found = infer(**constrained(free[1]), **as_file, output_file=str(tmp_path / "rest.jsonl"))
    assert [bad.number for bad in found.bad_lines] == [*gone, len(small_run.WORDS) + 1]
    assert first_codes(tmp_path / "rest.jsonl").keys() == free.keys() - set(gone)


def test_infer_names_bad_lines_and_goes_on(run, settings, tmp_path):
    path = write_inputs(tmp_path)
    found = infer(**settings, input_file=str(path), output_file=str(tmp_path / "out.jsonl"))
    reasons = {bad.number: bad.why for bad in found.bad_lines}
    assert sorted(reasons) == [3, 4, 5, 6, 7, 8, 10]
    assert "unknown field 'txt'" in reasons[3] and "did you mean 'text'" in reasons[3]
    assert "too long" in reasons[4] and "at most 48" in reasons[4]
    assert "image cannot be read" in reasons[5] and "reads no audio" in reasons[6]
    assert "not a string" in reasons[7] and "not an object" in reasons[8]
    assert "not JSON" in reasons[10]
    lines = list(read_lines(tmp_path / "out.jsonl"))
    assert [line["example"] for line in lines] == [1, 2, 11]
    assert lines[0]["inputs"] == "[Text] [S] what is this" and lines[0]["image"] == "a.png"
    assert lines[0]["input_slots"]["image"] == 4 and lines[2]["inputs"] == "[Text] [S]"
    assert all(isinstance(line["prediction"], str) and line["score"] < 0 for line in lines)


def test_infer_draws_for_a_file(run, settings, tmp_path):
    path = write_inputs(tmp_path)
    found = infer(**settings, input_file=str(path), target="image",
                  output_file=str(tmp_path / "out.jsonl"), decode_image=small_run.pixels,
                  vocabulary=str(pathlib.Path(run[2]) / "text.model"))
    assert found.num_predictions == 3
    assert sorted(file.name for file in tmp_path.glob("out-*.png")) == [
        "out-1.png", "out-11.png", "out-2.png"]
    with pytest.raises(UserError, match="decode_image is not bound"):
        infer(**settings, input_file=str(path), target="image")
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="no line of .* can be used"):
        infer(**settings, input_file=str(tmp_path / "bad.jsonl"))
    with pytest.raises(UserError, match="file of inputs cannot be read"):
        infer(**settings, input_file=str(tmp_path / "none.jsonl"))


def test_infer_reads_pictures_as_the_run_has_read_them(settings, tmp_path, monkeypatch):
    def stop(generator, reader, decode, path):
        raise UserError(f"read {reader.resize}")

    monkeypatch.setattr(fast_pictures, "codecs", lambda: object())
    monkeypatch.setattr("vishwam_t5x.infer.LinesSource", stop)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    given = {**settings, "model_dir": str(tmp_path / "run"), "input_file": "lines.jsonl"}
    with pytest.raises(UserError, match="read exact"):
        infer(**given)
    (tmp_path / "run" / "data.json").write_text(json.dumps({"captions": {"conversions": {
        "image_inputs: decode_picture": {"config": {"resize": "fast"}}}}}))
    with pytest.raises(UserError, match="read fast"):
        infer(**given)


@pytest.fixture(scope="module")
def command(run, compiled, tmp_path_factory):
    """Runs a verb with the tiny run's gin file."""
    gin_file = tmp_path_factory.mktemp("gin") / "tiny.gin"
    gin_file.write_text(f"{small_run.GIN}\nCACHE_DIR = '{run[2]}'\nMODEL_DIR = '{run[3]}'\n")

    def call(verb, *arguments):
        return vishwam(verb, f"--gin_file={gin_file}", *arguments,
                       env={"PYTHONPATH": str(ROOT / "tests"),
                            "JAX_COMPILATION_CACHE_DIR": compiled})
    return call


def test_evaluate_as_a_command(run, command, settings):
    done = command("evaluate", "--tasks=captions,texts", "--split=test", "--checkpoint=7",
                   "--gin.EVAL_EXAMPLES=4")
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and "unigram/text" in done.stdout
    assert "tensorflow" not in done.stderr
    in_process = evaluate(**settings, tasks=("captions", "texts"), max_examples=4)
    rows = list(read_lines(in_process.directory / "metrics.jsonl"))
    for row, result in zip(rows, in_process.results, strict=True):
        assert row["loss"] == pytest.approx(result.metrics["loss"])


def test_infer_as_a_command(command, tmp_path):
    path = write_inputs(tmp_path)
    done = command("infer", f"--input_file={path}", f"--output_file={tmp_path}/out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "3 predictions" in done.stdout and "7 lines could not be used" in done.stdout
    assert "line 4: the text is too long" in done.stderr
    for arguments, message in (
            (["--target=image"], "goes with --input_file"),
            ([f"--input_file={path}", "--split=test"], "do not go with --input_file"),
            (["--checkpoint"], "needs a value"),
            (["--chekpoint=3"], "did you mean 'checkpoint'")):
        done = command("infer", *arguments)
        assert done.returncode == EXIT_USER_ERROR, done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr
