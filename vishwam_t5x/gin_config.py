"""The only importer of gin: T5X's command-line contract (`command_line.HELP`), parsed strictly.

A misspelt macro, a binding nobody reads, a value of the wrong type and a required value that is not
set raise `UserError`. Values are gin's literals and references; none is ever evaluated as Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import gin
from gin import config as gin_internals
from gin import config_parser

import vishwam_t5x
from vishwam_t5x import gin_checks, gin_files, gin_graph, gin_messages
from vishwam_t5x.command_line import CommandLine
from vishwam_t5x.core.errors import UserError, did_you_mean

T = TypeVar("T")
# The functions that a configuration is for: a binding is read if one of them reaches it, whichever
# verb is running, so that one recipe serves train, evaluate and infer.
VERBS = ("train", "evaluate", "infer", "cache", "inspect", "forward")
_ROOTS = {f"vishwam_t5x.{verb}.{verb}" for verb in VERBS}
# Macros a verb looks up itself, besides those its parameters refer to.
READ_BY_NAME = {"forward": {"MODEL"}}  # it builds the model of a bare model file


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
    """

    verb: str
    files: list[str]
    flags: dict[str, str]
    positional: list[str]
    allowed: frozenset[str]
    graph: gin_graph.Graph
    _text: str
    _state: tuple[dict, set]

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
        _restore(self._state)
        with _parts_kept_apart():
            return gin.get_bindings(function)

    def call(self, function: Callable[..., T], **overrides: Any) -> T:
        """Calls `function` with its bound parameters; `overrides` win.

        Raises:
            UserError: a parameter has neither value nor default, or a value was refused.
        """
        arguments = self.arguments(function) | overrides
        gin_checks.raise_all(gin_checks.lacking(function, arguments, f"vishwam {self.verb}"))
        return function(**arguments)

    def macro(self, name: str, default: Any = None) -> Any:
        """Returns the value of a macro, references evaluated; `default` if it is not bound."""
        if self.graph.macro(name) is None:
            return default
        _restore(self._state)
        with _context(gin_internals.ParseContext()), _parts_kept_apart():
            reference = gin_internals.ConfigurableReference(f"{name}/gin.macro", True)
            return reference.scoped_configurable_fn()


def parse(argv: Sequence[str], verb: str, *, flags: Sequence[str] = (), positional: int = 0,
          roots: Sequence[Callable[..., Any]] | None = None) -> ParsedConfig:
    """Parses the command line of a verb, reads its gin files and checks everything.

    Args:
        argv: the arguments after the verb.
        verb: one of `VERBS`; or a verb without a configurable function, for which nothing is
            required to be set.
        flags: the verb's own flags, without dashes, e.g. "checkpoint".
        positional: how many arguments that are no flags the verb takes at most.
        roots: the functions whose parameters count as read; default: the verbs'.

    Raises:
        UserError: any mistake of the user; all that can be found at once are listed.
    """
    line = CommandLine.split(argv, verb, flags, positional)
    if roots is not None:
        running = every = list(roots)
    else:
        running = [root] if (root := _root(verb)) else []
        every = None
    reader = _read(line, running)
    gin_checks.raise_all(reader.mistakes)
    graph = reader.graph
    if every is None:
        every = [found.wrapped for found in reader.used.values()
                 if gin_graph.name_of(found.wrapped) in _ROOTS]
    by_name = set().union(*READ_BY_NAME.values())
    wanted = gin_graph.Reach(graph, running, READ_BY_NAME.get(verb, ()), shadowed=False).missing
    absent = {found.name: found for found in [*gin_checks.undefined(graph), *wanted.values()]}
    gin_checks.raise_all([
        *gin_checks.unread(graph, gin_graph.Reach(graph, every, by_name, history=True)),
        *gin_checks.missing(graph, list(absent.values()))])
    reader.keep_only(gin_graph.Reach(graph, every, by_name))
    gin_checks.raise_all(gin_checks.wrong_types(graph))
    return ParsedConfig(verb, reader.files, line.flags, line.positional, frozenset(line.allowed),
                        graph, reader.text(), _state())


def read_text(text: str, source: str) -> gin_graph.Graph:
    """Returns the graph of a gin text without touching the live configuration.

    Raises:
        UserError: the text names something that does not exist any more, or is no gin.
    """
    state = _state()
    try:
        reader = _Reader(gin_files.search_paths())
        reader.read(text, source)
        gin_checks.raise_all(reader.mistakes)
        return reader.graph
    finally:
        _restore(state)


def _read(line: CommandLine, roots: Sequence[Callable[..., Any]]) -> _Reader:
    """Clears the live configuration and reads files, then bindings; checks nothing but names."""
    _restore(({}, set()))
    reader = _Reader(gin_files.search_paths(line.search_paths))
    for root in roots:
        reader.register(root)
    for name in line.files:
        reader.read_file(name)
    for flag, binding in line.bindings:
        reader.read(binding, flag, _CommandLineContext(reader))
    return reader


