"""Where the targets are pixels or spectrograms, a task compares like with like."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation import small_run, test_evaluator
from evaluation.test_drawing import SOUND as SOUNDED
from evaluation.test_drawing import save
from models import test_codecs_in_model as tiny

from vishwam_t5x.data import records_writer
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask, write_cache
from vishwam_t5x.evaluate import evaluate
from vishwam_t5x.evaluation.evaluator import Evaluator
from vishwam_t5x.evaluation.generator import Generator
from vishwam_t5x.evaluation.predictions import read_lines
from vishwam_t5x.evaluation.rendering import Renderer
from vishwam_t5x.evaluation.report import PageConfig
from vishwam_t5x.evaluation.task_metrics import TaskMetrics
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.objectives.vocabulary import VocabularyLayout
from vishwam_t5x.parallelism.mesh import MeshConfig, make_mesh

TEXT = SyntheticFeature(2, 5, num_ids=16)
PIXELS = SyntheticFeature(4, 4, rest=(4, 1), dtype="uint8")
SOUND = SyntheticFeature(16, 16, rest=(8,), dtype="float32")
PATCHES = {"image": PatchSpec(2, channels=1), "audio": PatchSpec(4, channels=1)}
BOTH = SyntheticTask("both", {"text_inputs": TEXT, "image_targets": PIXELS,
                              "audio_targets": SOUND}, 3, patch_specs=PATCHES)
DRAWING = SyntheticTask("drawing", {"text_inputs": TEXT, "image_targets": PIXELS}, 5,
                        patch_specs=PATCHES)


def distance(targets, predictions):
    """A metric of pictures: 0 where they are the same."""
    for pair in zip(targets, predictions, strict=True):
        assert [(one.dtype, one.shape) for one in pair] == [(np.uint8, (4, 4, 1))] * 2
    return {"distance": float(np.mean(np.abs(np.stack(targets).astype(float)
                                             - np.stack(predictions))))}


@pytest.fixture(scope="module")
def judge():
    generator = Generator(tiny.model()[0], make_mesh(MeshConfig()), None, 2, {}, 8, {"text": 16})
    return Evaluator(generator, tiny.objective(), test_evaluator.text_of)


def drawn(codes, modality):
    params = tiny.model()[1][f"target_encoders_{modality}"]["discrete_vae"]
    return Renderer(tiny.CODECS[modality], params).many(np.asarray(codes))


def test_pictures_are_compared_with_pictures(judge):
    found = judge.evaluate(tiny.model()[1], DRAWING, TaskMetrics("drawing", (distance,)),
                           num_samples=1)
    codes = [line.prediction for line in found.predictions]
    assert all(line.target is None and len(line.prediction) == 4 for line in found.predictions)
    pictures = np.rint(drawn(codes, "image") * 255)
    given = np.stack([DRAWING.read(record)["image_targets"] for record in range(5)])
    assert found.metrics["distance"] == pytest.approx(np.mean(np.abs(given - pictures)))
    np.testing.assert_array_equal(found.samples[0].output, pictures[0])
    np.testing.assert_array_equal(found.samples[0].target, given[0])


@pytest.mark.slow
def test_each_modality_is_compared_with_its_own(judge):
    def names(output, example, is_target):
        assert {name: (one.dtype, one.shape) for name, one in output.items()} == {
            "image": (np.uint8, (4, 4, 1)), "audio": (np.float32, (16, 8))}
        return output["audio"]

    def same(targets, predictions):
        given = [BOTH.read(record)["audio_targets"] for record in range(3)]
        np.testing.assert_array_equal(targets, given)
        seen.extend(predictions)
        return {"same": float(np.mean(np.stack(targets) == np.stack(predictions)))}

    seen: list[np.ndarray] = []
    found = judge.evaluate(tiny.model()[1], BOTH, TaskMetrics("both", (same,), names))
    assert found.metrics == {"same": 0.0, "num_examples": 3}
    codes = [line.prediction["audio"] for line in found.predictions]
    np.testing.assert_allclose(seen, drawn(codes, "audio"), atol=1e-5)


def test_a_reference_that_the_task_keeps_goes_first(judge):
    class Named:
        """Each picture has a name, which is what the task wants to see."""

        def __getattr__(self, name):
            return getattr(DRAWING, name)

        def read(self, record):
            return {**DRAWING.read(record), "meta_targets_pretokenized": b"seven"}

    def named(targets, predictions):
        return {"named": targets.count("seven"), "pictures": np.stack(predictions).ndim}

    found = judge.evaluate(tiny.model()[1], Named(), TaskMetrics("drawing", (named,)))
    assert found.metrics == {"named": 5, "pictures": 4, "num_examples": 5}


@pytest.mark.slow
def test_evaluate_of_a_cached_task_with_pixels(tmp_path, monkeypatch):
    """The verb itself: loss, predictions with pictures and sounds, the task's metric, the page."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("VISHWAM_CACHE_DIR", str(cache))
    words = small_run.vocabulary(cache / "text.model")
    address = {"metric_fns": [f"{__name__}:distance"], "vocabulary": words}
    for split in ("train", "test"):
        write_cache(DRAWING, cache, split, address)
        write_cache(BOTH, cache, split, {"metric_fns": [], "vocabulary": words})
    records_writer.write_mixture(cache, "pixels", {"drawing": 1.0, "both": 1.0})
    save(tmp_path / "run", tiny.model()[1], 3)
    layout = VocabularyLayout(base_size=64, num_sentinels=4, num_location_bins=0)
    found = evaluate(
        tiny.model()[0], str(tmp_path / "run"), tiny.objective(vocabulary=layout), DatasetConfig(
            "pixels", {"inputs": 32, "targets": 32, "targets/image": 8, "targets/audio": 16}, 2,
            split="test", cache_dir=str(cache), shuffle=False),
        sound=SOUNDED, decode_batch_size=2, page=PageConfig(num_samples=2),
        compilation_cache_dir="")
    rows = {row["task"]: row for row in read_lines(found.directory / "metrics.jsonl")}
    assert 0 < rows["drawing"]["distance"] < 255 and rows["drawing"]["num_examples"] == 5
    assert {"loss/image", "loss/audio"} <= rows["both"].keys()
    assert "unigram/image" not in rows["both"], "there are no codes to count"
    lines = list(read_lines(found.directory / "predictions-drawing.jsonl"))
    assert len(lines) == 5 and all((found.directory / line["picture"]).exists() for line in lines)
    both = list(read_lines(found.directory / "predictions-both.jsonl"))
    assert len(both) == 2 and all((found.directory / line["sound"]).exists() for line in both)
    assert found.page is not None and found.page.exists()
