"""A configuration as plain data: macros, bindings, references, and what reads what.

Knows nothing of the gin library: `gin_config.py` translates. The scoping rules are gin's: a
reference without a scope inherits the current one, a reference with a scope replaces it, and a
macro's value is evaluated in a scope named after the macro.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

UNKNOWN = object()  # an annotation that is absent or cannot be resolved: nothing to check against
Scope = tuple[str, ...]
Target = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/target` (the callable itself) or, when `evaluate`, `@scope/target()` (its result)."""

    target: Target
    scope: Scope
    evaluate: bool

    def __repr__(self) -> str:
        calls = "()" if self.evaluate else ""
        return "@" + "/".join([*self.scope, name_of(self.target)]) + calls


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str

    def __repr__(self) -> str:
        return "%" + self.name


@dataclasses.dataclass(frozen=True)
class Constant:
    """`%module.NAME`, registered by a library; `required` marks `%gin.REQUIRED`."""

    name: str
    value: Any
    required: bool = False

    def __repr__(self) -> str:
        return "%" + self.name


@dataclasses.dataclass(frozen=True)
class Bound:
    """A value and the place that bound it, as "file:line" or the flag of the command line."""

    value: Any
    where: str


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter of one configurable in one scope."""

    scope: Scope
    target: Target
    parameter: str

    def __str__(self) -> str:
        return "/".join([*self.scope, f"{name_of(self.target)}.{self.parameter}"])


@dataclasses.dataclass
class Graph:
    """All macros and bindings of one configuration.

    Attributes:
        macros: by name, without the `%`.
        bindings: by parameter.
        superseded: what a later line replaced, by macro name or key: what only an earlier choice
            read (the settings of the optimizer before another was chosen) is not a mistake.
    """

    macros: dict[str, Bound] = dataclasses.field(default_factory=dict)
    bindings: dict[Key, Bound] = dataclasses.field(default_factory=dict)
    superseded: dict[str | Key, list[Bound]] = dataclasses.field(default_factory=dict)

    def bind(self, name: str | Key, bound: Bound) -> None:
        """Binds a macro (a string) or a parameter, keeping what was bound before."""
        table: dict = self.macros if isinstance(name, str) else self.bindings
        if name in table:
            self.superseded.setdefault(name, []).append(table[name])
        table[name] = bound

    def macro(self, name: str) -> Bound | None:
        """Returns what `%name` is bound to, or None; `%a/b` falls back to `%a` as gin's does."""
        parts = name.split("/")
        for length in range(len(parts), 0, -1):
            if (bound := self.macros.get("/".join(parts[:length]))) is not None:
                return bound
        return None

    def roots(self) -> tuple[list[Target], list[str]]:
        """Returns the targets and macros that nothing refers to: where a reader begins."""
        every = [bound.value for bound in [*self.macros.values(), *self.bindings.values()]]
        targets = {leaf.target for value in every for leaf in leaves(value)
                   if isinstance(leaf, Reference)}
        macros = {name for value in every for name in macros_in(value)}
        return (list({key.target: None for key in self.bindings if key.target not in targets}),
                [name for name in self.macros if name not in macros])

    def resolve(self, value: Any, seen: frozenset[str] = frozenset()) -> Any:
        """Returns `value` with every macro replaced by what it is bound to.

        Undefined macros, and macros that lead back to themselves, stay as they are.
        """
        if isinstance(value, Macro):
            bound = self.macro(value.name)
            if bound is None or value.name in seen:
                return value
            return self.resolve(bound.value, seen | {value.name})
        if isinstance(value, dict):
            return {self.resolve(key, seen): self.resolve(item, seen)
                    for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.resolve(item, seen) for item in value)
        return value

    def index(self) -> dict[tuple[Scope, Target], list[tuple[Key, Bound]]]:
        """Returns the bindings by the scope and target they are for."""
        found: dict[tuple[Scope, Target], list[tuple[Key, Bound]]] = {}
        for key, bound in self.bindings.items():
            found.setdefault((key.scope, key.target), []).append((key, bound))
        return found