def _root(verb: str) -> Callable[..., Any] | None:
    module = importlib.import_module(f"vishwam_t5x.{verb}") if verb in VERBS else None
    return getattr(module, verb, None)


def _state() -> tuple[dict, set]:
    config = {key: dict(values) for key, values in gin_internals._CONFIG.items()}
    return config, set(gin_internals._IMPORTS)


def _restore(state: tuple[dict, set]) -> None:
    gin.clear_config()
    gin_internals._CONFIG.update({key: dict(values) for key, values in state[0].items()})
    gin_internals._IMPORTS.update(state[1])


@contextlib.contextmanager
def _parts_kept_apart() -> Iterator[None]:
    """Undoes what gin does to an error raised while it builds something: one run-on message."""
    try:
        yield
    except UserError as error:
        raise gin_messages.anew(error) from None


@contextlib.contextmanager
def _context(context: gin_internals.ParseContext) -> Iterator[None]:
    gin_internals._PARSE_CONTEXTS.append(context)
    try:
        yield
    finally:
        gin_internals._PARSE_CONTEXTS.pop()


class _Unknown:
    """Stands for a reference that could not be resolved; the mistake is on the reader's list."""


class _Reader(gin_internals.ParserDelegate):
    """Reads gin text statement by statement, binding as gin does and remembering where."""

    def __init__(self, paths: Sequence) -> None:
        super().__init__()
        self.paths, self.files, self.mistakes = paths, [], []
        self.graph = gin_graph.Graph()
        self.used: dict[str, gin_internals.Configurable] = {}
        self.contexts: list[_FileContext] = []
        self._selectors: dict[gin_graph.Key, str] = {}
        self._where, self._open, self._reading, self._not_imported = "", [], [], set()

    def register(self, root: Callable[..., Any]) -> None:
        """Makes the parameters of `root` bindable, whether or not a file imports its module."""
        package, _, module = root.__module__.rpartition(".")
        statement = f"from {package} import {module}" if package else f"import {module}"
        self.read(f"from __gin__ import dynamic_registration\n{statement}\n", "the verb")
        with _context(self.contexts[-1]):
            self.contexts[-1].get_configurable(f"{module}.{root.__qualname__}")

    def read_file(self, name: str) -> None:
        path = gin_files.find(name, self.paths)
        if path.resolve() in self._open:
            raise UserError(f"{name} includes itself", got=" -> ".join(map(str, self._open)),
                            fix="remove one of the includes")
        if not self._open:
            self.files.append(str(path))
        self._open.append(path.resolve())
        self.read(path.read_text(encoding="utf-8"), str(name))
        self._open.pop()

    def read(self, text: str, source: str, context: gin_internals.ParseContext | None = None
             ) -> None:
        context = context or _FileContext(self)
        self.contexts.append(context)
        with _context(context):
            try:
                parser = config_parser.ConfigParser(text, self)
                self._reading.append((source, parser))
                for statement in parser:
                    self._where = gin_messages.place(source, statement.location.line_num)
                    self._obey(statement, context)
            except (SyntaxError, tokenize.TokenError) as error:
                if str(getattr(error, "filename", "")).endswith(".py"):
                    raise  # A module that the file imports, not the file.
                raise gin_messages.unreadable(error, source, text) from None
        self._reading.pop()
        gin_internals._IMPORTS.update(context.imports)

    def _obey(self, statement: Any, context: gin_internals.ParseContext) -> None:
        if isinstance(statement, config_parser.IncludeStatement):
            self.read_file(statement.filename)
        elif isinstance(statement, config_parser.ImportStatement):
            try:
                context.process_import(statement)
            except ImportError as error:
                self._not_imported.add(statement.bound_name())
                self.mistakes.append(gin_messages.no_import(
                    statement.format(), statement.module, error, self._where))
        elif isinstance(statement, config_parser.BlockDeclaration):
            self._find(statement.selector)
        else:
            self._bind(statement)

    def _bind(self, statement: config_parser.BindingStatement) -> None:
        scope, selector, parameter, value, _ = statement
        known = not any(isinstance(leaf, _Unknown) for leaf in gin_graph.leaves(value))
        if not parameter:
            name = f"{scope}/{selector}" if scope else selector
            if known:
                gin.bind_parameter((name, "gin.macro", "value"), value)
            self.graph.bind(name, gin_graph.Bound(_plain(value), self._where))
            return
        found = self._find(selector)
        if found is None:
            return
        mistake = gin_checks.unknown_parameter(found.wrapped, parameter, self._where)
        if mistake is not None:
            self.mistakes.append(mistake)
        elif known:
            gin.bind_parameter((scope, selector, parameter), value)
            key = gin_graph.Key(tuple(filter(None, scope.split("/"))), found.wrapped, parameter)
            self.graph.bind(key, gin_graph.Bound(_plain(value), self._where))
            self._selectors[key] = found.selector

    def _find(self, selector: str) -> gin_internals.Configurable | None:
        """Returns the configurable; otherwise None, with the mistake on the list."""
        context = gin_internals._parse_context()
        if selector.partition(".")[0] in self._not_imported:
            return None  # The import is on the list already.
        try:
            return context.get_configurable(selector)
        except UserError as error:
            problem = f"{error.problem} ({self._where})"
            if all(problem != mistake.problem for mistake in self.mistakes):
                self.mistakes.append(UserError(problem, error.got, error.fix))
        return None

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        """gin's hook: called for every `@name` and `@name()`, before its statement is complete."""
        source, parser = self._reading[-1]
        self._where = gin_messages.place(source, parser.current_token.start[0])
        if self._find(scoped_selector.rpartition("/")[2]) is None:
            return _Unknown()
        return gin_internals.ConfigurableReference(scoped_selector, evaluate)

    def keep_only(self, reach: gin_graph.Reach) -> None:
        """Drops what only a replaced value had read, so that the text parses again."""
        for name in set(self.graph.macros) - reach.macros:
            del self.graph.macros[name], gin_internals._CONFIG[(name, "gin.macro")]
        for key in set(self.graph.bindings) - reach.bindings:
            del self.graph.bindings[key]
            at = ("/".join(key.scope), self._selectors[key])
            gin_internals._CONFIG[at].pop(key.parameter)
        for at in [at for at, bound in gin_internals._CONFIG.items() if not bound]:
            del gin_internals._CONFIG[at]

    def text(self) -> str:
        """Returns the live configuration as gin text."""
        return (f"# Written by vishwam_t5x {vishwam_t5x.__version__}: everything the run was given."
                f"\n{gin.config_str(max_line_length=100)}")


