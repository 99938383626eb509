"""A page of examples before and after corruption: text as text, images and sounds as pictures."""

from __future__ import annotations

import base64
import colorsys
import html
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vishwam_t5x.data.feature_info import META_PREFIX, is_history, modality_of
from vishwam_t5x.data.packing import Objective
from vishwam_t5x.data.packing_plan import ExampleStream
from vishwam_t5x.data.pictures import scaled
from vishwam_t5x.data.records import DamagedRecord
from vishwam_t5x.data.source import Dataset, patch_specs
from vishwam_t5x.objectives.vocabulary import CODE_OFFSET

_STYLE = """
body { font: 14px/1.5 sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse; width: 100% } td, th { border: 1px solid #ccc; padding: .5em;
vertical-align: top; text-align: left } img { image-rendering: pixelated; margin: 2px }
.name { color: #777; font-size: 12px } .special { color: #b3541e } pre { background: #f6f6f6;
padding: 1em; overflow-x: auto }
"""
_HIDDEN = 0.5
"""Grey level of what the encoder does not see."""
_PICTURE_HEIGHT = 128

TextDecoder = Callable[[np.ndarray], list[str]]
"""Token ids -> the piece each stands for."""


def write_page(dataset: Dataset, decoders: Mapping[str, TextDecoder | None], num_examples: int,
               figures: str) -> str:
    """Returns a complete HTML page, pictures inline.

    Args:
        dataset: an open dataset.
        decoders: task -> how its token ids are written; None: as numbers.
        num_examples: examples of each task.
        figures: text shown above the examples.
    """
    parts = ["<!doctype html><html><head><meta charset='utf-8'>",
             f"<title>{html.escape(dataset.config.mixture_or_task_name)}</title>",
             f"<style>{_STYLE}</style></head><body>",
             f"<h1>{html.escape(dataset.config.mixture_or_task_name)}, "
             f"{html.escape(dataset.config.split)}</h1>", f"<pre>{html.escape(figures)}</pre>"]
    chosen = _first_examples(dataset.examples, num_examples)
    for task, numbers in zip(dataset.examples.tasks, chosen, strict=True):
        parts.append(f"<h2>{html.escape(task.name)}</h2><table><tr><th>example</th><th>clean</th>"
                     "<th>the encoder reads</th><th>the decoder must write</th></tr>")
        render = _Renderer(task, dataset.objective, decoders.get(task.name))
        parts += [_row(dataset, render, example) for example in numbers]
        parts.append("</table>")
    return "\n".join([*parts, "</body></html>\n"])


def _first_examples(examples: ExampleStream, count: int) -> list[list[int]]:
    """Returns the numbers of each task's first examples, looking at no more than needed."""
    chosen: list[list[int]] = [[] for _ in examples.tasks]
    limit = examples.num_examples if examples.num_examples is not None else 1000 * count
    for example in range(limit):
        task, _ = examples.locate(example)
        if len(chosen[task]) < count:
            chosen[task].append(example)
        if all(len(numbers) == count for numbers in chosen):
            break
    return chosen


def _row(dataset: Dataset, render: _Renderer, example: int) -> str:
    _, record = dataset.examples.locate(example)
    head = f"<tr><td>{example}<br><span class='name'>record {record}</span></td>"
    try:
        clean = dataset.examples.read(example)
    except DamagedRecord as error:
        return f"{head}<td colspan='3'>damaged: {html.escape(error.why)}</td></tr>"
    model = corrupt(dataset.objective, clean, dataset.config.seed, example)
    return (f"{head}<td>{render.clean(clean)}</td><td>{render.inputs(clean, model)}</td>"
            f"<td>{render.targets(clean, model)}</td></tr>")


def corrupt(objective: Objective, clean: Mapping[str, Any], seed: int, example: int
            ) -> dict[str, np.ndarray]:
    """Returns what the objective makes of an example, as the batches have it."""
    used = {name: value for name, value in clean.items() if not name.startswith(META_PREFIX)}
    return objective.apply(used, seed=seed, example=example)


