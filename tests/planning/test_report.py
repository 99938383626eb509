"""What is said of figures, and of compilers that fail."""

import dataclasses
import signal

import pytest

from vishwam_t5x.planning import process, report, roofline, targets, traffic
from vishwam_t5x.planning.compile import out_of_memory_bytes
from vishwam_t5x.planning.figures import Bytes, Cache, Figures
from vishwam_t5x.planning.hlo import parse


def figures(total, traffic_bytes=10**9, compiled=True):
    """Of a program that needs so many bytes on a TPU v4."""
    return Figures("tpu-v4-8", "", compiled, False, 0, Bytes(0, 0, 0, 0, total, total, total),
                   1e14, traffic_bytes, True, (), {"fsdp": 4}, "none", 1, "bfloat16", 16, 0.0, 0.0)


@pytest.mark.parametrize("count, said", [
    (0, "0 B"), (999, "999 B"), (999.6 * 2**20, "0.976 GiB"), (1234 * 2**30, "1234 GiB"),
    (31.25 * 2**30, "31.2 GiB")])
def test_sizes(count, said):
    assert report.size(count) == said


@pytest.mark.parametrize("seconds, said", [
    (0, "0 us"), (41.24e-3, "41.2 ms"), (0.99996, "1 s"), (1234, "1234 s"), (12e-6, "12 us")])
def test_durations(seconds, said):
    assert report.duration(seconds) == said


def test_remembered_figures_are_judged_anew(tmp_path):
    """The memory of this machine, or our table of it, may have changed since."""
    target, cache = targets.resolve("tpu-v4-8"), Cache(tmp_path / "plans")
    key = Cache.key("program", 4)
    assert cache.get(key) is None and key != Cache.key("program", 8)
    kept = figures(target.limit_bytes // 2)
    cache.put(key, dataclasses.replace(kept, fits=False, limit_bytes=1))
    assert cache.get(key).judged(target) == kept.judged(target)
    (tmp_path / "plans" / f"{key}.json").write_text("{")
    assert cache.get(key) is None


def test_three_verdicts():
    target = targets.resolve("tpu-v4-8")
    limit = target.limit_bytes
    for total, compiled, said in ((limit // 2, True, "FITS: "),
                                  (limit * 95 // 100, True, "TIGHT: "),
                                  (limit * 2, False, "DOES NOT FIT: ")):
        found = figures(total, compiled=compiled).judged(target)
        assert said in report.page(found, target)
        assert report.to_json(found, target)["tight"] == (said == "TIGHT: ")
        assert found.fits == compiled


def test_what_is_known_of_the_time_where_nothing_fits():
    target = targets.resolve("tpu-v4-8")
    found = figures(10**12, None, compiled=False).judged(target)
    best = roofline.estimate(found, target)
    assert best.best == pytest.approx(1e14 / (4 * 275e12)) and best.worst is None
    assert best.mfu == pytest.approx(1)
    assert "the rest is not known" in report.page(found, target)


def test_bytes_in_the_words_of_compilers_without_memory():
    assert out_of_memory_bytes("Used 33.50G of 30.75G hbm. Exceeded", 7) == int(33.5 * 2**30)
    assert out_of_memory_bytes("bytes for HLO temporaries (2.0M) exceeds", 7) == 2 * 2**20 + 7
    assert out_of_memory_bytes("RESOURCE_EXHAUSTED: no more", 7) == 7
    assert out_of_memory_bytes("INTERNAL: something else", 7) is None


def test_a_compiler_that_breaks_down_is_told_apart_from_one_without_memory():
    killed = process.broken(-signal.SIGKILL, "")
    assert "out of memory" in killed.problem and "scan_layers" in killed.fix
    failed = process.broken(-signal.SIGABRT, "noise\nF0101 Check failed: x == y\nmore\n")
    assert "SIGABRT" in failed.problem and "Check failed" in failed.got
    assert "noise" not in failed.got


def test_an_update_in_place_moves_only_its_slice():
    module = parse("""\
HloModule m

ENTRY %main (a: f32[64,8], b: f32[1,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[64,8]{1,0} dynamic-update-slice(%a, %b, %i, %i)
}
""")
    assert traffic.memory_bytes(module) == 2 * 32
