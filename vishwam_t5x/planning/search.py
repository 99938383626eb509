"""Tries meshes, remat policies and microbatches; compiles the promising ones and ranks them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from vishwam_t5x.planning.estimate import Prediction, Predictor
from vishwam_t5x.planning.figures import Figures
from vishwam_t5x.planning.program import Choice
from vishwam_t5x.planning.roofline import estimate

REMATS = ("none", "minimal", "full")
MICROBATCHES = (1, 2, 4, 8, 16)
MAX_TENSOR = 8
SLACK = 1.1
"""Predicted bytes may be so many times the limit and still be worth compiling."""

Compile = Callable[[Choice, int, int], Figures]


@dataclasses.dataclass(frozen=True)
class Found:
    """A choice that was compiled."""

    choice: Choice
    predicted: Prediction
    figures: Figures


def choices(predictor: Predictor) -> list[tuple[Choice, Prediction]]:
    """Returns every choice that batch and parameters allow, the fastest predicted first."""
    found = []
    for mesh in _meshes(predictor.target.num_devices):
        if not predictor.allowed(Choice(mesh, None, 1)):
            continue
        for remat, microbatches in itertools.product(REMATS, MICROBATCHES):
            choice = Choice(mesh, remat, microbatches)
            if predictor.allowed(choice):
                found.append((choice, predictor.predict(choice)))
    return sorted(found, key=_promise)


def search(predictor: Predictor, compile_choice: Compile, most: int) -> list[Found]:
    """Compiles up to `most` choices and returns them, those that fit first, the fastest first.

    Args:
        predictor: what is worth compiling; learns from each result.
        compile_choice: (choice, number, most) -> its figures.
        most: compilations; while nothing fits, the smallest predicted choices are tried.
    """
    found: list[Found] = []
    tried: set[Choice] = set()
    while len(found) < most:
        left = [(choice, prediction) for choice, prediction in choices(predictor)
                if choice not in tried]
        limit = predictor.target.limit_bytes * SLACK
        likely = [pair for pair in left if pair[1].total <= limit]
        if not likely and (not left or any(one.figures.fits for one in found)):
            break
        choice, predicted = likely[0] if likely else min(left, key=lambda pair: pair[1].total)
        tried.add(choice)
        figures = compile_choice(choice, len(found) + 1, most)
        predictor.learn(choice, figures)
        found.append(Found(choice, predicted, figures))
    return sorted(found, key=lambda one: _rank(one, predictor))


def _rank(one: Found, predictor: Predictor) -> tuple:
    seconds = estimate(one.figures, predictor.target).worst
    # What is not known to be faster, as on a CPU, is what was promised to be.
    order = _promise((one.choice, one.predicted)) if seconds is None else (seconds,)
    if not one.figures.fits:  # the one that comes nearest
        return True, False, (), one.figures.bytes.total
    return False, seconds is None, order, one.figures.bytes.total


def _promise(pair: tuple[Choice, Prediction]) -> tuple:
    choice, prediction = pair
    assert choice.mesh is not None and choice.remat is not None
    # Where no seconds are known: no work twice before little memory.
    cost = prediction.seconds
    order = REMATS.index(choice.remat), choice.microbatches
    return (cost if cost is not None else 0.0, order, choice.mesh[3], prediction.total)


def _meshes(num_devices: int) -> Iterator[tuple[int, int, int, int]]:
    """(replica, data, fsdp, tensor) of so many devices; replica stays 1 within a slice."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    for tensor in (size for size in divisors if size <= MAX_TENSOR):
        for fsdp in divisors:
            if num_devices % (tensor * fsdp) == 0:
                yield 1, num_devices // (tensor * fsdp), fsdp, tensor
