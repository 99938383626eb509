"""How the quickstart is judged."""

from __future__ import annotations

import numpy as np
import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x_tasks import quickstart_fitted as fitted
from vishwam_t5x_tasks import quickstart_metrics as metrics
from vishwam_t5x_tasks import quickstart_sources as sources


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISHWAM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_recogniser_is_good_and_reports_itself():
    images, labels = sources.digits("test")
    result = metrics.recognised(labels.tolist(), list(images))
    assert result["recogniser_accuracy"] == result["recognised"] >= 0.98


def test_wrong_digits_and_noise_are_not_recognised():
    images, labels = sources.digits("test")
    wrong = ((labels + 1) % 10).tolist()
    assert metrics.recognised(wrong, list(images))["recognised"] <= 0.02
    noise = np.random.default_rng(0).uniform(size=(200, 8, 8, 1)).astype(np.float32)
    asked = (np.arange(200) % 10).tolist()
    assert metrics.recognised(asked, list(noise))["recognised"] < 0.3


def test_codes_become_pixels_and_targets_digits():
    images, labels = sources.digits("validation")
    codes = fitted.codebook().encode(images[:5])
    example = {"meta_digit": labels[2], "image_target_codes": codes[2]}
    assert metrics.digit_image(codes[2], example=example, is_target=True) == labels[2]
    np.testing.assert_array_equal(metrics.digit_image(codes[2], example=example),
                                  fitted.codebook().decode(codes[2:3])[0])


def test_captions_forgive_case_and_spaces():
    assert metrics.caption_text(" The  digit SEVEN ") == "the digit seven"


def test_mistakes_are_named():
    with pytest.raises(UserError, match="meta_digit"):
        metrics.digit_image(np.zeros(16, np.int32), example={}, is_target=True)
    with pytest.raises(UserError, match="at least one"):
        metrics.recognised([], [])
