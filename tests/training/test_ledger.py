"""Where the time went: counted by phase, read back whole or killed, drawn on a page."""

import json

import numpy as np
import pytest
from PIL import Image

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.training import ledger, run_page
from vishwam_t5x.training.run_dir import RunDir


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def spend(book, clock, **phases):
    for phase, seconds in phases.items():
        with book.spend(phase):
            clock.now += seconds


def test_time_is_counted_once_by_the_innermost_phase(tmp_path):
    clock = Clock()
    book = ledger.Ledger(tmp_path / "ledger.jsonl", clock)
    clock.now += 2
    book.start(0)
    book.enter("host")
    with book.spend("eval"):
        clock.now += 3
        with book.spend("save"):
            clock.now += 5
        clock.now += 1
    clock.now += 0.5
    book.close("finished")
    book.close("said twice")
    (session,) = ledger.read(tmp_path / "ledger.jsonl")
    assert session.seconds == {"init": 2, "cache": 0, "compile": 0, "data_wait": 0,
                               "step": 0, "host": 0.5, "eval": 4, "save": 5}
    assert session.why == "finished"


def two_sessions(folder):
    """One killed after step 8, and one that took steps 6 to 8 again."""
    clock = Clock()
    first = ledger.Ledger(folder / "ledger.jsonl", clock)
    first.start(0)
    spend(first, clock, compile=10, step=40)
    first.progress(8)
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"event": "progr')  # killed while writing
    with (folder / "ledger.jsonl").open("a") as file:
        file.write("\n")
    records = [{"step": step, "seconds_per_step": 5.0, "loss": 3.0 - step / 10, "eval/loss": None}
               for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    second = ledger.Ledger(folder / "ledger.jsonl", clock)
    second._session = "second"
    second.start(5, records)
    spend(second, clock, step=30)
    second.close("Preempted: stopped")


def test_a_killed_session_and_work_done_twice(tmp_path):
    two_sessions(tmp_path)
    killed, last = ledger.read(tmp_path / "ledger.jsonl")
    assert (killed.first_step, killed.last_step, killed.why) == (0, 8, "killed")
    assert (last.first_step, last.lost_steps, last.lost_seconds) == (5, 3, 15.0)
    times = ledger.goodput([killed, last])
    assert (times["step"], times["lost"], times["compile"]) == (70, 15, 10)
    assert times["goodput"] == pytest.approx(55 / times["total"])


def test_the_page_of_a_run(tmp_path):
    with pytest.raises(UserError, match="no run"):
        run_page.summary(RunDir(tmp_path))
    two_sessions(tmp_path)
    text = run_page.summary(RunDir(tmp_path))
    assert "step 8: loss 2.2" in text and "3 steps taken again" in text and "lost" in text
    run_page.draw(RunDir(tmp_path), tmp_path / "deep" / "run.png")
    assert (tmp_path / "deep" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_a_codec_shows_what_came_back(tmp_path):
    two_sessions(tmp_path)
    sizes = []
    for page in ("without.png", "with.png"):
        run_page.draw(RunDir(tmp_path), tmp_path / page)
        with Image.open(tmp_path / page) as drawn:
            sizes.append(drawn.size)
            red = np.asarray(drawn)[..., :3] == (255, 0, 0)
            assert red.all(-1).any() == (page == "with.png")
        Image.new("RGB", (200, 100), (255, 0, 0)).save(tmp_path / run_page.PICTURE)
    assert sizes[1][0] == sizes[0][0] and sizes[1][1] > sizes[0][1]
