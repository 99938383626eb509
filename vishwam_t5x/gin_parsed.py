"""A parsed configuration: what the verbs ask of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vishwam_t5x import gin_checks, gin_graph
from vishwam_t5x.core.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass
class ParsedConfig:
    """A parsed and checked configuration.

    Attributes:
        verb: the verb it was parsed for.
        files: the gin files named on the command line, as found on disk.
        flags: the verb's own flags that were given, without their dashes; a flag without "=" is "".
        positional: the arguments that are no flags.
        allowed: names given to --allow_config_change.
        graph: macros and bindings as plain data.
        entry: the function of T5X's name that T5X's gin files bind, which translates; or None.
        task_modules: what T5X's files import to register tasks.
    """

    verb: str
    files: list[str]
    flags: dict[str, str]
    positional: list[str]
    allowed: frozenset[str]
    graph: gin_graph.Graph
    _text: str
    _bound: Callable[[Callable[..., Any]], dict[str, Any]]
    _value_of: Callable[[str], Any]
    entry: Callable[..., dict[str, Any]] | None = None
    task_modules: Sequence[str] = ()

    def text(self) -> str:
        """Returns the whole configuration as one gin file, sorted; `parse` reads it again."""
        return self._text

    def flat(self) -> dict[str, str]:
        """Returns {name: value as gin writes it} with macros resolved; macros, then bindings."""
        tables = (self.graph.macros, self.graph.bindings)
        return {name: value for table in tables for name, value in sorted(
            (str(key), repr(self.graph.resolve(bound.value))) for key, bound in table.items())}

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Returns what is bound to the parameters of `function`, references evaluated."""
        return self._bound(function)

    def call(self, function: Callable[..., T], **overrides: Any) -> T:
        """Calls `function` with its bound parameters; `overrides` win.

        Where T5X's files bind the parameters of T5X's function, these are translated first; what
        they do not say can be bound to `function` itself.

        Raises:
            UserError: a parameter has neither value nor default, or a value was refused.
        """
        arguments = self.arguments(function)
        if self.entry is not None:
            theirs = self._checked(self.entry, self.arguments(self.entry))
            translated = self.entry(**theirs, **self._tasks())
            if twice := sorted(translated.keys() & arguments.keys()):
                raise UserError(
                    "T5X's files say it already", got=", ".join(
                        f"{gin_graph.name_of(function)}.{name}" for name in twice),
                    fix="leave the one or the other out")
            arguments |= translated
        return function(**self._checked(function, arguments | overrides))

    def macro(self, name: str, default: Any = None) -> Any:
        """Returns the value of a macro, references evaluated; `default` if it is not bound."""
        return default if self.graph.macro(name) is None else self._value_of(name)

    def _checked(self, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        gin_checks.raise_all(gin_checks.lacking(function, arguments, f"vishwam {self.verb}"))
        return arguments

    def _tasks(self) -> dict[str, Any]:
        return {"task_modules": tuple(self.task_modules)} if self.task_modules else {}