@dataclasses.dataclass(frozen=True)
class Missing:
    """Something that is read and has no value: a macro, a binding or a parameter.

    Attributes:
        name: what to bind.
        where: the place that asks for it.
        annotation: the type its reader expects, or UNKNOWN.
        kind: "required" (`%gin.REQUIRED`), "undefined" (a macro nobody bound) or
            "parameter" (no default and no binding).
    """

    name: str
    where: str
    annotation: Any
    kind: str


class Reach:
    """What a call of `roots` reads, directly and through references and macros.

    Attributes:
        bindings, macros: what is read.
        targets: what is called.
        missing: by name, what is read and has no value.
    """

    def __init__(self, graph: Graph, roots: Iterable[Target], macros: Iterable[str] = (),
                 history: bool = False, shadowed: bool = True,
                 skip: Callable[[Key], bool] = lambda key: False) -> None:
        """Follows `roots` and what is bound to their parameters.

        Args:
            graph: the configuration.
            roots: functions whose parameters are read.
            macros: macros read by name.
            history: follow what a later line replaced, too.
            shadowed: follow what a binding in a longer scope hides, too.
            skip: bindings that are not followed.
        """
        self.bindings: set[Key] = set()
        self.macros: set[str] = set()
        self.targets: set[Target] = set()
        self.missing: dict[str, Missing] = {}
        self._graph, self._history = graph, graph.superseded if history else {}
        self._index, self._skip, self._shadowed = graph.index(), skip, shadowed
        self._visited: set[tuple[Target, Scope, bool]] = set()
        for name in macros:
            if graph.macro(name) is not None:
                self._walk(Macro(name), (), "the command line", UNKNOWN)
        for root in roots:
            self._visit(root, (), "")

    def _visit(self, target: Target, scope: Scope, called_at: str) -> None:
        """Follows one call; `called_at` is "" when a caller may supply what is not bound."""
        if (target, scope, bool(called_at)) in self._visited:
            return
        self._visited.add((target, scope, bool(called_at)))
        self.targets.add(target)
        effective: dict[str, list[tuple[Key, Bound]]] = {}
        for length in range(len(scope) + 1):
            for key, bound in self._index.get((scope[:length], target), ()):
                if not self._skip(key):
                    self.bindings.add(key)
                    effective.setdefault(key.parameter, []).append((key, bound))
        for parameter, found in effective.items():
            annotation = annotation_of(target, parameter)
            for key, bound in found if self._shadowed else found[-1:]:
                for each in [bound, *self._history.get(key, ())]:
                    self._walk(each.value, scope, each.where, annotation, str(key))
        for method in self._methods(target):
            self._visit(method, scope, "")
        if called_at:
            for name in required_parameters(target):
                if name not in effective:
                    key = Key((), target, name)
                    self.missing.setdefault(str(key), Missing(
                        str(key), called_at, annotation_of(target, name), "parameter"))

    def _methods(self, target: Target) -> Iterator[Target]:
        """Yields the methods of a class that have bindings of their own."""
        if inspect.isclass(target):
            yield from {bound for _, bound in self._index
                        if inspect.isfunction(bound) and bound.__module__ == target.__module__
                        and bound.__qualname__.rpartition(".")[0] == target.__qualname__}

    def _walk(self, value: Any, scope: Scope, where: str, annotation: Any,
              name: str = "") -> None:
        if isinstance(value, Macro):
            self._enter_macro(value.name, where, annotation)
        elif isinstance(value, Constant):
            if value.required:
                self.missing.setdefault(name, Missing(name, where, annotation, "required"))
        elif isinstance(value, Reference):
            if value.evaluate:
                self._visit(value.target, value.scope or scope, where)
            else:  # Called later, by whoever received it: in its own scope, this one or none.
                for at in {value.scope} if value.scope else {scope, ()}:
                    self._visit(value.target, at, "")
        elif isinstance(value, (Mapping, list, tuple)):
            for leaf in leaves(value):
                self._walk(leaf, scope, where, UNKNOWN, name)

    def _enter_macro(self, name: str, where: str, annotation: Any) -> None:
        bound = self._graph.macro(name)
        if bound is None:
            self.missing.setdefault(name, Missing(name, where, annotation, "undefined"))
            return
        first = name not in self.macros
        parts = name.split("/")
        self.macros |= {"/".join(parts[:length]) for length in range(1, len(parts) + 1)}
        if first:
            for each in [bound, *self._history.get(name, ())]:
                self._walk(each.value, tuple(parts), each.where, annotation, name)


