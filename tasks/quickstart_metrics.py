"""How the quickstart's tasks are judged: plain functions, importable without TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vishwam_t5x.core.errors import UserError
from vishwam_t5x_tasks import quickstart_fitted as fitted
from vishwam_t5x_tasks import quickstart_sources as sources


class Recogniser(NamedTuple):
    """A classifier of 8 x 8 digits and its own share of right answers on the real test digits."""

    classifier: Any
    accuracy: float

    def recognise(self, images: Float[np.ndarray, "images 8 8 1"]) -> Int[np.ndarray, "images"]:
        """Returns the digit it takes each image for."""
        return self.classifier.predict(np.asarray(images, np.float32).reshape(len(images), -1))


@functools.lru_cache(maxsize=1)
def recogniser() -> Recogniser:
    """Returns a support-vector classifier fitted to the real training digits (under a second).

    Raises:
        UserError: scikit-learn is not installed.
    """
    images, labels = sources.digits("train")
    from sklearn.svm import SVC

    classifier = SVC(C=10.0, gamma="scale").fit(images.reshape(len(images), -1), labels)
    test_images, test_labels = sources.digits("test")
    accuracy = classifier.score(test_images.reshape(len(test_images), -1), test_labels)
    return Recogniser(classifier, float(accuracy))


def caption_text(output: str, example: Mapping[str, Any] | None = None,
                 is_target: bool = False) -> str:
    """Postprocesses a caption: lower case, white space made single."""
    del example, is_target
    return " ".join(output.lower().split())


def digit_image(output: Int[np.ndarray, "16"], example: Mapping[str, Any] | None = None,
                is_target: bool = False) -> int | Float[np.ndarray, "8 8 1"]:
    """Postprocesses image codes: a target becomes the digit asked for, an output its pixels.

    Args:
        output: codes in [0, 64), [16].
        example: the clean example; a target needs its `meta_digit`.
        is_target: whether `output` is the target's.

    Raises:
        UserError: the codes are not those of an image, or a target comes without `meta_digit`.
    """
    if is_target:
        if example is None or "meta_digit" not in example:
            raise UserError("judging generated digits needs the digit that was asked for",
                            got="an example without 'meta_digit'",
                            fix="cache the task again: `vishwam cache`")
        return int(example["meta_digit"])
    return fitted.codebook().decode(np.asarray(output)[None])[0]


def recognised(targets: Sequence[int], predictions: Sequence[np.ndarray]) -> dict[str, float]:
    """Judges generated digits with a classifier trained on the real ones.

    Args:
        targets: the digits asked for.
        predictions: generated images, each [8, 8, 1] in [0, 1].

    Returns:
        'recognised': share of the images taken for the digit asked for; 'recogniser_accuracy': the
        classifier's share of right answers on the real test digits.

    Raises:
        UserError: there are no examples, or not as many predictions as targets.
    """
    if len(targets) != len(predictions) or not len(targets):
        raise UserError("judging digits needs as many images as requests, and at least one",
                        got=f"{len(targets)} requests, {len(predictions)} images")
    judge = recogniser()
    verdicts = judge.recognise(np.stack(predictions))
    return {"recognised": float(np.mean(verdicts == np.asarray(targets))),
            "recogniser_accuracy": judge.accuracy}
