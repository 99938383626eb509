"""One PNG page that shows what a model learned: what it saw, heard, read, and made of it.

Takes arrays and strings only: it knows no model, task or dataset. matplotlib is imported when a
page is written, and never chooses a window system: it draws into a file.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError

_WIDTH = 11.0  # inches; 110 dots each
_DOTS = 110
_FIGURE_LETTERS = 25  # of size 8.5 in a sixth of the width
_INK, _FAINT, _RIGHT, _WRONG = "#1d2530", "#7a8594", "#1b7f4b", "#c0392b"
_COLOURS = ("#2b6cb0", "#d97706", "#1b7f4b", "#9333ea", "#c0392b", "#0e7490")


class Section(Protocol):
    """A part of the page: it has a title, knows its height and draws itself."""

    @property
    def title(self) -> str:
        """Heading."""

    def height(self) -> float:
        """Height below the title, in inches."""

    def draw(self, figure: Any) -> None:
        """Draws into a matplotlib SubFigure of that height."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """A strip of numbers.

    Attributes:
        title: heading.
        values: name and value, six to a line; floats below 10 are shown with three decimals. A
            name too wide for its place goes on in the next line.
    """

    title: str
    values: Mapping[str, float | int | str]

    def _names(self) -> list[list[str]]:
        return [textwrap.wrap(name, _FIGURE_LETTERS) or [""] for name in self.values]

    def _line_heights(self) -> list[float]:
        """Inches of each line of six."""
        lines = [len(name) for name in self._names()] or [1]
        return [0.56 + 0.16 * max(lines[first:first + 6]) for first in range(0, len(lines), 6)]

    def height(self) -> float:
        return sum(self._line_heights()) + 0.1

    def draw(self, figure: Any) -> None:
        total, heights = self.height(), self._line_heights()
        for index, (name, value) in enumerate(zip(self._names(), self.values.values(),
                                                  strict=True)):
            x, top = (index % 6 + 0.06) / 6, sum(heights[:index // 6])
            _text(figure, x, 1 - (top + 0.3) / total, _number(value), size=17, weight="bold",
                  va="center")
            _text(figure, x, 1 - (top + 0.5) / total, "\n".join(name), size=8.5, color=_FAINT,
                  va="top", linespacing=1.25)


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Pictures with what the model said of them.

    Attributes:
        title: heading.
        pictures: each [height, width], [height, width, 1] or [height, width, 3], in [0, 1] for
            images; for spectrograms any scale, [frames, filters].
        said: what the model said, or under what it drew: one line each.
        expected: what it should have said; None where nothing is known.
        kind: 'image', or 'spectrogram' (drawn with time to the right and low pitch at the bottom).
        asked: the request above each picture; None for no line.
        columns: pictures to a line.
    """

    title: str
    pictures: Sequence[np.ndarray]
    said: Sequence[str]
    expected: Sequence[str | None] | None = None
    kind: str = "image"
    asked: Sequence[str] | None = None
    columns: int = 10

    def __post_init__(self) -> None:
        if self.kind not in ("image", "spectrogram"):
            raise UserError("a picture is an image or a spectrogram", got=self.kind)
        if self.columns < 1:
            raise UserError("a line holds at least one picture", got=self.columns)
        for name in ("said", "expected", "asked"):
            lines = getattr(self, name)
            if lines is not None and len(lines) != len(self.pictures):
                raise UserError(f"'{self.title}': {name} needs one entry per picture",
                                got=f"{len(lines)} for {len(self.pictures)} pictures")

    def _rows(self) -> int:
        return max(1, -(-len(self.pictures) // self.columns))

    def height(self) -> float:
        picture = _WIDTH / self.columns * (0.62 if self.kind == "spectrogram" else 0.78)
        return self._rows() * (picture + (0.72 if self.asked else 0.42))

    def draw(self, figure: Any) -> None:
        axes = figure.subplots(self._rows(), self.columns, squeeze=False).ravel()
        room = self.height() / self._rows()
        figure.subplots_adjust(
            left=0.012, right=0.988, wspace=0.12, bottom=0.34 / self.height(),
            hspace=(0.68 if self.asked else 0.55) / room + 0.08,
            top=1 - (0.34 if self.asked else 0.03) / self.height())
        letters = int(190 / self.columns)
        for index, ax in enumerate(axes):
            ax.set_axis_off()
            if index >= len(self.pictures):
                continue
            _picture(ax, np.asarray(self.pictures[index], np.float32), self.kind)
            expected = self.expected[index] if self.expected is not None else None
            right = expected is None or self.said[index] == expected
            mark = "" if expected is None else ("✓ " if right else "✗ ")
            said = textwrap.shorten(mark + self.said[index], letters, placeholder="…")
            colour = _INK if expected is None else (_RIGHT if right else _WRONG)
            _beside(ax, said, -4, size=7.6, color=colour)
            if not right:
                note = textwrap.shorten(f"not {expected}", letters, placeholder="…")
                _beside(ax, note, -15, size=6.5, color=_FAINT)
            if self.asked is not None:
                asked = textwrap.wrap(self.asked[index], letters + 1, max_lines=2, placeholder="…")
                _beside(ax, "\n".join(asked), 4, size=6.5, color=_FAINT)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts the model read and what it wrote.

    Attributes:
        title: heading.
        rows: for each sample, (label, text) pairs in the order shown, e.g. ('reads', …),
            ('writes', …), ('original', …). Sentinels `<extra_id_3>` are shown as ⟨3⟩.
    """

    title: str
    rows: Sequence[Sequence[tuple[str, str]]]

    def _lines(self) -> list[list[tuple[str, list[str]]]]:
        return [[(label, textwrap.wrap(_short_sentinels(text), 128) or [""])
                 for label, text in sample] for sample in self.rows]

    def height(self) -> float:
        lines = sum(len(wrapped) for sample in self._lines() for _, wrapped in sample)
        return 0.175 * lines + 0.14 * max(1, len(self.rows))

    def draw(self, figure: Any) -> None:
        total, y = self.height(), 0.02
        for sample in self._lines():
            for place, (label, wrapped) in enumerate(sample):
                _text(figure, 0.012, 1 - y / total, label, size=8, color=_FAINT, va="top")
                colour = _INK if place != 1 else _COLOURS[0]
                for line in wrapped:
                    _text(figure, 0.085, 1 - y / total, line, size=8.2, color=colour, va="top",
                          family="monospace")
                    y += 0.175
            y += 0.14


@dataclasses.dataclass(frozen=True)
class Curves:
    """Lines over training steps.

    Attributes:
        title: heading.
        lines: by name, (steps [n], values [n]); values that are not finite are left out.
        levels: horizontal dashed lines by name, e.g. the loss of a unigram model.
        unit: label of the vertical axis.
    """

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: str = "loss, nats per token"

    def height(self) -> float:
        return 3.0

    def draw(self, figure: Any) -> None:
        ax = figure.add_axes((0.06, 0.15, 0.92, 0.80))
        for index, (name, (steps, values)) in enumerate(self.lines.items()):
            finite = np.isfinite(np.asarray(values, float))
            x, y = np.asarray(steps, float)[finite], np.asarray(values, float)[finite]
            if not x.size:
                continue
            colour = _COLOURS[index % len(_COLOURS)]
            smooth = _smooth(y)
            ax.plot(x, y, color=colour, alpha=0.25, lw=0.8)
            ax.plot(x, smooth, color=colour, lw=1.7, label=f"{name}: {smooth[-1]:.2f}")
        for index, (name, level) in enumerate(self.levels.items()):
            ax.axhline(level, color=_FAINT, lw=1, ls=("--", ":", "-.")[index % 3],
                       label=f"{name}: {level:.2f}")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.grid(True, axis="y", color="#e6e9ee", lw=0.8)
        ax.set_axisbelow(True)
        ax.set_xlabel("step", size=8, color=_FAINT)
        ax.set_ylabel(self.unit, size=8, color=_FAINT)
        ax.tick_params(labelsize=8, colors=_FAINT)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8.5, labelcolor=_INK)


def write_page(path: storage.PathLike, title: str, sections: Sequence[Section],
               subtitle: str = "") -> storage.PathLike:
    """Writes a PNG page of sections, one under the other; a reader never sees half a file.

    Args:
        path: the PNG file; its folder is made.
        title: the page's heading.
        sections: `Figures`, `Captioned`, `Texts`, `Curves`, or anything with a title, a height and
            a draw method.
        subtitle: one line under the heading.

    Returns:
        The path.

    Raises:
        UserError: there are no sections, or matplotlib is not installed.
    """
    if not sections:
        raise UserError("a page needs at least one section")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the page is drawn with matplotlib, which is not installed",
                        fix="pip install matplotlib") from error
    heading, gap = 0.95, 0.52
    heights = [heading, *(section.height() + gap for section in sections)]
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=_DOTS, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0)
    _text(parts[0], 0.012, 0.62, title, size=20, weight="bold", va="center")
    _text(parts[0], 0.012, 0.22, subtitle, size=9.5, color=_FAINT, va="center")
    for part, section, height in zip(parts[1:], sections, heights[1:], strict=True):
        head, body = part.subfigures(2, 1, height_ratios=(gap, height - gap), hspace=0)
        _text(head, 0.012, 0.38, section.title, size=11.5, weight="bold", va="center")
        head.add_artist(_rule())
        section.draw(body)
    drawn = io.BytesIO()
    canvas.print_png(drawn)
    storage.write_bytes(path, drawn.getvalue())
    return path


def read_curves(path: storage.PathLike,
                prefix: str = "loss/") -> dict[str, tuple[list[int], list[float]]]:
    """Returns the curves of a metrics.jsonl, {modality: (steps, values)}, of keys under `prefix`.

    A run that was resumed writes some steps again: the last line of a step counts. A last line
    that was cut off by a kill is left out.

    Raises:
        UserError: the file cannot be read, or a line before the last is not JSON.
    """
    try:
        lines = storage.read_text(path).splitlines()
    except storage.StorageError:
        raise
    except OSError as error:
        raise UserError("the metrics cannot be read", got=f"{path}: {error.strerror or error}",
                        fix="give MODEL_DIR/metrics.jsonl") from error
    curves: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError("a line of the metrics is not JSON", got=f"{path}:{number}") from error
        for name, value in entry.items():
            if name.startswith(prefix) and isinstance(value, int | float):
                curves.setdefault(name[len(prefix):], {})[int(entry["step"])] = float(value)
    return {name: (sorted(values), [values[step] for step in sorted(values)])
            for name, values in curves.items()}


def _text(figure: Any, x: float, y: float, text: str, **style: Any) -> None:
    figure.text(x, y, text, parse_math=False, **{"color": _INK, **style})


def _beside(ax: Any, text: str, points: float, **style: Any) -> None:
    """Centres a line below (points < 0) or above the axes, at a distance in points."""
    ax.annotate(text, (0.5, 0.0 if points < 0 else 1.0), xytext=(0, points),
                xycoords="axes fraction", textcoords="offset points", ha="center",
                va="top" if points < 0 else "bottom", parse_math=False, **style)


def _number(value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _rule() -> Any:
    from matplotlib.lines import Line2D

    return Line2D((0.012, 0.988), (0.1, 0.1), color="#d5dae1", lw=0.9)


def _picture(ax: Any, picture: np.ndarray, kind: str) -> None:
    if kind == "spectrogram":
        ax.imshow(picture.T, origin="lower", aspect="auto", cmap="magma", interpolation="nearest")
        return
    if picture.ndim == 3 and picture.shape[-1] == 1:
        picture = picture[..., 0]
    ax.imshow(np.clip(picture, 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")


def _short_sentinels(text: str) -> str:
    return re.sub(r"<extra_id_(\d+)>", r"⟨\1⟩", text)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of up to 1/15 of the curve around each point; at the ends of what there is."""
    reach = max(len(values) // 30, 0)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
