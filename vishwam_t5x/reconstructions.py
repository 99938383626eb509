"""Held-out pictures beside what a codec makes of them, while it is being trained."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from vishwam_t5x.core import distributed, storage
from vishwam_t5x.core.batch import Batch
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import source
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.prefetch import Prefetcher
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation.loss_evaluator import FirstExamples
from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.models.codecs.trainer import CodecTrainer
from vishwam_t5x.training import hooks, run_page, setup

FILE = run_page.PICTURE
PREFIX = "reconstruction/"
_COLUMNS = 16
_HEIGHT = 48  # pixels that a small picture is enlarged to


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """When and on what a codec is looked at during training.

    Logged are 'reconstruction/psnr' (dB, of values in [0, 1], mean squared error over all
    pictures; for spectrograms of the range they span), 'reconstruction/codes_used' (how many
    codes occur) and 'reconstruction/perplexity' (of the codes that do). MODEL_DIR/
    reconstructions.png shows the first pictures above what comes back of them.

    Attributes:
        dataset_cfg: mixture and split.
        model_dir: where the PNG is written.
        period: steps between two looks; there is one at the end, too.
        max_examples: pictures that are measured, the first ones; None: all.
        num_shown: pictures that are drawn.
    """

    dataset_cfg: DatasetConfig
    model_dir: str
    period: int = 1000
    max_examples: int | None = 256
    num_shown: int = 64

    def __post_init__(self) -> None:
        for name in ("period", "num_shown"):
            if getattr(self, name) < 1:
                raise UserError(f"Reconstructions.{name} must be at least 1",
                                got=getattr(self, name))
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError("Reconstructions.max_examples must be at least 1",
                            got=self.max_examples, fix="None for all")

    def hook(self, parts: setup.Parts, objective: Any) -> hooks.EvaluateHook:
        """Returns what is called after each step of training.

        Raises:
            UserError: the model is no codec, or the examples cannot be opened.
        """
        if not isinstance(parts.model, CodecTrainer):
            raise UserError("only codecs reconstruct what they are given",
                            got=type(parts.model).__name__,
                            fix="MODEL = @trainer.CodecTrainer(), or leave Reconstructions out")
        config = dataclasses.replace(self.dataset_cfg, shuffle=False)
        mixture = source.open_mixture(config, source.patch_specs(objective), repeat=False)
        return hooks.EvaluateHook(
            _Look(self, config, parts, objective, FirstExamples(mixture, self.max_examples)),
            self.period, prefix=PREFIX)


class _Look:
    """Parameters -> figures; draws the picture. `training.hooks.Evaluator`."""

    def __init__(self, settings: Reconstructions, config: DatasetConfig, parts: setup.Parts,
                 objective: Any, examples: FirstExamples) -> None:
        self._settings, self._config, self._examples = settings, config, examples
        self._objective = objective
        self._spec = source.batch_spec(config, objective, source.features_of(examples.tasks))
        self._placement = Placement(parts.mesh, parts.rules, self._spec.batch_size)
        model = parts.model
        self._modality, self._num_codes = model.config.modality, model.config.codec.num_codes

        def look(params: Any, batch: Batch) -> Any:
            variables = {"params": params}
            before, after = model.apply(variables, batch, method="reconstruct")
            filled = batch[f"targets/{self._modality}/mask"][:, 0] > 0
            return before, after, model.apply(variables, batch).codes, filled

        self._compiled = jax.jit(look, out_shardings=self._placement.replicated)

    def __call__(self, params: Any) -> dict[str, float]:
        before, after, codes = (np.concatenate(each) for each in
                                zip(*self._batches(params), strict=True))
        shown = self._settings.num_shown
        if distributed.is_primary():
            picture = draw(before[:shown], after[:shown], self._modality == "audio")
            storage.write_bytes(f"{self._settings.model_dir.rstrip('/')}/{FILE}", picture)
        error = float(np.mean(np.square(before - after)))
        span = float(before.max() - before.min()) if self._modality == "audio" else 1.0
        shares = np.bincount(codes.reshape(-1), minlength=self._num_codes) / codes.size
        used = shares[shares > 0]
        return {"psnr": 10 * math.log10(max(span, 1e-6) ** 2 / max(error, 1e-12)),
                "codes_used": float(used.size),
                "perplexity": float(np.exp(-np.sum(used * np.log(used))))}

    def _batches(self, params: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        batches = PackedBatches(self._examples, self._objective, self._spec, self._config.seed,
                                self._config.max_bad_fraction, self._config.read_threads)
        with self._placement.context(), Prefetcher(batches, self._placement.rows) as stream:
            for batch in stream:
                *found, filled = jax.device_get(self._compiled(params, batch.arrays))
                before, after, codes = found
                yield before[filled], after[filled], codes[filled]
            stream.check_damage()


def draw(before: Float[np.ndarray, "n H W c"], after: Float[np.ndarray, "n H W c"],
         is_spectrogram: bool = False) -> bytes:
    """Returns a PNG: rows of pictures, each row above the row of what came back of them.

    Args:
        before: pictures in [0, 1], grey or RGB, or spectrograms of any range.
        after: of the same shape.
        is_spectrogram: time is drawn to the right, low frequencies below, from the darkest to the
            brightest of `before`.
    """
    from PIL import Image

    if is_spectrogram:
        low, high = float(before.min()), float(before.max())
        before, after = (np.clip((each - low) / max(high - low, 1e-6), 0, 1)
                         .transpose(0, 2, 1, 3)[:, ::-1] for each in (before, after))
    count, height, width, channels = before.shape
    scale = max(1, _HEIGHT // height)
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    tall, wide = height * scale + 2, width * scale + 2
    canvas = np.ones((rows * (2 * tall + 4), columns * wide, channels), np.float32)
    for number in range(count):
        row, column = divmod(number, columns)
        for index, pictures in enumerate((before, after)):
            top, left = row * (2 * tall + 4) + index * tall, column * wide
            canvas[top:top + height * scale, left:left + width * scale] = (
                pictures[number].repeat(scale, 0).repeat(scale, 1))
    pixels = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