class _FileContext(gin_internals.ParseContext):
    """Resolves names by the imports of one file, with our words when it fails."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        super().__init__()

    def get_configurable(self, selector: str) -> gin_internals.Configurable:
        try:
            names, values = self._resolve_selector(selector)
        except NameError:
            return self._unimported(selector)
        except AttributeError:
            raise gin_messages.no_attribute(selector, self._symbol_table) from None
        if not callable(values[-1]):
            raise UserError(f"{selector} is not a function or a class",
                            got=type(values[-1]).__name__, fix="name something in it")
        found = gin_internals._inverse_lookup(values[-1]) or self._register(names, values)
        self._reader.used[found.selector] = found
        return found

    def _unimported(self, selector: str) -> gin_internals.Configurable:
        if not self._dynamic_registration and selector.startswith("gin."):
            return gin_internals._REGISTRY.get_match(selector)
        raise gin_messages.not_imported(selector, self._dynamic_registration, self._symbol_table)


class _CommandLineContext(gin_internals.ParseContext):
    """Resolves names on the command line, where there are no imports, by what the files use."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        super().__init__()

    def get_configurable(self, selector: str) -> gin_internals.Configurable:
        if selector in ("gin.macro", "gin.constant"):
            return gin_internals._REGISTRY.get_match(selector)
        found = [known for name, known in self._reader.used.items()
                 if name == selector or name.endswith(f".{selector}")]
        if not found:
            found = list(self._by_imports(selector))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(gin_graph.name_of(known.wrapped) for known in found)
            raise UserError(f"{selector!r} can be several things", got=names,
                            fix="write more of its name")
        short = {name.rpartition(".")[2]: name for name in self._reader.used}
        raise UserError(f"the files refer to nothing called {selector!r}",
                        fix=did_you_mean(selector.rpartition(".")[2], short)
                        or "name a function or class that one of the gin files uses")

    def _by_imports(self, selector: str) -> Iterator[gin_internals.Configurable]:
        """Yields what `selector` is in the files' imports, or in a module that they import."""
        seen = set()
        for context in [known for known in self._reader.contexts if known._dynamic_registration]:
            for name in [selector, *(f"{module}.{selector}" for module in context._symbol_table)]:
                with contextlib.suppress(UserError):  # Not there; the caller says what is.
                    found = context.get_configurable(name)
                    if found.selector not in seen:
                        seen.add(found.selector)
                        yield found


def _plain(value: Any) -> Any:
    """Translates gin's references into those of `gin_graph`."""
    if isinstance(value, gin_internals.ConfigurableReference):
        target = value.configurable.wrapped
        if target is gin_internals.macro and value.evaluate:
            return gin_graph.Macro("/".join(value.scopes))
        if target is gin_internals._retrieve_constant and value.evaluate:
            name = "/".join(value.scopes)
            constant = gin_internals._CONSTANTS[name]
            return gin_graph.Constant(name, constant, constant is gin.REQUIRED)
        return gin_graph.Reference(target, tuple(value.scopes), value.evaluate)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value
