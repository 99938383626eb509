"""Compile the train step for hardware that is not there: does it fit, how long is a step at best?

usage: vishwam plan --gin_file=FILE [--gin.NAME=VALUE ...] --target=TARGET
                    [--search[=N]] [--quick] [--json] [--watch] [--no_cache]

--target=TARGET   tpu-v3-8, tpu-v4-32, tpu-v5e-16, tpu-v4:2x2x4, gtx1650, t4, h200x2, cpu:8, ...
--search[=N]      try meshes, remat policies and microbatches, compile the N most promising
                  (default 4), rank those that fit, print the gin lines of the best
--quick           the compiler's least effort: about half the time, bytes within a few percent
--json            print everything as one JSON object
--watch           show what is being compiled, and for how long
--no_cache        compile even what has been compiled before

The gin files are those you train with, the preset of gin/hardware/ that `vishwam launch` adds among
them; no data, cache or MODEL_DIR is needed. The program is the
one `vishwam train` would compile there. No parameter is allocated, no accelerator touched. TPUs and
GPUs need the extra `plan` (Linux on x86). Times are what data sheets allow, not measurements.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from vishwam_t5x.core.errors import EXIT_OK, UserError

FLAGS = ("target", "search", "quick", "json", "watch", "no_cache")
DEFAULT_SEARCH = 4


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam plan ARGV` and returns the exit code: 0 whether or not it fits."""
    # Before anything asks jax for devices: planning takes no accelerator from who is training.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from vishwam_t5x import plan_worker
    from vishwam_t5x.launching import presets
    from vishwam_t5x.launching.presets import packaged
    from vishwam_t5x.planning import report, targets
    from vishwam_t5x.planning.estimate import Predictor
    from vishwam_t5x.planning.program import Choice
    from vishwam_t5x.planning.remedies import remedies
    from vishwam_t5x.planning.search import search

    config, recipe = plan_worker.read(argv, FLAGS)
    flags = {name: text for name, text in config.flags.items()
             if name in ("target", "search") or _is_on(name, text)}
    if not flags.get("target"):
        raise UserError("vishwam plan needs a target", fix="e.g. --target=tpu-v4-32; others: "
                        + ", ".join(targets.EXAMPLES))
    target = targets.resolve(flags["target"])
    targets.check_installed(target)
    if packaged(target.preset) and pathlib.PurePath(target.preset).name not in presets.read(
            config.files).hardware:
        print(f"vishwam: note: a run there by vishwam launch takes --gin_file={target.preset} too, "
              "which this plan lacks", file=sys.stderr)
    compiler = _Compiler(argv, target, flags)
    predictor = Predictor(recipe, target)
    if "search" in flags:
        most = _count(flags["search"])
        found = search(predictor, compiler, most)
        if not found:
            raise UserError(f"no mesh of {target.num_devices} devices suits this recipe",
                            got=f"BATCH_SIZE = {recipe.spec.batch_size}",
                            fix=f"a batch that is a multiple of {target.num_devices} rows")
        advice = [] if found[0].figures.fits else remedies(predictor)
        text = json.dumps(report.search_json(found, target, advice)) if "json" in flags else \
            report.search_page(found, target, found[0].choice.gin_lines(), advice)
    else:
        predictor.default_mesh()  # a mesh that does not fit is told before the compiler starts
        figures = compiler(Choice())
        advice = []
        if not figures.fits:
            predictor.learn(Choice(), figures)
            advice = remedies(predictor)
        text = json.dumps(report.to_json(figures, target, advice)) if "json" in flags else \
            report.page(figures, target, advice)
    print(text)
    return EXIT_OK


class _Compiler:
    """Compiles choices, each in a process of its own."""

    def __init__(self, argv: Sequence[str], target: Any, flags: dict[str, str]) -> None:
        own = tuple(f"--{name}" for name in FLAGS)
        self._argv = [word for word in argv if word.partition("=")[0] not in own]
        self._target, self._flags = target, flags

    def __call__(self, choice: Any, number: int = 1, most: int = 1) -> Any:
        """Returns the figures of a choice.

        Args:
            choice: `planning.program.Choice`.
            number: which of `most` it is, for who watches.
            most: how many there may be.
        """
        import dataclasses

        from vishwam_t5x.planning import process, targets
        from vishwam_t5x.planning.figures import Figures

        said = ", ".join(line for line in choice.gin_lines() if "import" not in line
                         and not line.startswith("MESH") and not line.endswith(" = 1"))

        def watch(seconds: float) -> None:
            line = f"compiling {number} of at most {most} for {self._target.name}" + (
                f": {said}" if said else "")
            if sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[K{line[:100]} {seconds:.0f} s")
                sys.stderr.flush()
            elif int(seconds) % 10 == 1:
                print(f"{line} {seconds:.0f} s", file=sys.stderr, flush=True)

        request = {"argv": self._argv, "target": self._target.name,
                   "choice": dataclasses.asdict(choice), "quick": "quick" in self._flags,
                   "cache_dir": "" if "no_cache" in self._flags else None}
        environment = targets.environment(self._target)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        watching = "watch" in self._flags
        try:
            result = process.run("vishwam_t5x.plan_worker", request, environment,
                                 watch if watching else None)
        finally:
            if watching and sys.stderr.isatty():
                sys.stderr.write("\r\x1b[K")
        return Figures.from_json(result)


def _is_on(name: str, text: str) -> bool:
    if text.lower() in ("", "true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise UserError(f"--{name} takes no value", got=text, fix=f"--{name}")


def _count(text: str) -> int:
    if not text:
        return DEFAULT_SEARCH
    if not text.isdigit() or int(text) < 1:
        raise UserError("--search takes how many programs to compile", got=text,
                        fix=f"--search={DEFAULT_SEARCH}, or --search alone")
    return int(text)
