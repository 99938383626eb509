"""Which models fit which hardware: writes results/plans.jsonl, results/plans.md and README's table.

usage: python benchmarks/plan_table.py [--models=base,large,xl,xxl] [--targets=tpu-v3-8,...]
                                       [--search=3] [--table]

Needs the extra `plan`. A row that results/plans.jsonl has already is not compiled again; delete the
line to do so. --table only writes the Markdown. Batches are 4 rows a device (1 on a GTX 1650),
as many as a run of that size would hold; compilations use the compiler's least effort.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from common import HERE, RESULTS, ROOT, environment

from vishwam_t5x.planning import targets
from vishwam_t5x.planning.report import duration, size

MODELS = ("base", "large", "xl", "xxl")
TARGETS = ("tpu-v3-8", "tpu-v3-32", "tpu-v4-8", "tpu-v4-32", "tpu-v4-128", "tpu-v4-512",
           "tpu-v5e-16", "h200x2", "gtx1650")
ROWS = {"gtx1650": 1}
FILE, TABLE = RESULTS / "plans.jsonl", RESULTS / "plans.md"
BEGIN, END = "<!-- plans: python benchmarks/plan_table.py --table -->\n", "<!-- end of plans -->"
SHORT = (0, 1, 2, 3, 4, 5, 6, 8, 10)
"""Columns of the table that README shows."""


def flags(model: str, target: str) -> list[str]:
    """Returns what `vishwam plan` is asked."""
    batch = targets.resolve(target).num_devices * ROWS.get(target, 4)
    found = [f"--gin_file={HERE}/plan_recipe.gin", f"--gin_file={ROOT}/gin/models/{model}.gin",
             f"--gin.BATCH_SIZE={batch}", f"--target={target}", "--quick", "--json"]
    if target == "gtx1650":  # four gigabytes: an optimizer that keeps next to no state
        found.insert(2, f"--gin_file={ROOT}/gin/optimizers/adafactor.gin")
    return found


def plan(model: str, target: str, most: int) -> dict[str, Any]:
    """Returns the best row of a search; {'error': ...} where there is none.

    The most promising program first; others only where that one does not fit.
    """
    row: dict[str, Any] = {"model": model, "target": target}
    for count in (1, most) if most > 1 else (1,):
        done = subprocess.run(
            [sys.executable, "-m", "vishwam_t5x", "plan", *flags(model, target),
             f"--search={count}"],
            env=environment(), capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            return {**row, "error": done.stderr.strip().splitlines()[:3]}
        ranking = json.loads(done.stdout)["ranking"]
        if ranking[0]["fits"]:
            break
    return {**row, "programs": len(ranking), **ranking[0]}


def rows() -> list[dict[str, Any]]:
    """Returns the rows so far."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def markdown(found: list[dict[str, Any]]) -> str:
    """Returns the table."""
    lines = ["| model | target | fits | a device | mesh | remat | microbatches | batch | step at "
             "best | no overlap | bound by | MFU at best |", "|" + "---|" * 12]
    order = {(model, target): (MODELS.index(model), TARGETS.index(target))
             for model in MODELS for target in TARGETS}
    for row in sorted(found, key=lambda row: order[row["model"], row["target"]]):
        if "error" in row:
            lines.append(f"| {row['model']} | {row['target']} | - | {' '.join(row['error'])} |"
                         + " |" * 8)
            continue
        axes = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1)
        best = row["estimate"]
        times = ([duration(best["best"]), duration(best["worst"]), best["bound"],
                  f"{100 * best['mfu']:.0f} %"] if best["best"] and row["fits"] else [""] * 4)
        lines.append("| " + " | ".join([
            row["model"], row["target"],
            "tight" if row["tight"] else "yes" if row["fits"] else "no",
            f"{size(row['bytes']['total'])} of {size(row['limit_bytes'])}", axes or "one device",
            row["remat"], str(row["microbatches"]), str(row["batch_size"]), *times]) + " |")
    return "\n".join(lines) + "\n"


def short(table: str) -> str:
    """Returns README's part of the table: fewer columns."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return "".join("|" + "|".join(row[n] for n in SHORT) + "|\n" for row in rows)


def publish(table: str) -> None:
    """Puts the table into README, between its two marks."""
    path = ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path} has no line {BEGIN.strip()!r} followed by {END!r}")
    path.write_text(f"{before}{BEGIN}{short(table)}{end}{after}", encoding="utf-8")


def main(argv: list[str]) -> None:
    given = dict(word.lstrip("-").partition("=")[::2] for word in argv)
    found = rows()
    done = {(row["model"], row["target"]) for row in found}
    if "table" not in given:
        RESULTS.mkdir(exist_ok=True)
        for target in given.get("targets", ",".join(TARGETS)).split(","):
            for model in given.get("models", ",".join(MODELS)).split(","):
                if (model, target) in done:
                    continue
                row = plan(model, target, int(given.get("search", 3)))
                found.append(row)
                with FILE.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(model, target, row.get("error") or ("fits" if row["fits"] else "too big"),
                      flush=True)
    found = rows()  # with what another process has added meanwhile
    TABLE.write_text(markdown(found))
    publish(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main(sys.argv[1:])
