"""Prints what results/*.jsonl hold as the Markdown tables of README.md.

usage: python benchmarks/table.py
"""

from __future__ import annotations

import json

from common import RESULTS


def main() -> None:
    for path in sorted(RESULTS.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if "figure" not in lines[0]:
            continue  # plans, which have a table of their own
        print(f"**{path.stem}** ({lines[0]['date']}, {lines[0]['machine']}, "
              f"Python {lines[0]['python']}, jax {lines[0]['jax']})\n")
        print("| figure | median | unit | smallest to largest | of | bar | T5X |")
        print("|---|---|---|---|---|---|---|")
        for line in lines:
            bar = f"<= {line['at_most']:g}" if "at_most" in line else \
                f">= {line['at_least']:g}" if line.get("at_least") is not None else ""
            print(f"| {line['figure']} | {line['value']:g} | {line['unit']} | {line['min']:g} to "
                  f"{line['max']:g} | {line['median_of']} | {bar} | {line.get('t5x', '')} |")
        print()


if __name__ == "__main__":
    main()
