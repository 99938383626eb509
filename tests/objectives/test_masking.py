"""Patches: their order, how many are hidden, and which codes lie under them."""

from __future__ import annotations

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.objectives import masking
from vishwam_t5x.objectives.masking import PatchSpec


def test_patches_are_row_major_and_flattened_dy_dx_c():
    image = np.arange(4 * 6 * 2).reshape(4, 6, 2)
    patches = masking.patchify(image, PatchSpec(2, channels=2))
    assert patches.shape == (6, 8)
    assert patches[0].tolist() == [*image[0, 0], *image[0, 1], *image[1, 0], *image[1, 1]]
    assert patches[1].tolist() == image[0:2, 2:4].reshape(-1).tolist()
    assert patches[3].tolist() == image[2:4, 0:2].reshape(-1).tolist()


def test_spectrograms_have_no_channel_axis():
    spectrogram = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)
    spec = PatchSpec((4, 2), channels=1)
    patches = masking.patchify(spectrogram, spec)
    assert patches.shape == (4, 8) == (spec.num_patches(spectrogram.shape), spec.patch_dim)
    assert patches[1].tolist() == spectrogram[0:4, 2:4].reshape(-1).tolist()
    assert patches.dtype == np.float32


@pytest.mark.parametrize("spec,shape", [
    (PatchSpec(16), (30, 32, 3)), (PatchSpec(16), (32, 32)), (PatchSpec(16), (32, 32, 1)),
    (PatchSpec(4, channels=1), (8, 8, 1, 1))])
def test_shapes_that_cannot_be_cut(spec, shape):
    with pytest.raises(UserError) as caught:
        masking.patchify(np.zeros(shape), spec)
    assert str(shape[0]) in str(caught.value)


@pytest.mark.parametrize("options", [
    {"patch_size": 0}, {"patch_size": (2, 2, 2)}, {"patch_size": (2.0, 2)}, {"channels": 0},
    {"code_grid": (4,)}])
def test_unusable_specs(options):
    with pytest.raises(UserError, match=next(iter(options))):
        PatchSpec(**options)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.75, 0.99])
def test_number_of_masked_patches(rate):
    counts = masking.num_masked_many(np.arange(200), rate)
    for n in range(200):
        masked = masking.num_masked(n, rate)
        assert masked == counts[n]
        assert masking.patch_mask(n, rate, np.random.default_rng(n)).sum() == masked
        assert n < 2 or 1 <= masked <= n - 1
        if 1 <= round(n * rate) <= n - 1:
            assert masked == round(n * rate)


def test_masks_are_uniform():
    rng = np.random.default_rng(0)
    hits = sum(masking.patch_mask(10, 0.3, rng) for _ in range(3_000))
    assert np.all(np.abs(hits - 900) < 4 * np.sqrt(3_000 * 0.3 * 0.7))


def test_codes_take_the_mask_of_the_patch_under_their_centre():
    same = masking.nearest_grid((3, 4), (3, 4))
    assert same.tolist() == list(range(12))
    assert masking.nearest_grid((1, 2), (1, 4)).tolist() == [0, 0, 1, 1]
    assert masking.nearest_grid((2, 2), (1, 1)).tolist() == [3]
    # Unified-IO 2: 24 x 24 patches, 32 x 32 codes. Three patches span four codes.
    index = masking.nearest_grid((24, 24), (32, 32)).reshape(32, 32)
    assert index[0, :8].tolist() == [0, 1, 1, 2, 3, 4, 4, 5]
    assert (index[:, 0] // 24)[:4].tolist() == [0, 1, 1, 2]
    mask = np.random.default_rng(0).random(576) < 0.75
    assert masking.code_mask(mask, (24, 24), (32, 32)).tolist() == mask[index.reshape(-1)].tolist()


def test_code_grid_follows_the_proportions_of_the_patches():
    spec = PatchSpec(16)
    assert spec.codes_grid((24, 24), 1_024) == (32, 32)
    assert spec.codes_grid((16, 8), 512) == (32, 16)
    assert spec.codes_grid((2, 3), 24) == (4, 6)
    with pytest.raises(UserError, match="code_grid"):
        spec.codes_grid((24, 24), 1_000)
    assert PatchSpec(16, code_grid=(16, 32)).codes_grid((16, 8), 512) == (16, 32)
    with pytest.raises(UserError, match="512 codes"):
        PatchSpec(16, code_grid=(16, 16)).codes_grid((16, 8), 512)