class _Renderer:
    """Turns the arrays of one task's examples into HTML."""

    def __init__(self, task: Any, objective: object, decode: TextDecoder | None) -> None:
        self._specs, self._decode = patch_specs(objective), decode
        self._histories = getattr(objective, "histories", None) or {}
        self._codebook = _read_codebook(getattr(task, "metadata", {}).get("codebook"))

    def clean(self, clean: Mapping[str, Any]) -> str:
        """The cached features."""
        return "".join(_named(name, self._feature(name, value, clean))
                       for name, value in clean.items())

    def inputs(self, clean: Mapping[str, Any], model: Mapping[str, np.ndarray]) -> str:
        """The encoder's side: text, and the patches it sees in their places."""
        parts = []
        for key, value in model.items():
            side, modality, name = key.split("/")
            if side == "inputs" and name == "tokens" and modality != "text":
                parts.append(_named(f"{modality}, {len(value)} codes", self._codes(
                    value - CODE_OFFSET, modality, clean, np.ones_like(value))))
            elif side == "inputs" and name == "tokens":
                parts.append(_named(f"text, {len(value)} tokens", self._text(value)))
            elif side == "inputs" and name == "input" and value.ndim == 3:
                parts.append(_named(f"{modality}, {len(value)} frames", self._frames(
                    modality, value, model.get(f"inputs/{modality}/mask"))))
            elif side == "inputs" and name == "input":
                canvas = self._canvas(modality, clean, value, model.get(
                    f"inputs/{modality}/pos_ids", np.arange(len(value))))
                parts.append(_named(f"{modality}, {len(value)} patches",
                                    _picture(canvas, modality == "audio")))
        return "".join(parts)

    def targets(self, clean: Mapping[str, Any], model: Mapping[str, np.ndarray]) -> str:
        """The decoder's side: text, and codes as a picture; grey where the loss does not count."""
        parts = []
        for key, value in model.items():
            side, modality, name = key.split("/")
            if side == "targets" and name in ("pixels", "spectrogram"):
                parts.append(_named(f"{modality}, as {name}",
                                    _picture(value[0], name == "spectrogram")))
            if side != "targets" or name != "targets":
                continue
            if modality == "text":
                parts.append(_named(f"text, {len(value)} tokens", self._text(value)))
                continue
            weights = model.get(f"targets/{modality}/loss_mask", np.ones_like(value))
            parts.append(_named(f"{modality}, {int(weights.sum())} of {len(value)} codes",
                                self._codes(value - CODE_OFFSET, modality, clean, weights)))
        return "".join(parts)

    def _feature(self, name: str, value: Any, clean: Mapping[str, Any]) -> str:
        if isinstance(value, bytes):
            return html.escape(value.decode("utf-8", "backslashreplace"))
        if name.startswith(META_PREFIX) or value.ndim == 0:
            return html.escape(str(value))
        if is_history(name) and value.ndim > 1:
            return "".join(_picture(frame, modality_of(name).startswith("audio"))
                           for frame in np.asarray(value))
        if value.ndim > 1:
            return _picture(np.asarray(value), modality_of(name) == "audio")
        if modality_of(name) == "text":
            return self._text(value)
        return self._codes(value, modality_of(name), clean, np.ones_like(value))

    def _text(self, ids: np.ndarray) -> str:
        if self._decode is None:
            return html.escape(" ".join(map(str, ids.tolist())))
        words = []
        for piece in self._decode(ids):
            special = piece[:1] in "<[" and piece[-1:] in ">]"
            text = html.escape(piece.replace("\u2581", " "))
            words.append(f"<span class='special'>{text}</span>" if special else text)
        return "".join(words)

    def _frames(self, modality: str, patches: np.ndarray, mask: np.ndarray | None) -> str:
        """The frames of a history side by side, grey where patches of them are not given."""
        audio, grid = modality.startswith("audio"), self._histories[modality].grid
        given = np.ones(patches.shape[:2]) if mask is None else mask
        return "".join(_picture(self._put_together(modality, grid, frame[seen > 0],
                                                   np.flatnonzero(seen)), audio)
                       for frame, seen in zip(patches, given, strict=True))

    def _canvas(self, modality: str, clean: Mapping[str, Any], patches: np.ndarray,
                positions: np.ndarray) -> np.ndarray:
        grid = self._specs[modality].grid(_source_shape(modality, clean))
        return self._put_together(modality, grid, patches, positions)

    def _put_together(self, modality: str, grid: tuple[int, int], patches: np.ndarray,
                      positions: np.ndarray) -> np.ndarray:
        spec, (rows, columns) = self._specs[modality], grid
        everything = np.full((rows * columns, spec.patch_dim), _HIDDEN, np.float32)
        if modality.startswith("audio"):
            everything[:] = patches.min() if len(patches) else 0
        everything[positions] = scaled(patches) if patches.dtype == np.uint8 else patches
        cut = everything.reshape(rows, columns, spec.height, spec.width, spec.channels)
        return cut.transpose(0, 2, 1, 3, 4).reshape(rows * spec.height, columns * spec.width,
                                                    spec.channels)

    def _codes(self, codes: np.ndarray, modality: str, clean: Mapping[str, Any],
               weights: np.ndarray) -> str:
        grid = self._code_grid(codes, modality, clean)
        if self._codebook is not None and modality == "image":
            centres, patch = self._codebook
            cells = centres[np.clip(codes, 0, len(centres) - 1)]
            cells = cells.reshape(len(codes), patch, patch, -1)
        else:
            patch = 1
            cells = np.asarray([colorsys.hsv_to_rgb(code * 0.618 % 1, 0.6, 0.9)
                                for code in codes.tolist()], np.float32).reshape(-1, 1, 1, 3)
        cells = np.where(weights.reshape(-1, 1, 1, 1) > 0, cells, _HIDDEN)
        picture = cells.reshape(*grid, patch, patch, -1).transpose(0, 2, 1, 3, 4)
        return _picture(picture.reshape(grid[0] * patch, grid[1] * patch, -1), False)

    def _code_grid(self, codes: np.ndarray, modality: str, clean: Mapping[str, Any]
                   ) -> tuple[int, int]:
        spec = self._specs.get(modality)
        if spec is not None and (shape := _source_shape(modality, clean)) is not None:
            return spec.codes_grid(spec.grid(shape), len(codes))
        side = round(len(codes) ** 0.5)
        return (side, side) if side * side == len(codes) else (1, len(codes))


