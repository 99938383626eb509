"""Show a configuration as the run would see it, or how two differ.

usage: vishwam config show --gin_file=FILE [--gin.NAME=VALUE ...] [--verb=train] [--flat]
       vishwam config diff OLD.gin NEW.gin [--gin.NAME=VALUE ...]

show   prints one gin file with everything in it: what is saved as MODEL_DIR/config.gin.
       --flat prints NAME = VALUE with macros resolved, one a line, for grep and diff.
       --verb=VERB also demands the values that VERB needs.
diff   compares two gin files by value; bindings of the command line go to NEW. Marks with `!` what
       a resumed run would refuse, because it changes the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence

from vishwam_t5x import gin_config, gin_differences
from vishwam_t5x.command_line import CommandLine
from vishwam_t5x.core.errors import EXIT_OK, UserError, one_of


def main(argv: Sequence[str]) -> int:
    """Runs `vishwam config ARGV` and returns the exit code."""
    if not argv or argv[0].startswith("-"):
        raise UserError("config does what?", fix="vishwam config show ... or vishwam config diff")
    what, rest = one_of(argv[0], ("show", "diff"), "kind of vishwam config"), argv[1:]
    print(_show(rest) if what == "show" else _diff(rest))
    return EXIT_OK


def _show(argv: Sequence[str]) -> str:
    flags = ("verb", "flat")
    verb = CommandLine.split(argv, "config", flags).flags.get("verb", "config")
    if verb != "config":
        one_of(verb, gin_config.VERBS, "verb")
    config = gin_config.parse(argv, verb, flags=flags)
    if "flat" in config.flags:
        return "\n".join(f"{name} = {value}" for name, value in config.flat().items())
    return config.text()


def _diff(argv: Sequence[str]) -> str:
    line = CommandLine.split(argv, "config", positional=2)
    files = [*line.positional, *line.files]
    if len(files) != 2:
        raise UserError("config diff compares two gin files", got=" ".join(files) or "none",
                        fix="vishwam config diff OLD.gin NEW.gin")
    bindings = [f"--gin_bindings={statement}" for _, statement in line.bindings]
    paths = [f"--gin_search_paths={','.join(line.search_paths)}"] if line.search_paths else []
    old = gin_config.parse([f"--gin_file={files[0]}", *paths], "config")
    new = gin_config.parse([f"--gin_file={files[1]}", *paths, *bindings], "config")
    changes = gin_differences.differences(old.graph, new.graph)
    lines = [f"{' ' if change.reason else '!'} {change}"
             + (f"   ({change.reason})" if change.reason else "") for change in changes]
    return "\n".join(lines) or "no difference"
