"""The PNG page: every section lands on it, and it is written whole."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import helpers
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation import page


def sections() -> list[page.Section]:
    rng = np.random.default_rng(0)
    digits = rng.uniform(size=(13, 8, 8, 1))
    captions = [f"the digit {i}" for i in range(13)]
    steps = np.arange(50)
    return [
        page.Figures("Numbers", {"share": 0.5, "count": 7, "name": "x", "loss": 4.8, "a": 1.0,
                                 "b": 2.0, "c": 3.0}),
        page.Captioned("Digits", digits, captions, ["the digit 0"] * 13),
        page.Captioned("Tones", rng.normal(size=(4, 16, 48)), captions[:4], kind="spectrogram",
                       columns=4),
        page.Captioned("Drawn", rng.uniform(size=(5, 8, 8, 3)), captions[:5],
                       asked=["draw a $7 ^_ digit"] * 5),
        page.Texts("Texts", [[("reads", "a <extra_id_0> b " * 60), ("writes", "$x_ ^ %")]]),
        page.Curves("Losses", {"text": (steps, 7 - 0.04 * steps), "bad": ([0], [float("nan")])},
                    {"unigram": 5.57}),
    ]


def read(path):
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float32)


def test_a_page_of_every_section(tmp_path):
    parts = sections()
    path = page.write_page(tmp_path / "made" / "page.png", "A page", parts, subtitle="of a test")
    pixels = read(path)
    inches = 0.95 + sum(part.height() + 0.52 for part in parts)
    assert pixels.shape[1] == 1210 and abs(pixels.shape[0] - inches * 110) < 3
    assert [file.name for file in path.parent.iterdir()] == ["page.png"]
    # Every section has left ink in its own band of the page.
    top = 0.95
    for part in parts:
        band = pixels[int(110 * (top + 0.52)):int(110 * (top + 0.52 + part.height()))]
        assert (band < 200).any(axis=-1).mean() > 0.001, part.title
        top += part.height() + 0.52


def test_a_wrong_answer_is_red_and_a_right_one_green(tmp_path):
    def colours(said):
        section = page.Captioned("Digit", np.zeros((1, 8, 8)), [said], ["seven"], columns=1)
        pixels = read(page.write_page(tmp_path / "page.png", "x", [section]))
        red = (pixels[..., 0] - pixels[..., 1] > 60).sum()
        green = (pixels[..., 1] - pixels[..., 0] > 60).sum()
        return red, green

    assert colours("seven")[0] == 0 and colours("seven")[1] > 10
    assert colours("nine")[1] == 0 and colours("nine")[0] > 10


def test_a_spectrogram_has_time_to_the_right_and_low_pitch_below(tmp_path):
    loud = np.zeros((16, 48))
    loud[12:, :8] = 1.0  # late and low
    section = page.Captioned("Tone", [loud], ["x"], kind="spectrogram", columns=1)
    pixels = read(page.write_page(tmp_path / "page.png", "x", [section]))
    bright = np.argwhere((pixels[..., 0] > 240) & (pixels[..., 2] < 210))
    body = pixels[int(110 * 1.47):]
    assert bright[:, 1].mean() > 0.75 * pixels.shape[1]
    assert bright[:, 0].mean() - 110 * 1.47 > 0.5 * len(body)


def test_curves_come_from_the_metrics_file(tmp_path):
    lines = [{"step": 10, "loss": 3.0, "loss/text": 5.0, "loss/image": 4.0},
             {"step": 20, "loss/text": 4.5}, {"step": 20, "loss/text": 4.25},
             {"step": 30, "loss/text": float("nan"), "seconds_per_step": 1.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 40, "loss/te')
    curves = page.read_curves(path)
    assert set(curves) == {"text", "image"}
    assert curves["text"][0] == [10, 20, 30] and curves["text"][1][:2] == [5.0, 4.25]
    assert curves["image"] == ([10], [4.0])
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        path.write_text("nonsense\n{}")
        page.read_curves(path)
    with pytest.raises(UserError, match="cannot be read"):
        page.read_curves(tmp_path / "absent.jsonl")


def test_smoothing_keeps_a_line_and_the_mean():
    line = np.linspace(5.0, 2.0, 91)
    smooth = page._smooth(line)
    np.testing.assert_allclose(smooth[5:-5], line[5:-5], atol=1e-9)
    assert page._smooth(np.array([3.0])).tolist() == [3.0]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="at least one section"):
        page.write_page(tmp_path / "page.png", "x", [])
    with pytest.raises(UserError, match="one entry per picture"):
        page.Captioned("Digits", np.zeros((2, 8, 8)), ["one"])
    with pytest.raises(UserError, match="spectrogram"):
        page.Captioned("Digits", [], [], kind="sound")


def test_importing_the_page_does_not_import_matplotlib():
    code = ("import sys, vishwam_t5x.evaluation.page\n"
            "sys.exit(any(name.split('.')[0] == 'matplotlib' for name in sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], env=helpers.environment(),
                          check=False).returncode == 0


@pytest.mark.parametrize("section", [
    page.Figures("Numbers", dict.fromkeys(
        ("image to text exact match", "text to image recogniser accuracy", "audio: exact match",
         "image text denoise: image unigram", "image text denoise: text unigram", "text: loss",
         "image text denoise: image loss", "short", "text to image recognised"), 1.0)),
    page.Captioned("Drawn", np.zeros((10, 8, 8)), ["3"] * 10,
                   asked=["a picture of the digit three", "show a handwritten eight"] * 5)],
    ids=["figures", "requests"])
def test_labels_stay_in_their_own_place(section):
    """No text of a section runs into another's, nor out of the section."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, section.height()), dpi=110)
    canvas = FigureCanvasAgg(figure)
    section.draw(figure)
    canvas.draw()
    texts = [text for text in [*figure.texts, *(text for ax in figure.axes for text in ax.texts)]
             if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) >= 18
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= 1210 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 + 1
        for other in boxes[:index]:
            assert not box.overlaps(other), texts[index]
