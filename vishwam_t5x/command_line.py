"""The command line that every verb shares, in T5X's spelling, split into its parts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from vishwam_t5x.compat.names import CHOICES
from vishwam_t5x.core.errors import UserError, did_you_mean, one_of

COMMON = ("gin_file", "gin_bindings", "gin_search_paths", "allow_config_change", "t5x")
# T5X's flags that no verb has, and what does what they did there.
T5X_FLAGS = {
    "run_mode": "the verb says it: vishwam train, vishwam evaluate, vishwam infer",
    "tfds_data_dir": "set the environment variable TFDS_DATA_DIR, which the tasks' sources read",
    "seqio_additional_cache_dirs": "tasks are cached by vishwam itself, when first read, in "
                                   "$VISHWAM_CACHE_DIR; SeqIO's own caches are not read",
    "dry_run": "vishwam config show --verb=train prints the configuration and runs nothing",
    "multiprocess_gpu": "several processes are found, or named by --coordinator_address=HOST:PORT "
                        "--process_count=N --process_index=I",
    "initialization_timeout": "--roll_call_seconds=S says how long to wait for other processes",
}
HELP = """\
Flags of every verb that reads gin files:
  --gin_file=FILE                  a gin file; repeatable, later files win
  --gin.NAME=VALUE                 binds a macro or a parameter; a string: --gin.NAME='"text"'
  --gin_bindings="NAME = VALUE"    the same, as T5X also spells it
  --gin_search_paths=A,B           folders to look in before the current one and the installed gin/
  --allow_config_change=NAME,...   changes of the mathematics that a resume may make
  --t5x=compat|installed           who runs gin files of T5X's: we (the default), or T5X itself"""


@dataclasses.dataclass
class CommandLine:
    """The parts of a command line, in the order they were given.

    Attributes:
        files: values of --gin_file.
        bindings: (flag to show in a message, gin statement) of --gin.NAME and --gin_bindings.
        search_paths: folders of --gin_search_paths.
        allowed: names of --allow_config_change.
        flags: the verb's own flags, without dashes; "" for one given without a value.
        t5x: value of --t5x; "" if it was not given.
        positional: the arguments that are no flags.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    bindings: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    search_paths: list[str] = dataclasses.field(default_factory=list)
    allowed: list[str] = dataclasses.field(default_factory=list)
    flags: dict[str, str] = dataclasses.field(default_factory=dict)
    t5x: str = ""
    positional: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def split(cls, argv: Sequence[str], verb: str, flags: Sequence[str] = (),
              positional: int = 0) -> CommandLine:
        """Splits `argv`, the arguments after `verb`.

        Args:
            argv: the arguments.
            verb: for the messages.
            flags: the verb's own flags, without dashes.
            positional: how many arguments that are no flags there may be.

        Raises:
            UserError: an unknown flag, a flag without its value, too many arguments.
        """
        line, rest = cls(), list(argv)
        known = {*COMMON, *flags}
        while rest:
            word = rest.pop(0)
            name, equals, value = word.lstrip("-").partition("=")
            if not word.startswith("-"):
                line.positional.append(word)
                continue
            if name.startswith("gin."):
                line._bind(word, name.removeprefix("gin."), equals, value)
                continue
            if name in T5X_FLAGS and name not in known:
                raise UserError(f"--{name} is a flag of T5X's that vishwam does not have",
                                got=word, fix=T5X_FLAGS[name])
            if name not in known:
                raise UserError(
                    f"vishwam {verb} has no flag --{name}", got=word,
                    fix=did_you_mean(name, known)
                    or f"vishwam {verb} --help lists them; bindings are --gin.NAME=VALUE")
            if not equals and name in COMMON:
                if not rest:
                    raise UserError(f"--{name} needs a value", fix=f"write --{name}=VALUE")
                value = rest.pop(0)
            line._take(name, value, word)
        if len(line.positional) > positional:
            word = line.positional[positional]
            raise UserError(f"vishwam {verb} does not know what to do with {word!r}",
                            fix=f"a gin file is given as --gin_file={word}"
                            if word.endswith(".gin") else f"see vishwam {verb} --help")
        return line

    def _take(self, name: str, value: str, word: str) -> None:
        if name == "gin_file":
            self.files.append(value)
        elif name == "gin_bindings":
            left, equals, right = value.partition("=")
            self._bind(word, left.strip(), equals, right.strip())
        elif name == "gin_search_paths":
            self.search_paths += [path for path in value.split(",") if path]
        elif name == "allow_config_change":
            self.allowed += [path for path in value.split(",") if path]
        elif name == "t5x":
            self.t5x = one_of(value, CHOICES, "value of --t5x")
        else:
            self.flags[name] = value

    def _bind(self, word: str, name: str, equals: str, value: str) -> None:
        if not equals or not name or not value.strip():
            raise UserError(f"{word} binds nothing", fix="write --gin.NAME=VALUE, without spaces")
        if re.fullmatch(r"[\w./~:+-]*[A-Za-z_/~][\w./~:+-]*", value) and value not in (
                "True", "False", "None") and not _is_number(value):
            raise UserError(
                f"the value of {name} is not a gin literal", got=value,
                fix=f"a string needs quotes that survive the shell: --gin.{name}='\"{value}\"'")
        self.bindings.append((f"--gin.{name}", f"{name} = {value}"))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not re.search(r"[a-df-z]", text.lower())  # "inf" and "nan" are no gin literals.
