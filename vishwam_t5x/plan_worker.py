"""The process in which `vishwam plan` compiles: `python -m vishwam_t5x.plan_worker REQUEST RESULT`.

REQUEST holds {argv, target, choice, quick, cache_dir}; RESULT gets {result} or {error}. See
`planning/process.py`.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Sequence

from vishwam_t5x import gin_config, screen, train
from vishwam_t5x.core.errors import EXIT_OK, UserError
from vishwam_t5x.planning import targets
from vishwam_t5x.planning.compile import compile_recipe
from vishwam_t5x.planning.figures import Cache
from vishwam_t5x.planning.program import Choice, Recipe

# A run's identity and its data: no part of the program, so a plan does without them.
NOT_NEEDED = {"MODEL_DIR": "'planned'", "MIXTURE_OR_TASK_NAME": "'planned'"}


def read(argv: Sequence[str], flags: Sequence[str] = ()) -> tuple[gin_config.ParsedConfig, Recipe]:
    """Reads a recipe as `vishwam train` would; only what is no part of the program may be missing.

    Raises:
        UserError: as `gin_config.parse` and `Recipe.from_arguments`.
    """
    argv = list(argv)
    graph = gin_config.parse(argv, "plan", flags=flags).graph  # nothing is required of "plan"
    unset = [name for name in NOT_NEEDED if (bound := graph.macro(name)) is not None
             and getattr(bound.value, "required", False)]
    config = gin_config.parse([f"--gin.{name}={NOT_NEEDED[name]}" for name in unset] + argv,
                              "train", flags=flags)
    return config, Recipe.from_arguments(config.arguments(train.train))


def main(argv: list[str]) -> int:
    """Answers one request."""
    asked, answer = map(pathlib.Path, argv)
    request = json.loads(asked.read_text())
    screen.show_messages()
    try:
        _, recipe = read(request["argv"])
        cache = None if request["cache_dir"] == "" else Cache(request["cache_dir"])
        figures = compile_recipe(recipe.with_choice(Choice.from_json(request["choice"])),
                                 targets.resolve(request["target"]), cache, request["quick"])
        found = {"result": figures.to_json()}
    except UserError as error:
        found = {"error": {"problem": error.problem, "got": None if error.got is None
                           else str(error.got), "fix": error.fix}}
    temporary = answer.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, answer)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
