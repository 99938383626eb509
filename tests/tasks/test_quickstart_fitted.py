"""The fitted vocabulary and codebook: the same bytes again, whole or not there, and good enough."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import helpers
import media
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.input_codes import coded_inputs
from vishwam_t5x.models.config import CodeInput
from vishwam_t5x_tasks import quickstart_fitted as fitted
from vishwam_t5x_tasks import quickstart_metrics as metrics
from vishwam_t5x_tasks import quickstart_sources as sources


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISHWAM_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISHWAM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_files_lie_beside_the_cache(cache):
    for path in (fitted.vocabulary_path(), fitted.codebook_path()):
        assert pathlib.Path(path).is_relative_to(cache / "quickstart")
        described = fitted.describe(path)
        assert described["path"] == path and len(described["sha256"]) == 64
    assert fitted.describe(fitted.vocabulary_path())["size"] == 1024


def test_fitting_again_gives_the_same_bytes(cache, tmp_path, monkeypatch):
    first = [pathlib.Path(p) for p in (fitted.vocabulary_path(), fitted.codebook_path())]
    monkeypatch.setenv("VISHWAM_CACHE_DIR", str(tmp_path))
    again = [pathlib.Path(p) for p in (fitted.vocabulary_path(), fitted.codebook_path())]
    for old, new in zip(first, again, strict=True):
        assert old != new and old.parent.name == new.parent.name
        assert old.read_bytes() == new.read_bytes()


def test_the_vocabulary_has_our_ids_and_knows_every_text(cache):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=fitted.vocabulary_path())
    assert model.get_piece_size() == 1024
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)
    assert [model.is_byte(i) for i in (2, 3, 258, 259)] == [False, True, True, False]
    for text in (*sources.passages("test"), "déjà vu ☃ 你好"):
        ids = model.encode(text)
        assert model.unk_id() not in ids
    assert model.decode(model.encode("déjà vu ☃ 你好")) == "déjà vu ☃ 你好"
    assert all(len(model.encode(sources.caption(digit))) == 3 for digit in range(10))


def test_two_processes_at_once_end_with_one_good_folder(empty_cache):
    code = ("from vishwam_t5x_tasks import quickstart_fitted as f\n"
            "print(f.vocabulary_path(), f.codebook_path())")
    env = helpers.environment(env={"VISHWAM_CACHE_DIR": str(empty_cache)})
    running = [subprocess.Popen([sys.executable, "-c", code], env=env, text=True,
                                stdout=subprocess.PIPE) for _ in range(3)]
    outputs = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(outputs) == 1
    names = sorted(path.name.split("-")[0] for path in (empty_cache / "quickstart").iterdir())
    assert names == ["image", "text"], names  # and no temporary folder


def test_the_second_writer_keeps_what_the_first_wrote(tmp_path):
    folder = tmp_path / "text-0"
    fitted._write_folder(folder, "text.model", b"first", 1)
    fitted._write_folder(folder, "text.model", b"second", 1)
    assert (folder / "text.model").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["text-0"]


def test_a_damaged_file_is_refused_by_name(empty_cache):
    path = pathlib.Path(fitted.codebook_path())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    fitted._codebook_path.cache_clear()
    with pytest.raises(UserError, match=r"image_codebook\.npy"):
        fitted.codebook_path()
    path.unlink()
    with pytest.raises(UserError, match="delete"):
        fitted.codebook_path()


def test_an_unwritable_cache_is_explained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("VISHWAM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="VISHWAM_CACHE_DIR"):
        fitted.codebook_path()


def test_codes_to_pixels_and_back(cache):
    book = fitted.codebook()
    assert book.centres.shape == (64, 4) and book.centres.dtype == np.float32
    codes = np.random.default_rng(0).integers(0, 64, (20, 16)).astype(np.int32)
    images = book.decode(codes)
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.float32
    assert np.array_equal(book.encode(images), codes)
    # Row-major: the second code is the patch to the right of the first.
    np.testing.assert_array_equal(images[0, :2, 2:4, 0].ravel(), book.centres[codes[0, 1]])


def test_encoding_takes_the_nearest_centre(cache):
    book = fitted.codebook()
    images, _ = sources.digits("validation")
    patches = fitted.to_patches(images[:10], 2)
    distances = np.linalg.norm(patches[:, :, None] - book.centres, axis=-1)
    np.testing.assert_array_equal(book.encode(images[:10]), distances.argmin(-1))


def test_digits_survive_the_codebook(cache):
    images, labels = sources.digits("test")
    restored = fitted.codebook().decode(fitted.codebook().encode(images))
    assert np.mean((restored - images) ** 2) < 0.008
    assert np.mean(metrics.recogniser().recognise(restored) == labels) >= 0.97


def test_codebook_mistakes_are_named(cache):
    book = fitted.codebook()
    with pytest.raises(UserError, match="CODE_OFFSET"):
        book.decode(np.full((1, 16), 64))
    with pytest.raises(UserError, match="one code per patch"):
        book.decode(np.zeros((1, 15), np.int32))
    with pytest.raises(UserError, match="not of the size"):
        book.encode(np.zeros((1, 16, 16, 1), np.float32))
    with pytest.raises(UserError, match="divide"):
        fitted.PatchCodebook(book.centres, 3, (8, 8, 1))


def test_a_picture_file_of_a_digit_has_the_codes_of_the_task(cache):
    """That of the early fusion recipe: `vishwam infer` reads files by what draws its pictures."""
    images, _ = sources.digits("test")
    pictures, wanted = fitted.Pictures(), fitted.codebook().encode(images[:50])
    found = coded_inputs(SimpleNamespace(codecs={}, inputs=(
        CodeInput(modality="image", vocab_size=66, grid=(4, 4)),)), {"image": pictures}, None)
    pixels = np.rint(images[:50] * 255).astype(np.uint8)
    signals = [found["image"].picture(media.png(each[..., 0])) for each in pixels]
    np.testing.assert_array_equal(signals, pixels)
    # Files hold 255ths, the task's pictures 16ths: a patch between two codes may fall to either.
    assert (pictures.encode(np.stack(signals)) == wanted).mean() > 0.99
    np.testing.assert_array_equal(pictures(wanted[0]), fitted.decode_image(wanted[0]))
