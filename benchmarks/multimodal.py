"""What the benchmarks of Unified-IO 2 share: the mixture, rows packed three ways, train steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from pair_packing import Sizes, pairs

from vishwam_t5x.core.batch import BatchSpec, DataPosition, ModalityLengths
from vishwam_t5x.data.assembly import PlacedExample, assemble
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing_plan import Packer
from vishwam_t5x.data.synthetic import CopyObjective, five_kinds
from vishwam_t5x.objectives.losses import LossConfig
from vishwam_t5x.objectives.masking import PatchSpec
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.training import setup, step
from vishwam_t5x.training.optimizers import Adafactor

PATCHES = {"image": PatchSpec(16, channels=3), "audio": PatchSpec(16, channels=1)}
ROW = Sizes(864, 1280)  # Unified-IO 2's, when it packs
PACKINGS = ("packed", "pairs", "one_per_row")
MIXTURES = {"text_33": (33, 17, 17, 17, 17), "text_60": (60, 20, 5, 10, 5),
            "text_80": (80, 10, 3, 5, 2)}
"""Percentages of text to text, captions, drawing, transcription and editing (`five_kinds`)."""


class Mix:
    """A mixture of short and long examples, at Unified-IO 2's sizes.

    Args:
        mixture: of `MIXTURES`.
        vocabulary: ids of the text.
        codes: of images.
        seed: of everything.
    """

    def __init__(self, mixture: str, vocabulary: int, codes: int, seed: int = 0) -> None:
        tasks = five_kinds(PATCHES, 512, seed, vocabulary, codes, sound_patches=(16, 16))
        self.examples = Mixture(tasks, MIXTURES[mixture], seed)
        self.objective = CopyObjective(PATCHES)

    def lengths(self, example: int) -> ModalityLengths:
        """Slots that an example takes."""
        return self.objective.lengths(self.examples.clean_lengths(example), seed=0,
                                      example=example)

    def sizes(self, example: int) -> Sizes:
        """Encoder and decoder tokens of an example."""
        inputs, targets = self.lengths(example)
        return Sizes(sum(inputs.values()), sum(targets.values()))

    def rows(self, packing: str, number: int, batch_size: int) -> list[tuple[int, ...]]:
        """Returns the examples in each of the first `number` rows of a way to pack."""
        if packing == "one_per_row":
            return [(example,) for example in range(number)]
        if packing == "pairs":
            stream = pairs(map(self.sizes, itertools.count()), ROW)
            return list(itertools.islice(stream, number))
        packer = Packer(self.examples, self.objective, batch_spec(batch_size), 0)
        position, rows = DataPosition(), []
        while len(rows) < number:
            plan = packer.plan(position)
            position = plan.end
            rows += [tuple(place.example for place in row) for row in plan.rows]
        return rows[:number]

    def tokens(self, rows: Sequence[tuple[int, ...]]) -> Sizes:
        """Useful tokens of some rows."""
        sizes = [self.sizes(example) for row in rows for example in row]
        return Sizes(sum(size.inputs for size in sizes), sum(size.targets for size in sizes))

    def batch(self, rows: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Returns the arrays of rows."""
        placed = [PlacedExample(row, self.lengths(example), self.objective.apply(
            self.examples.read(example), seed=0, example=example))
            for row, examples in enumerate(rows) for example in examples]
        return assemble(batch_spec(len(rows)), len(rows), placed)


def batch_spec(batch_size: int) -> BatchSpec:
    """Returns the shapes of a batch of rows."""
    return BatchSpec(batch_size, ROW.inputs, ROW.targets,
                     {"text": ROW.inputs, "image": 576, "audio": 512},
                     {"text": ROW.targets, "image": 1024},
                     {name: spec.patch_dim for name, spec in PATCHES.items()})


class Steps:
    """A compiled train step of a model, and its state."""

    def __init__(self, model: Any, batch_size: int) -> None:
        parts = setup.Parts(model, Adafactor(), mesh_lib.make_mesh(), LogicalAxisRules(),
                            step.StepConfig(loss=LossConfig()), batch_spec(batch_size))
        factory, self._shardings = parts.factory(), parts.batch_shardings()
        self.compiled = parts.compile(factory, self._shardings)
        self.state = factory.create(jax.random.key(0))
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def take(self, arrays: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
        """Takes a step; returns its CPU seconds, its seconds by the clock and the loss."""
        on_device = jax.device_put(dict(arrays), self._shardings)
        jax.block_until_ready(on_device)
        cpu, wall = time.process_time(), time.monotonic()
        state, metrics = self.compiled(self.state.on_device(), on_device)
        self.state = state.replace(position=self.state.position)
        jax.block_until_ready((state, metrics))
        return time.process_time() - cpu, time.monotonic() - wall, float(metrics["loss"])
