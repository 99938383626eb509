"""Pictures: every kind converted as it looks, broken ones refused, geometry and patches."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import pictures
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
