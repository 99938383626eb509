"""T5X's ways to decode, as settings of ours."""

from __future__ import annotations

from typing import Any

from vishwam_t5x.compat import refused
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation.generator import DecodingConfig

STANDS_FOR = "t5x.decoding"


def beam_search(num_decodes: int = 4, alpha: float = 0.6, max_decode_len: int | None = None,
                decoder_hook: Any = None, min_log_prob: float = -1.0e7,
                prompt_with_targets: bool = False) -> DecodingConfig:
    """Returns beam search; of all beams the best is the prediction.

    Args:
        num_decodes: beams; the model says it (`predict_batch_with_aux.num_decodes`).
        alpha: exponent of the length penalty.
        max_decode_len: most tokens of a text, its end included; None: those of a row.
        decoder_hook: none.
        min_log_prob: T5X's.
        prompt_with_targets: not with beams.
    """
    refused.check(f"{STANDS_FOR}.beam_search",
                  {"decoder_hook": decoder_hook, "min_log_prob": min_log_prob})
    return DecodingConfig(method="beam", num_decodes=num_decodes, alpha=alpha,
                          max_length=max_decode_len, prompt_with_targets=prompt_with_targets)


def temperature_sample(num_decodes: int = 1, temperature: float = 1.0, topk: int = 1,
                       topp: float = 0.0, max_decode_steps: int | None = None,
                       max_decode_steps_hard_limit: int | None = None,
                       rescale_log_probs: bool = True, state_callback_fn: Any = None,
                       logit_callback_fn: Any = None, prompt_with_targets: bool = False
                       ) -> DecodingConfig:
    """Returns sampling, or greedy decoding where there is nothing to draw.

    Args:
        num_decodes: sequences drawn; the model says it.
        temperature: divides the logits; 0: greedy.
        topk: draw among so many most probable tokens; 1: greedy; 0: all.
        topp: draw among the most probable tokens that reach this probability; 0: all.
        max_decode_steps: most tokens of a text, its end included; None: those of a row.
        max_decode_steps_hard_limit: none.
        rescale_log_probs: scores are of the distribution itself, whatever this says.
        state_callback_fn: none.
        logit_callback_fn: none.
        prompt_with_targets: begin every text with the target of its example.
    """
    refused.check(f"{STANDS_FOR}.temperature_sample", {
        "max_decode_steps_hard_limit": max_decode_steps_hard_limit,
        "state_callback_fn": state_callback_fn, "logit_callback_fn": logit_callback_fn})
    if topk and topp:
        raise UserError("temperature_sample draws by topk or by topp", got=f"{topk} and {topp}",
                        fix="topk = 0 with topp, or topp = 0.0")
    shared: dict[str, Any] = {"max_length": max_decode_steps,
                              "prompt_with_targets": prompt_with_targets}
    if temperature == 0 or topk == 1:  # T5X draws the same text each time
        return DecodingConfig(method="greedy", **shared)
    return DecodingConfig(method="sample", temperature=temperature, top_k=topk,
                          top_p=topp or 1.0, num_decodes=num_decodes, **shared)
