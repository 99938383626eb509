"""Useful tokens a second with rows packed as ours are, in Unified-IO 2's pairs, and not at all.

usage: python benchmarks/uio2_packing.py [--windows=5] [--rows=4] [--examples=6000]

The mixtures are those of `multimodal`: text to text (a third, three fifths or four fifths),
captions, drawing, transcription and editing, at Unified-IO 2's sizes; rows of 864 / 1,280 tokens.
First how full the rows are, by lengths alone; then train steps of one narrow model on batches of
the same shape, the three ways taking turns. Every step costs the same: what differs is how much of
it is of use.
"""

from __future__ import annotations

import argparse

from common import Figures
from multimodal import MIXTURES, PACKINGS, ROW, Mix, Steps

from vishwam_t5x.models.config import (
    CodeOutput,
    EncoderDecoderConfig,
    PatchInput,
    TextInput,
    TextOutput,
)
from vishwam_t5x.models.encoder_decoder import EncoderDecoder

VOCABULARY, CODES = 1152, 1024
BATCHES = 3  # of each way and window


def narrow() -> EncoderDecoder:
    """A model of Unified-IO 2's shape, 128 wide: 2 + 2 layers, patches projected."""
    return EncoderDecoder(EncoderDecoderConfig(
        emb_dim=128, num_heads=4, head_dim=32, mlp_dim=256, num_encoder_layers=2,
        num_decoder_layers=2,
        inputs=(TextInput(vocab_size=VOCABULARY),
                PatchInput(modality="image", patch_dim=768, grid=(24, 24)),
                PatchInput(modality="audio", patch_dim=256, grid=(16, 8))),
        targets=(TextOutput(vocab_size=VOCABULARY),
                 CodeOutput(modality="image", vocab_size=CODES + 128, grid=(32, 32)))))


def filled(figures: Figures, mixture: str, mix: Mix, num_examples: int) -> None:
    """Shares of the slots of rows that hold tokens, for the same number of rows."""
    number, shares = num_examples // 3, {}
    for name in PACKINGS:
        for batch in (4, 16, 128) if name == "packed" else (None,):
            rows = mix.rows(name, number, batch or 1)
            tokens = mix.tokens(rows)
            which = name if batch is None else f"{name}_{batch}_rows"
            shares[which] = sum(tokens) / (number * sum(ROW))
            sides = [used / (number * room) for used, room in zip(tokens, ROW, strict=True)]
            figures.add(f"{mixture}_filled_{which}", [shares[which]], "share",
                        encoder=round(sides[0], 4), decoder=round(sides[1], 4),
                        examples_per_row=round(sum(map(len, rows)) / number, 3))
            if name == "pairs":
                figures.add(f"{mixture}_most_to_pairs", [1 / max(sides)], "times")
    for batch in (4, 16, 128):
        figures.add(f"{mixture}_filled_packed_{batch}_rows_to_pairs",
                    [shares[f"packed_{batch}_rows"] / shares["pairs"]], "times")


def trained(figures: Figures, mixture: str, mix: Mix, steps: Steps, windows: int,
            batch_size: int) -> None:
    """Useful tokens a CPU second and a second of train steps."""
    size = BATCHES * batch_size
    rows = {name: mix.rows(name, windows * size, batch_size) for name in PACKINGS}
    steps.take(mix.batch(rows["packed"][:batch_size]))  # warms up
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in PACKINGS}
    costs: list[float] = []
    for first in range(0, windows * size, size):
        for name in PACKINGS:
            mine = rows[name][first:first + size]
            batches = [mix.batch(mine[at:at + batch_size]) for at in range(0, size, batch_size)]
            cpu, wall, _ = map(sum, zip(*map(steps.take, batches), strict=True))
            useful = sum(mix.tokens(mine))
            rates[name].append((useful / cpu, useful / wall))
            costs.append(cpu / BATCHES)
    more = {"parameters": steps.num_parameters, "rows": batch_size}
    figures.add(f"{mixture}_step_cpu", costs, "s", **more)
    for which, unit in ((0, "cpu"), (1, "wall")):
        for name in PACKINGS:
            figures.add(f"{mixture}_{name}_tokens_per_{unit}_second",
                        [rate[which] for rate in rates[name]], "tokens/s", **more)
        for name in PACKINGS[1:]:
            figures.add(f"{mixture}_packed_to_{name}_{unit}", [
                ours[which] / theirs[which]
                for ours, theirs in zip(rates["packed"], rates[name], strict=True)], "times",
                at_least=1.5 if name == "pairs" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--examples", type=int, default=6000)
    options = parser.parse_args()
    figures, steps = Figures("uio2_packing"), Steps(narrow(), options.rows)
    for mixture in MIXTURES:
        mix = Mix(mixture, VOCABULARY, CODES)
        filled(figures, mixture, mix, options.examples)
        trained(figures, mixture, mix, steps, options.windows, options.rows)
    figures.write()


if __name__ == "__main__":
    main()