def name_of(target: Target) -> str:
    """Returns the full name of a function or class, e.g. `vishwam_t5x.train.train`.

    What stands for a part of another library has the name that it has there (`STANDS_FOR`).
    """
    module = getattr(sys.modules.get(target.__module__), "STANDS_FOR", target.__module__)
    return f"{module}.{target.__qualname__}"


def leaves(value: Any) -> Iterator[Any]:
    """Yields what `value` holds after its dicts, lists and tuples are opened, keys included."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def macros_in(value: Any) -> Iterator[str]:
    """Yields the names of the macros that occur in `value`."""
    return (leaf.name for leaf in leaves(value) if isinstance(leaf, Macro))


def has_reference(value: Any) -> bool:
    """Says whether a reference (or a constant or an undefined macro) occurs in `value`."""
    return any(isinstance(leaf, (Reference, Constant, Macro)) for leaf in leaves(value))


def parameters_of(target: Target) -> dict[str, inspect.Parameter]:
    """Returns the parameters a caller of `target` may name, in order; without `self`."""
    function, skip = target, 0
    if inspect.isclass(target):
        # Not inspect.signature(target): a metaclass with __call__ would hide the parameters.
        function = target.__init__ if "__init__" in _own_names(target) else target.__new__
        skip = 1
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except ValueError:  # Written in C, without a signature: anything may be a parameter.
        parameters = [inspect.Parameter("parameters", inspect.Parameter.VAR_KEYWORD)]
    return {parameter.name: parameter for parameter in parameters}


def required_parameters(target: Target) -> list[str]:
    """Returns the parameters of `target` that have no default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY,
             inspect.Parameter.POSITIONAL_ONLY)
    return [name for name, parameter in parameters_of(target).items()
            if parameter.default is inspect.Parameter.empty and parameter.kind in named]


def annotation_of(target: Target, parameter: str) -> Any:
    """Returns the type `parameter` of `target` is annotated with, or UNKNOWN."""
    if not inspect.isclass(target):
        function = inspect.unwrap(target)
        return _resolve(getattr(function, "__annotations__", {}).get(parameter, UNKNOWN),
                        getattr(function, "__globals__", {}), {})
    if parameter in getattr(target, "__dataclass_fields__", {}):
        for base in inspect.getmro(target):
            own = inspect.get_annotations(base)
            if parameter in own:
                module = vars(sys.modules[base.__module__])
                return _resolve(own[parameter], module, dict(vars(base)))
        return UNKNOWN
    function = target.__init__ if "__init__" in _own_names(target) else target.__new__
    return _resolve(getattr(function, "__annotations__", {}).get(parameter, UNKNOWN),
                    getattr(function, "__globals__", {}), {})


def result_of(target: Target) -> Any:
    """Returns the type that calling `target` gives, or UNKNOWN."""
    return target if inspect.isclass(target) else annotation_of(target, "return")


def _own_names(cls: type) -> set[str]:
    return {name for base in inspect.getmro(cls)[:-1] for name in vars(base)}


def _resolve(annotation: Any, module: Mapping[str, Any], local: Mapping[str, Any]) -> Any:
    if annotation is UNKNOWN:
        return UNKNOWN
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        found = typing.get_type_hints(holder, globalns=dict(module), localns=dict(local))["it"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return UNKNOWN  # Imported for type checkers only, or a jaxtyping shape: not checkable.
    return found.type if isinstance(found, dataclasses.InitVar) else found
