"""How full rows are on the quickstart's mixture: ours, two examples a row, one a row.

usage: python benchmarks/packing.py [--rows=4096]

The volume bound is the larger of encoder and decoder tokens over the length of a row: rows that no
packing can do without. A share of it is reported; lengths alone are needed, nothing is trained. The
cache of the mixture is written first if it is missing, which takes a minute and TensorFlow.
"""

from __future__ import annotations

import argparse

from common import ROOT, Figures

from vishwam_t5x import gin_config
from vishwam_t5x.data import source
from vishwam_t5x.data.packing_plan import packing_report
from vishwam_t5x.train import train

LIMITS = {"packed": None, "two_per_row": 2, "one_per_row": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    options = parser.parse_args()
    figures = Figures("packing")
    for batch_size in (16, 256):
        config = gin_config.parse(
            [f"--gin_file={ROOT / 'gin/recipes/quickstart_cpu.gin'}",
             f"--gin.BATCH_SIZE={batch_size}"], "train")
        bound = config.arguments(train)
        dataset = source.open_dataset(bound["train_dataset_cfg"], bound["objective"],
                                      model=bound["model"].config)
        for name, limit in LIMITS.items():
            report = packing_report(dataset.examples, dataset.objective, dataset.spec,
                                    dataset.config.seed, options.rows // batch_size, limit)
            figures.add(
                f"{name}_{batch_size}_rows", [report.efficiency], "share",
                at_least=0.92 if limit is None else None,
                examples_per_row=round(report.num_examples / report.rows_used, 3),
                encoder_fill=round(report.input_fill, 4),
                decoder_fill=round(report.target_fill, 4))
    figures.write()


if __name__ == "__main__":
    main()
