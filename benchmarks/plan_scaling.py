"""How messages grow from 8 to 512 chips: writes results/plan_scaling.{jsonl,md,png}.

usage: python benchmarks/plan_scaling.py [--model=base] [--chips=8,64,512]

Needs the extra `plan`. Programs are compiled for TPU v4 slices with two rows a chip, once with as
many chips on `fsdp` as divide the width of `base` (768 = 3 x 256) and once with `fsdp` 8 and copies
along `data`. Rows that the .jsonl has already are not compiled again. Seconds are bytes over the
data sheet's link speed, and a guess for each hop.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from common import HERE, RESULTS, ROOT, environment

from vishwam_t5x.planning.report import duration, size

CHIPS = (8, 16, 32, 64, 128, 256, 512)
FILE = RESULTS / "plan_scaling.jsonl"
MESHES = {"fsdp up to 256": 256, "fsdp 8, copies on data": 8}


def plan(model: str, chips: int, kind: str) -> dict[str, Any]:
    """Returns the figures of one compiled program."""
    arguments = [
        f"--gin_file={HERE}/plan_recipe.gin", f"--gin_file={ROOT}/gin/models/{model}.gin",
        f"--gin_file={ROOT}/gin/hardware/tpu_v4_8.gin",
        f"--gin.mesh.MeshConfig.fsdp={min(chips, MESHES[kind])}", f"--gin.BATCH_SIZE={2 * chips}",
        f"--target=tpu-v4-{2 * chips}", "--quick", "--json"]
    done = subprocess.run([sys.executable, "-m", "vishwam_t5x", "plan", *arguments],
                          env=environment(), capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {"model": model, "chips": chips, "kind": kind, **json.loads(done.stdout)}


def markdown(found: list[dict[str, Any]]) -> str:
    """Returns the table."""
    lines = ["| chips | mesh | sent by a chip | messages | compute | messages / compute | "
             "a device |", "|" + "---|" * 7]
    for row in sorted(found, key=lambda row: (row["kind"], row["chips"])):
        best = row["estimate"]
        sent = sum(one["sent_bytes"] for one in row["collectives"])
        lines.append("| " + " | ".join([
            str(row["chips"]), row["kind"], size(sent), duration(best["messages"]),
            duration(best["compute"]), f"{best['messages'] / best['compute']:.2f}",
            size(row["bytes"]["total"])]) + " |")
    return "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]], model: str) -> None:
    """Draws seconds of messages, compute and memory over chips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind in MESHES:
        line = sorted((row["chips"], row["estimate"]) for row in found if row["kind"] == kind)
        if line:
            axes.plot([chips for chips, _ in line], [1e3 * best["messages"] for _, best in line],
                      marker="o", label=f"messages, {kind}")
    line = sorted((row["chips"], row["estimate"]["compute"]) for row in found)
    axes.plot([chips for chips, _ in line], [1e3 * seconds for _, seconds in line],
              color="black", linestyle="--", label="compute, at the peak")
    axes.set(xscale="log", ylim=(0, None), xlabel="TPU v4 chips, 2 rows each", ylabel="ms a step",
             title=f"{model}: a step's parts by roofline, compiled programs")
    axes.set_xticks(sorted({row["chips"] for row in found}),
                    [str(n) for n in sorted({row["chips"] for row in found})])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "plan_scaling.png", dpi=120)


def main(argv: list[str]) -> None:
    given = dict(word.lstrip("-").partition("=")[::2] for word in argv)
    model = given.get("model", "base")
    chips = [int(n) for n in given["chips"].split(",")] if "chips" in given else list(CHIPS)
    RESULTS.mkdir(exist_ok=True)
    found = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    found = [row for row in found if row["model"] == model]
    done = {(row["chips"], row["kind"]) for row in found}
    for count in chips:
        for kind in MESHES:
            if (count, kind) in done:
                continue
            found.append(plan(model, count, kind))
            with FILE.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
            print(count, kind, duration(found[-1]["estimate"]["messages"]), flush=True)
    (RESULTS / "plan_scaling.md").write_text(markdown(found))
    print(markdown(found))
    plot(found, model)


if __name__ == "__main__":
    main(sys.argv[1:])