def _source_shape(modality: str, clean: Mapping[str, Any]) -> Any:
    """Shape of the picture or spectrogram of a modality, or None if there is none."""
    for name, value in clean.items():
        if modality_of(name) == modality and getattr(value, "ndim", 0) > 1:
            return value.shape
    return None


def _read_codebook(described: Any) -> tuple[np.ndarray, int] | None:
    """Returns (centres [codes, patch * patch * channels], patch) of a codebook of pixel patches."""
    if not isinstance(described, Mapping) or "patch" not in described:
        return None
    return np.load(described["path"]), int(described["patch"])


def _named(name: str, content: str) -> str:
    return f"<div><span class='name'>{html.escape(name)}</span><br>{content}</div>"


def _picture(array: np.ndarray, is_spectrogram: bool) -> str:
    """Returns an <img> of [H, W, C] in [0, 1] or uint8, or of a spectrogram of any range."""
    from PIL import Image

    values = array.reshape(*array.shape[:2], -1)
    if is_spectrogram:  # time to the right, low frequencies below
        values = values[..., :1].astype(np.float32)
        spread = max(float(values.max() - values.min()), 1e-6)
        values = ((values - values.min()) / spread).transpose(1, 0, 2)[::-1]
    if values.dtype != np.uint8:
        values = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values[..., :3])
    scale = max(1, _PICTURE_HEIGHT // max(values.shape[0], 1))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, "PNG")
    return (f"<img alt='{image.width} x {image.height}' "
            f"src='data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}'>")
