"""How one modality is written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.evaluation import constraints

METHODS = ("greedy", "sample", "beam")
_OF_ALL = ("method", "max_length", "guidance", "allowed")


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How one modality is written.

    Attributes:
        method: 'greedy', 'sample', or 'beam'.
        temperature: of 'sample': divides the log-probabilities.
        top_k: of 'sample': draw among so many most probable tokens; 0: all.
        top_p: of 'sample': draw among the most probable tokens that reach this probability; 1: all.
        num_decodes: sequences sampled, or beams kept, per example; the one with the best score is
            the prediction.
        alpha: of 'beam': exponent of the length penalty.
        max_length: most tokens of a text, its end included; None: those of a decoder row. A grid of
            codes always has all its codes.
        seed: of 'sample'.
        prompt_with_targets: begin every text with the target of its example, as T5X does; the score
            counts the prompt. Not for 'beam'.
        guidance: a, of classifier-free guidance: tokens are taken by (1 + a) log p(token | inputs)
            - a log p(token | inputs without text), see `models.guidance`; 0: none. Unified-IO 2
            takes 10 for images. It takes twice the time, and wants a model trained with
            `MixtureOfDenoisers.no_text_rates`. Scores are then log-probabilities of the guided
            distribution; those of targets (mode 'score') and of options never are.
        allowed: what may be written, see `evaluation.constraints`; None: anything. Scores are then
            log-probabilities among what was allowed.

    Raises:
        UserError: a value out of its range, or one that the method does not use.
    """

    method: Literal["greedy", "sample", "beam"] = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_decodes: int = 1
    alpha: float = 0.6
    max_length: int | None = None
    seed: int = 0
    prompt_with_targets: bool = False
    guidance: float = 0.0
    allowed: Any = None

    def __post_init__(self) -> None:
        one_of(self.method, METHODS, "method of decoding")
        used = {"greedy": ("prompt_with_targets",),
                "sample": ("temperature", "top_k", "top_p", "num_decodes", "seed",
                           "prompt_with_targets"),
                "beam": ("num_decodes", "alpha")}[self.method]
        for field in dataclasses.fields(self):
            if field.name in _OF_ALL or field.name in used:
                continue
            if getattr(self, field.name) != field.default:
                raise UserError(f"decoding by '{self.method}' has no {field.name}",
                                got=f"{field.name} = {getattr(self, field.name)}",
                                fix=f"leave it out, or set method to another of {METHODS}")
        if self.method == "sample" and not self.temperature > 0:
            raise UserError("the temperature of sampling must be above 0", got=self.temperature,
                            fix="method = 'greedy' takes the most probable token")
        if self.max_length is not None and self.max_length < 1:
            raise UserError("DecodingConfig.max_length must be at least 1 token",
                            got=self.max_length)
        if self.top_k < 0 or not 0 < self.top_p <= 1 or self.num_decodes < 1 or self.alpha < 0:
            raise UserError("a setting of decoding is out of its range",
                            got=f"top_k {self.top_k}, top_p {self.top_p}, num_decodes "
                                f"{self.num_decodes}, alpha {self.alpha}",
                            fix="top_k >= 0, 0 < top_p <= 1, num_decodes >= 1, alpha >= 0")
        if not 0 <= self.guidance < math.inf:
            raise UserError("DecodingConfig.guidance must not be negative", got=self.guidance,
                            fix="0 for none; Unified-IO 2 takes 10 for images")
        self._check_allowed()

    def _check_allowed(self) -> None:
        if self.allowed is None:
            return
        if not constraints.is_constraint(self.allowed):
            raise UserError("DecodingConfig.allowed is nothing that allows tokens",
                            got=repr(self.allowed),
                            fix="@constraints.AllowedAnswers(), @constraints.AllowedTokens(), "
                                "@constraints.locations(), or @a_function")
        if self.prompt_with_targets:
            raise UserError("what begins with a prompt cannot be constrained",
                            got="prompt_with_targets and allowed", fix="leave out the one or the "
                                                                       "other")
