"""The only importer of gin: T5X's command-line contract (`command_line.HELP`), parsed strictly.

A misspelt macro, a binding nobody reads, a value of the wrong type and a required value that is not
set raise `UserError`. Values are gin's literals and references; none is ever evaluated as Python.
"""

from __future__ import annotations

import contextlib
import importlib
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin
from gin import config as gin_internals
from gin import config_parser

import vishwam_t5x
from vishwam_t5x import gin_checks, gin_files, gin_graph, gin_messages
from vishwam_t5x.command_line import CommandLine
from vishwam_t5x.compat import installed
from vishwam_t5x.compat import names as t5x
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.gin_parsed import ParsedConfig as ParsedConfig

# The functions that a configuration is for: a binding is read if one of them reaches it, whichever
# verb is running, so that one recipe serves train, evaluate and infer.
VERBS = ("train", "evaluate", "infer", "cache", "inspect", "forward")
_ROOTS = {f"vishwam_t5x.{verb}.{verb}" for verb in VERBS}
_ROOTS |= {f"{t5x.MAIN}.{verb}" for verb in VERBS}
_OF_GIN = ("gin.macro", "gin.constant")
# Macros a verb looks up itself, besides those its parameters refer to.
READ_BY_NAME = {"forward": {"MODEL"}}  # it builds the model of a bare model file

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
    mine = list(roots) if roots is not None else [root] if (root := _root(verb)) else []
    reader = _read(line, mine, verb)
    gin_checks.raise_all(reader.mistakes)
    graph = reader.graph
    every = roots if roots is not None else [
        found.wrapped for found in reader.used.values()
        if gin_graph.name_of(found.wrapped) in _ROOTS]
    entry = t5x.entry(verb, every) if reader.t5x and mine else None
    running = [entry] if entry else mine
    by_name = set().union(*READ_BY_NAME.values())
    wanted = gin_graph.Reach(graph, running, READ_BY_NAME.get(verb, ()), shadowed=False).missing
    absent = {found.name: found for found in [*gin_checks.undefined(graph), *wanted.values()]}
    gin_checks.raise_all([
        *gin_checks.unread(graph, gin_graph.Reach(graph, every, by_name, history=True),
                           t5x.is_theirs if reader.t5x else None),
        *gin_checks.missing(graph, list(absent.values()))])
    reader.keep_only(gin_graph.Reach(graph, every, by_name))
    gin_checks.raise_all(gin_checks.wrong_types(graph))
    state = _state()

    def bound(function: Callable[..., Any]) -> dict[str, Any]:
        _restore(state)
        if gin_internals._inverse_lookup(function) is None:
            return {}  # No file names it.
        with _parts_kept_apart():
            return gin.get_bindings(function)

    def value_of(name: str) -> Any:
        _restore(state)
        with _context(gin_internals.ParseContext()), _parts_kept_apart():
            reference = gin_internals.ConfigurableReference(f"{name}/gin.macro", True)
            return reference.scoped_configurable_fn()

    return ParsedConfig(verb, reader.files, line.flags, line.positional, frozenset(line.allowed),
                        graph, reader.text(), bound, value_of, entry, reader.tasks())


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


def _read(line: CommandLine, roots: Sequence[Callable[..., Any]], verb: str = "") -> _Reader:
    """Clears the live configuration and reads files, then bindings; checks nothing but names."""
    _restore(({}, set()))
    reader = _Reader(gin_files.search_paths(line.search_paths))
    reader.t5x = any(map(t5x.speaks, gin_files.with_included(line.files, reader.paths)))
    installed.choose(line, verb, reader.t5x)
    for root in roots if not reader.t5x else ():  # else `train` is T5X's
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
        self.t5x = False  # whether the files are T5X's, or follow its ways
        self.deferred: list[t5x.Deferred] = []

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
        self.t5x = self.t5x or t5x.speaks(text)
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
            except UserError as error:
                self._not_imported.add(statement.bound_name())
                self.mistakes.append(gin_messages.at(error, self._where))
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
            mistake = gin_messages.at(error, self._where)
            if all(mistake.problem != other.problem for other in self.mistakes):
                self.mistakes.append(mistake)
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
        written = gin.config_str(max_line_length=100).replace(
            "\n", "\n" + "".join(f"import {name}\n" for name in self.tasks()), 1)
        return (f"# Written by vishwam_t5x {vishwam_t5x.__version__}: everything the run was given."
                f"\n{written}")

    def tasks(self) -> list[str]:
        """Returns what T5X's files import and name nothing of: modules of tasks."""
        return sorted({module.name for module in self.deferred if not module.used})

    def lookup(self, selector: str) -> gin_internals.Configurable:
        """Finds a name by what the files use: for the command line, which imports nothing."""
        found = [known for name, known in self.used.items()
                 if name == selector or name.endswith(f".{selector}")]
        if not found:
            found = list(self._by_imports(selector))
        if len(found) == 1:  # as it is now: a class is registered anew with each of its methods
            return gin_internals._inverse_lookup(found[0].wrapped) or found[0]
        raise gin_messages.not_one(selector, found, self.used, self.t5x)

    def _by_imports(self, selector: str) -> Iterator[gin_internals.Configurable]:
        """Yields what `selector` is in the files' imports, or in a module that they import."""
        seen = set()
        for context in [known for known in self.contexts if known._symbol_table]:
            for name in [selector, *(f"{symbol}.{selector}" for symbol, module
                                     in context._symbol_table.items()
                                     if not isinstance(module, t5x.Deferred))]:
                with contextlib.suppress(UserError):  # Not there; the caller says what is.
                    found = context.find(name)
                    if found.selector not in seen:
                        seen.add(found.selector)
                        yield found


class _FileContext(gin_internals.ParseContext):
    """Resolves names by the imports of one file, with our words when it fails."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        super().__init__()

    def process_import(self, statement: config_parser.ImportStatement) -> None:
        module = t5x.ours(statement.module) if self._reader.t5x else statement.module
        if module != statement.module:
            name = statement.bound_name()
            statement = statement._replace(
                module=module, is_from=True, alias=None if module.endswith(f".{name}") else name)
        elif self._reader.t5x and t5x.may_wait(module):
            self._symbol_table[statement.bound_name()] = later = t5x.Deferred(
                module, statement.is_from or bool(statement.alias))
            self._symbol_source[statement.bound_name()] = statement
            self._reader.deferred.append(later)
            return
        super().process_import(statement)
        if self._reader.t5x and not self._dynamic_registration:
            self._symbol_table[statement.bound_name()] = importlib.import_module(module)
            self._symbol_source[statement.bound_name()] = statement

    def get_configurable(self, selector: str) -> gin_internals.Configurable:
        if self._reader.t5x and not self._dynamic_registration:
            if selector in _OF_GIN:
                return gin_internals._REGISTRY.get_match(selector)
            return self._reader.lookup(selector)
        return self.find(selector)

    def find(self, selector: str) -> gin_internals.Configurable:
        """Resolves a name by this file's imports alone."""
        try:
            names, values = self._resolve_selector(selector)
        except NameError:
            return self._unimported(selector)
        except AttributeError:
            raise t5x.absent(selector, self._symbol_table) or gin_messages.no_attribute(
                selector, self._symbol_table) from None
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
        if selector in _OF_GIN:
            return gin_internals._REGISTRY.get_match(selector)
        return self._reader.lookup(selector)


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
