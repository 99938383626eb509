"""Our train step and decoding beside Hugging Face's T5 in eager PyTorch, of the same parameters.

usage: python benchmarks/beside_huggingface.py [--size=19.6M] [--windows=7] [--only=train,beam]

Needs the extra `bench`. The two sides are processes of their own that take turns, one waiting while
the other works. They start from one folder, and must agree first: on the loss of three steps to
1e-4 of it, and on the tokens. A ratio is the median over windows of theirs over ours, one right
after the other; above 1, ours takes less.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from beside_workers import NEW_TOKENS
from common import HERE, ROOT, Figures, environment

SIZES = {
    # 19.6 million parameters, most of them in the tables.
    "19.6M": {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_heads": 4, "num_layers": 2,
              "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    # T5 1.0's own small size: 60.5 million.
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6,
              "feed_forward_proj": "relu", "tie_word_embeddings": True}}
ROWS, INPUTS, TARGETS, VOCABULARY = 8, 128, 32, 32128
CALLS = {"train": 5, "greedy": 1, "beam": 1}


class Side:
    """A worker process."""

    def __init__(self, name: str, folder: pathlib.Path, threads: int) -> None:
        more = {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "beside_workers.py"), name, str(folder),
             str(folder / "batch.npz"), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment(**more))

    def ask(self, what: str, calls: int) -> dict[str, Any]:
        """Lets it make some calls and returns what it says of them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, "calls": calls}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def write_folder(folder: pathlib.Path, size: str) -> None:
    """Writes a model of random parameters and a batch of random tokens."""
    from etils import epath

    from vishwam_t5x.checkpointing.convert import t5_network
    from vishwam_t5x.checkpointing.convert.huggingface_writing import write_huggingface
    from vishwam_t5x.checkpointing.manifest import Leaf

    rng = np.random.default_rng(0)
    network = t5_network.from_config_json(
        {"model_type": "t5", "vocab_size": VOCABULARY, **SIZES[size], "dropout_rate": 0.0})
    arrays = {}
    for name in network.places():
        shape = network.shape(name)
        deviation = 1.0 if "embedding" in name else shape[0] ** -0.5
        array = rng.normal(size=shape) * deviation
        arrays[name] = (np.ones(shape) if name.endswith("scale") else array).astype(np.float32)

    class Random:
        leaves = {name: Leaf(array.shape, "float32") for name, array in arrays.items()}

        def read(self, requests: Any) -> Any:
            return {name: arrays[name] for name in requests}

    write_huggingface(Random(), epath.Path(folder), network)
    np.savez(folder / "batch.npz", inputs=rng.integers(2, VOCABULARY, (ROWS, INPUTS), np.int32),
             targets=rng.integers(2, VOCABULARY, (ROWS, TARGETS), np.int32))


def check_equal(what: str, theirs: list, ours: list) -> float:
    """Returns how far the first results differ; raises if they are not those of one model."""
    if what == "train":
        difference = max(abs(a - b) / abs(a) for a, b in zip(theirs, ours, strict=True))
        assert difference < 1e-4, (theirs, ours)
        return difference
    same = float(np.mean(np.asarray(theirs[0]) == np.asarray(ours[0])))
    assert same > 0.9, f"only {same:.0%} of the tokens are the same"
    return 1 - same


def compare(figures: Figures, size: str, what: str, folder: pathlib.Path, windows: int,
            threads: int) -> None:
    """Measures one kind of work on both sides, in fresh processes."""
    sides = {name: Side(name, folder, threads) for name in ("theirs", "ours")}
    first = {name: side.ask(what, 3 if what == "train" else 1) for name, side in sides.items()}
    difference = check_equal(what, first["theirs"]["out"], first["ours"]["out"])
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    taken: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(windows):
        pair = {name: side.ask(what, CALLS[what]) for name, side in sides.items()}
        for kind, found in ratios.items():
            found.append(sum(pair["theirs"][kind]) / sum(pair["ours"][kind]))
        for name, found in taken.items():
            found.append(sum(pair[name]["wall"]) / CALLS[what])
        last = pair
    for side in sides.values():
        side.close()
    more = {"size": size, "threads": threads, "difference": difference}
    name = f"{what}_{size}"
    figures.add(f"{name}_theirs_to_ours_wall", ratios["wall"], "times", **more)
    figures.add(f"{name}_theirs_to_ours_cpu", ratios["cpu"], "times", **more)
    for side, found in taken.items():
        if what == "train":
            figures.add(f"{name}_{side}_step", [value * 1e3 for value in found], "ms", **more)
        else:
            figures.add(f"{name}_{side}_tokens_per_second",
                        [ROWS * NEW_TOKENS / value for value in found], "tokens/s", **more)
        figures.add(f"{name}_{side}_peak", [last[side]["peak_mb"]], "MB", **more)
    figures.add(f"{name}_compile_cpu", [last["ours"]["compile"][1]], "s", **more)
    if what == "train":
        figures.add(f"{name}_temporaries", [last["ours"]["temporaries"] / 2**20], "MiB", **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--only", default=",".join(CALLS), help="kinds of work, by comma")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    figures = Figures("beside_huggingface")
    for size in SIZES if options.size == "all" else [options.size]:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name) / "model"
            write_folder(folder, size)
            for what in options.only.split(","):
                compare(figures, size, what, folder, options.windows, options.threads)
    figures.write(keep_others=True)


if __name__ == "__main__":
    main()
