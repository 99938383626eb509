"""What to change where a run does not fit, with the line to paste and the bytes it would need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from vishwam_t5x.planning.estimate import Predictor
from vishwam_t5x.planning.program import Choice
from vishwam_t5x.planning.search import REMATS

WANTED = 3


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One change.

    Attributes:
        lines: gin lines to paste at the end of the recipe.
        total: bytes on one device it is predicted to need.
        fits: whether that is within the limit.
        cost: what is paid for it.
        price: rank of the cost, the least first; remedies of one kind share the whole part.
    """

    lines: tuple[str, ...]
    total: int
    fits: bool
    cost: str
    price: float


def remedies(predictor: Predictor) -> list[Remedy]:
    """Returns up to three changes: those that should fit, the cheapest first; then the smallest.

    Bytes are predicted from shapes, corrected by the program that did not fit. What would not need
    fewer bytes is no remedy.
    """
    now = predictor.predict(Choice()).total
    found = [one for one in _all(predictor) if one.total < now]
    fitting = sorted((one for one in found if one.fits), key=lambda one: (one.price, one.total))
    others = sorted((one for one in found if not one.fits), key=lambda one: one.total)
    ranked = [*fitting, *others]
    first = [one for place, one in enumerate(ranked)
             if all(int(one.price) != int(before.price) for before in ranked[:place])]
    # Different kinds of change before more of one kind.
    return [*first, *(one for one in ranked if one not in first)][:WANTED]


def _all(predictor: Predictor) -> Iterator[Remedy]:
    recipe, limit = predictor.recipe, predictor.target.limit_bytes
    remat = recipe.model.config.remat_policy
    now = recipe.step.num_microbatches
    mesh = predictor.default_mesh()

    def of(choice: Choice, cost: str, price: float) -> Iterator[Remedy]:
        if predictor.allowed(choice):
            total = predictor.predict(choice).total
            yield Remedy(tuple(choice.gin_lines()), total, total <= limit, cost, price)

    below = REMATS[REMATS.index(remat) + 1:] if remat in REMATS else ("full",) * (remat != "full")
    for policy in below:
        yield from of(Choice(remat=policy), *_REMAT_COST[policy])
    for times in (2, 4, 8, 16):
        more = Choice(microbatches=now * times)
        yield from of(more, f"{times} times the parameter gathers a step", 2 + times / 32)
        if "full" in below:
            yield from of(dataclasses.replace(more, remat="full"),
                          "a third more matmul time, smaller microbatches", 5 + times / 32)
    replica, data, fsdp, tensor = mesh
    if replica * data > 1:
        yield from of(Choice(mesh=(1, 1, replica * data * fsdp, tensor)),
                      "parameters are gathered among more devices", 3)
    for times in (2, 4):
        if fsdp % times == 0:
            yield from of(Choice(mesh=(replica, data, fsdp // times, tensor * times)),
                          f"{times} devices share each row: messages in every layer",
                          8 + times / 32)
    if predictor.optimizer > predictor.parameters / 2:
        total = predictor.predict(Choice(), optimizer_share=0.02).total
        yield Remedy(("include 'gin/optimizers/adafactor.gin'",), total, total <= limit,
                     "another optimizer, with the learning rates of its own file", 6)
    if recipe.model.config.policy.name == "float32" and predictor.target.platform != "cpu":
        name = "float16" if _is_old(predictor) else "bfloat16"
        total = predictor.predict(Choice(), activation_share=0.65).total
        yield Remedy((f"PRECISION = {name!r}",), total, total <= limit,
                     "matmuls of lower precision; usually faster", 0)
    rows = recipe.spec.batch_size // 2
    if rows and recipe.spec.batch_size % 2 == 0 and predictor.allowed(Choice(), rows):
        total = predictor.predict(Choice(), activation_share=0.5).total
        yield Remedy((f"BATCH_SIZE = {rows}",), total, total <= limit,
                     "another batch: other learning rates may suit it", 7)


_REMAT_COST = {"minimal": ("attention weights and norms are computed again", 1.0),
               "full": ("about a third more matmul time", 4.0)}


def _is_old(predictor: Predictor) -> bool:
    capability = predictor.target.compute_capability
    return capability is not None and float(capability) < 8
