"""Show what a mixture holds, or how a run went.

usage: vishwam inspect --gin_file=FILE [--gin.NAME=VALUE ...] [--output=PAGE.html]
                       [--num_examples=N] [--json]
       vishwam inspect MODEL_DIR [--output=PAGE.png]

Of a mixture: rates, lengths, packing, and examples before and after corruption. Of a run: losses,
where the time went (compiling, waiting for data, steps, evaluation, saves, work done twice), and of
a codec held-out pictures above what comes back of them.

--output=PAGE        where the page goes; default: inspect_MIXTURE.html here, MODEL_DIR/run.png
--num_examples=N     examples of each task on the page; default 8
--json               print the figures as one JSON object

The gin file is the one you train with. A missing cache is written first.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from vishwam_t5x import screen
from vishwam_t5x.command_line import CommandLine
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import EXIT_OK, UserError
from vishwam_t5x.data import gallery, report, source
from vishwam_t5x.objectives.objective import Objective
from vishwam_t5x.training import run_page
from vishwam_t5x.training.run_dir import RunDir

FLAGS = ("output", "num_examples", "json")


def inspect(dataset: source.DatasetConfig, objective: Objective, output: str | None = None,
            num_examples: int = 8, model: Any = None) -> tuple[report.MixtureFigures, str]:
    """Measures a mixture and writes a page of its examples.

    Args:
        dataset: the mixture, and the shapes of its batches.
        objective: what corrupts its examples.
        output: file of the page; None: inspect_MIXTURE.html in the current folder.
        num_examples: examples of each task on the page.
        model: what is to be trained: rows are packed for it; None: as many examples as fit.

    Returns:
        The figures, and them as text with the page's place at the end.

    Raises:
        UserError: the mixture cannot be opened, or an example fits in no row.
    """
    if num_examples < 1:
        raise UserError("num_examples must be at least 1", got=num_examples)
    opened = _open(dataset, objective, getattr(model, "config", None))
    figures = report.measure(opened)
    text = "\n".join(report.lines(opened, figures))
    page = pathlib.Path(output or f"inspect_{dataset.mixture_or_task_name}.html").expanduser()
    decoders = {task.name: _text_decoder(task, objective) for task in opened.examples.tasks}
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(gallery.write_page(opened, decoders, num_examples, text), encoding="utf-8")
    opened.batches.close()
    return figures, f"{text}\n\nexamples before and after corruption: {page}"


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam inspect ARGV` and returns the exit code."""
    from vishwam_t5x import gin_config

    line = CommandLine.split(argv, "inspect", FLAGS, positional=1)
    if line.positional:
        return _inspect_run(line)
    config = gin_config.parse(argv, "inspect", flags=FLAGS)
    screen.show_messages()
    given: dict = {}
    if config.flags.get("output"):
        given["output"] = config.flags["output"]
    if "num_examples" in config.flags:
        given["num_examples"] = _whole_number(config.flags["num_examples"])
    figures, text = config.call(inspect, **given)
    print(json.dumps(figures.to_json()) if "json" in config.flags else text)
    return EXIT_OK


def _inspect_run(line: CommandLine) -> int:
    given = line.positional[0]
    if line.files or line.bindings or line.flags.keys() - {"output"}:
        raise UserError("of a run only --output can be given", got=", ".join(
            [*line.files, *(flag for flag, _ in line.bindings), *line.flags]),
            fix=f"vishwam inspect {given}")
    if not storage.is_remote(given) and not storage.local(given).is_dir():
        raise UserError("there is no such folder", got=given, fix="give the MODEL_DIR of a run")
    run_dir = RunDir.open(given) if storage.is_remote(given) else RunDir(storage.local(given))
    print(run_page.summary(run_dir))
    page = line.flags.get("output") or storage.join(run_dir.place, "run.png")
    if storage.is_remote(page):
        with tempfile.TemporaryDirectory(prefix="vishwam-") as folder:
            drawn = pathlib.Path(folder) / "run.png"
            run_page.draw(run_dir, drawn)
            storage.upload(drawn, page)
    else:
        run_page.draw(run_dir, storage.local(page))
    print(f"\nlosses and times: {page}")
    return EXIT_OK


def _open(config: source.DatasetConfig, objective: Objective, model: Any) -> source.Dataset:
    if config.use_cached:
        return source.open_dataset(config, objective, model=model)
    screen.quiet_tensorflow()
    from vishwam_t5x.data.tf import live

    return live.open_live_dataset(config, objective, model)


def _text_decoder(task: object, objective: Objective) -> gallery.TextDecoder | None:
    """How the task's token ids are written: by the vocabulary its cache remembers, if any."""
    vocabulary = getattr(task, "metadata", {}).get("vocabulary")
    if not isinstance(vocabulary, dict) or "path" not in vocabulary:
        return None
    from vishwam_t5x.serving.tokenizer import Tokenizer

    return Tokenizer(vocabulary["path"], getattr(objective, "vocabulary", None)).pieces


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError("--num_examples must be a whole number", got=repr(text)) from None
