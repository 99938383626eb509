"""The packing that the benchmarks compare with is the original's."""

from __future__ import annotations

import importlib.util
import pathlib

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "pair_packing.py"

# Encoder and decoder tokens of examples, and the pairs that the original made of them in rows of
# 64 / 48 with a pool of 10.
INPUTS = [49, 9, 14, 18, 14, 49, 52, 37, 7, 10, 23, 28, 39, 31, 19, 13, 43, 45, 6, 11, 29, 26, 53,
          33, 28, 28, 41, 37, 14, 45, 46, 57, 48, 20, 22, 40, 40, 43, 52, 21]
TARGETS = [37, 3, 5, 39, 37, 14, 8, 14, 4, 35, 27, 24, 12, 20, 10, 31, 20, 4, 12, 29, 22, 16, 12,
           6, 25, 27, 22, 37, 37, 10, 25, 26, 12, 14, 21, 30, 13, 29, 27, 11]
PAIRS = [(2, 1), (4, 3), (9, 6), (10, 7), (11, 8), (14, 12), (15, 5), (16, 13), (19, 17), (20, 18),
         (22, 21), (25, 24), (30, 29), (34, 27), (35, 26), (40, 28)]


def pair_packing():
    spec = importlib.util.spec_from_file_location("pair_packing", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_are_the_original_s():
    module = pair_packing()
    examples = [module.Sizes(*sizes) for sizes in zip(INPUTS, TARGETS, strict=True)]
    rows = list(module.pairs(examples, module.Sizes(64, 48)))
    assert [tuple(number + 1 for number in row) for row in rows] == PAIRS


def test_what_finds_no_partner_waits_or_goes_alone():
    module = pair_packing()
    long = [module.Sizes(60, size) for size in (30, 40, 20, 35)]
    assert list(module.pairs(long, module.Sizes(64, 48), pool_size=2)) == [(1,), (3,)]
