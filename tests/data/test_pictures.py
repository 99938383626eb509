"""Pictures: every kind converted as it looks, broken ones refused, geometry and patches."""

from __future__ import annotations

import io
import struct
import sys
import types

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import fast_pictures, pictures
from vishwam_t5x.data.pictures import PictureConfig, decode_picture, place
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.masking import PatchSpec


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_grey_palette_transparent_and_16_bit_pictures_look_as_they_should():
    grey = np.asarray([[0, 100, 255]], np.uint8)
    np.testing.assert_array_equal(decode_picture(encoded(Image.fromarray(grey))),
                                  np.repeat(grey[..., None], 3, -1))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode_picture(encoded(deep))[..., 0], grey)
    rgba = np.asarray([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    np.testing.assert_array_equal(decode_picture(encoded(Image.fromarray(rgba)))[0],
                                  [[255, 0, 0], [255, 255, 255], [204, 204, 204]])
    palette = Image.fromarray(np.asarray([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(decode_picture(encoded(palette))[0], [[10, 20, 30], [40, 50, 60]])
    np.testing.assert_array_equal(
        decode_picture(encoded(palette, transparency=1))[0], [[10, 20, 30], [255, 255, 255]])
    bits = Image.fromarray(np.asarray([[False, True]]))
    np.testing.assert_array_equal(decode_picture(encoded(bits), 1)[0, :, 0], [0, 255])


def test_a_picture_held_sideways_is_turned():
    image = Image.fromarray(np.asarray([[0, 255, 255]], np.uint8))
    turned = Image.Exif()
    turned[274] = 6  # the camera was turned: the first row is the right column
    found = decode_picture(encoded(image, exif=turned), 1)
    np.testing.assert_array_equal(found[..., 0], [[0], [255], [255]])


def test_broken_pictures_are_refused():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        whole = encoded(Image.fromarray(noise), kind)
        assert decode_picture(whole).shape == (40, 40, 3)
        with pytest.raises(UserError, match="the image"):
            decode_picture(whole[:len(whole) // 2])
    for data in (b"", b"not a picture", whole[:2]):
        with pytest.raises(UserError, match="empty file|cannot be read"):
            decode_picture(data)
    with pytest.raises(UserError, match="no pixels"):
        place(np.zeros((0, 5, 3), np.uint8))


def test_a_program_is_not_run_for_its_picture(monkeypatch):
    """PostScript, whatever the file is called: Pillow would start Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", pytest.fail)
    with pytest.raises(UserError, match="PostScript"):
        decode_picture(encoded(Image.new("RGB", (4, 4)), "EPS"))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, IndexError, struct.error])
def test_whatever_a_reader_says_of_a_damaged_file_refuses_it(monkeypatch, error):
    """That of AVIF raises RuntimeError, for one."""
    def read(file):
        raise error("no such item")

    monkeypatch.setattr(Image, "open", read)
    with pytest.raises(UserError, match="cannot be read") as found:
        decode_picture(b"damaged")
    assert found.value.got == "no such item"


def test_the_whole_picture_is_centred_on_black():
    config = PictureConfig(8, 8)
    found = place(np.full((2, 4, 3), 200, np.uint8), config)
    assert found.pixels.dtype == np.uint8 and found.pixels.shape == (8, 8, 3)
    expected = np.zeros((8, 8), bool)
    expected[2:6] = True
    np.testing.assert_array_equal(found.inside, expected)
    np.testing.assert_array_equal(found.pixels[..., 0], expected * 200)
    np.testing.assert_array_equal(
        pictures.patches_inside(found.inside, 2).reshape(4, 4),
        [[False] * 4, [True] * 4, [True] * 4, [False] * 4])
    thin = place(np.full((1, 1000, 1), 9, np.uint8), config)
    assert thin.inside.sum() == 8, "never less than a pixel"


def test_drawn_scales_keep_the_aspect_ratio_and_their_bounds():
    across = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 3))
    config = PictureConfig(64, 64, random=True, least_side=8)
    scales, full = [], 0
    for seed in range(60):
        found = place(across, config, np.random.default_rng(seed))
        rows, columns = found.inside.any(1).sum(), found.inside.any(0).sum()
        if rows < 64 and columns < 64:
            scales.append((rows / 32, columns / 64))
        full += found.inside.all()
    assert full and scales
    for by_rows, by_columns in scales:
        assert 0.7 < by_columns < 1.37 and abs(by_rows - by_columns) < 0.05
    again = place(across, config, np.random.default_rng(3))
    np.testing.assert_array_equal(
        again.pixels, place(across, config, np.random.default_rng(3)).pixels)


def test_a_sample_prefers_the_picture_and_keeps_places():
    inside = np.asarray([False, True, True, False, True, False])
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(pictures.sample_patches(inside, None, rng), [1, 2, 4])
    assert set(pictures.sample_patches(inside, 2, rng)) < {1, 2, 4}
    four = pictures.sample_patches(inside, 4, rng)
    assert {1, 2, 4} < set(four) and len(four) == 4 and list(four) == sorted(four)
    assert len(pictures.sample_patches(inside, 0.5, rng)) == 3
    for bad in (0, -0.5, 1.5):
        with pytest.raises(UserError, match="positive number"):
            pictures.sample_patches(inside, bad, rng)
    with pytest.raises(UserError, match="too narrow"):
        pictures.sample_patches(np.zeros((4,), bool), None, rng)


def test_the_encoder_is_given_the_chosen_patches_in_their_places():
    objective = MixtureOfDenoisers(image=PatchSpec(2, channels=1))
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    clean = {"image_inputs": image, "image_input_patches": np.asarray([1, 3], np.int32),
             "text_targets": np.asarray([7], np.int32)}
    out = objective.apply(clean, seed=0, example=0)
    np.testing.assert_array_equal(out["inputs/image/pos_ids"], [1, 3])
    np.testing.assert_array_equal(out["inputs/image/input"], [[2, 3, 6, 7], [10, 11, 14, 15]])
    sizes = {"image_inputs": 4, "image_input_patches": 2, "text_targets": 1}
    assert objective.lengths(sizes, seed=0, example=0).inputs["image"] == 2
    many = objective.lengths_many({k: np.asarray([v]) for k, v in sizes.items()},
                                  np.asarray([0]), seed=0)
    assert many.inputs["image"].tolist() == [2]
    with pytest.raises(UserError, match="does not have"):
        objective.apply({**clean, "image_input_patches": np.asarray([4])}, seed=0, example=0)
    with pytest.raises(UserError, match="without 'image_inputs'"):
        objective.lengths({"image_input_patches": 2, "text_targets": 1}, seed=0, example=0)


def natural(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise of a photograph's spectrum, with edges."""
    rng = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / np.maximum(
        np.hypot(down, across), 1 / width) ** 1.4
    pixels = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
    pixels /= pixels.std((0, 1))
    rows, columns = np.mgrid[:height, :width]
    for _ in range(8):
        row, column, radius = rng.random(3) * (height, width, width / 6)
        pixels[np.hypot(rows - row, columns - column) < radius] += rng.normal(size=3)
    return Image.fromarray(np.clip(128 + 45 * pixels, 0, 255).astype(np.uint8))


def both_ways(data: bytes, channels: int = 3, seed: int | None = None, size: int = 96):
    found = []
    for resize in ("exact", "fast"):
        config = PictureConfig(size, size, random=seed is not None, resize=resize)
        rng = None if seed is None else np.random.default_rng(seed)
        found.append(pictures.read_picture(data, channels, config, rng))
    exact, fast = found
    assert fast.pixels.shape == exact.pixels.shape and fast.pixels.dtype == np.uint8
    np.testing.assert_array_equal(fast.inside, exact.inside)
    np.testing.assert_array_equal(fast.pixels[~fast.inside], 0)
    return exact, fast


@pytest.fixture
def fast_packages():
    for package in ("cv2", "simplejpeg"):
        pytest.importorskip(package, reason="the extra 'images' is not installed")


@pytest.mark.parametrize("height, width", [(150, 200), (90, 120), (480, 640), (310, 260)])
def test_the_fast_way_is_near_the_exact_one(fast_packages, height, width):
    image = natural(height, width)
    files = [encoded(image, "JPEG", quality=85), encoded(image.convert("L"), "JPEG"),
             encoded(image, "JPEG", progressive=True, subsampling=0)]
    for data in files:
        for channels, seed in ((3, None), (1, None), (3, 0), (3, 1), (3, 2)):
            exact, fast = both_ways(data, channels, seed)
            error = (exact.pixels.astype(float) - fast.pixels)[exact.inside]
            assert 10 * np.log10(255**2 / np.mean(error**2)) > 32, (channels, seed)
            assert error.any(), "read the fast way"
            assert abs(error.mean()) < 0.5, "neither darker nor moved"


def test_the_fast_way_leaves_all_that_is_not_plain_to_the_exact_one(fast_packages):
    image, turned = natural(60, 80), Image.Exif()
    turned[274] = 6
    deep = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    for data in (encoded(image), encoded(image.convert("RGBA")), encoded(image.convert("P")),
                 encoded(deep), encoded(image, "GIF"), encoded(image.convert("CMYK"), "JPEG"),
                 encoded(image, "JPEG", exif=turned),
                 encoded(image.resize((16 * 96 + 9, 40)), "JPEG")):
        exact, fast = both_ways(data)
        np.testing.assert_array_equal(fast.pixels, exact.pixels)
    whole = encoded(image, "JPEG")
    damaged = bytearray(whole)
    damaged[len(whole) // 2:len(whole) // 2 + 8] = bytes(8)
    both_ways(bytes(damaged))  # Pillow reads what it can
    fast = PictureConfig(96, 96, resize="fast")
    for data, why in ((whole[:len(whole) // 2], "cannot be read"), (whole[:3], "cannot be read"),
                      (b"", "empty file")):
        with pytest.raises(UserError, match=why):
            pictures.read_picture(data, config=fast)
    with pytest.raises(UserError, match="too large"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "MAX_PIXELS", 100)
        pictures.read_picture(whole, config=fast)


def test_without_its_packages_the_fast_way_is_the_exact_one_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace())
    fast_pictures.codecs.cache_clear()
    for seed in (None, 0):
        exact, fast = both_ways(encoded(natural(60, 80), "JPEG"), seed=seed)
        np.testing.assert_array_equal(fast.pixels, exact.pixels)
    fast_pictures.codecs.cache_clear()
    assert [record.message for record in caplog.records] == [
        "PictureConfig.resize = 'fast' needs simplejpeg: pictures are read exactly, more slowly; "
        "pip install 'vishwam_t5x[images]'"]
    with pytest.raises(UserError, match="resize"):
        PictureConfig(resize="quick")


def test_a_file_is_read_as_decoded_and_placed():
    data = encoded(natural(60, 80), "JPEG")
    for seed in (None, 0, 1):
        config = PictureConfig(48, 48, random=seed is not None, least_side=8)
        rng = lambda seed=seed: None if seed is None else np.random.default_rng(seed)
        found = pictures.read_picture(data, 3, config, rng())
        expected = place(decode_picture(data), config, rng())
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        np.testing.assert_array_equal(found.inside, expected.inside)
