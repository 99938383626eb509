"""What gin-config accepts in silence and we refuse: unread names, missing values, wrong types.

Every check takes a `gin_graph.Graph` and returns the mistakes it found as `UserError`s, so that all
of them can be shown at once.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import typeguard

from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.gin_graph import (
    UNKNOWN,
    Bound,
    Constant,
    Graph,
    Key,
    Macro,
    Missing,
    Reach,
    Reference,
    Target,
    annotation_of,
    has_reference,
    macros_in,
    name_of,
    parameters_of,
    required_parameters,
    result_of,
)

_SHOWN = 6  # mistakes on one screen; the rest are counted


def raise_all(mistakes: Sequence[UserError]) -> None:
    """Raises the one mistake, or one `UserError` that lists them all; does nothing for none."""
    if not mistakes:
        return
    if len(mistakes) == 1:
        raise mistakes[0]
    lines = [f"{len(mistakes)} mistakes in the configuration"]
    for number, mistake in enumerate(mistakes[:_SHOWN], 1):
        lines.append(f"{number}. " + str(mistake).replace("\n", "\n   "))
    if len(mistakes) > _SHOWN:
        lines.append(f"... and {len(mistakes) - _SHOWN} more: mend these first")
    raise UserError("\n".join(lines))


def unread(graph: Graph, read: Reach, forgiven: Callable[[str], bool] | None = None
           ) -> list[UserError]:
    """Returns a mistake for every macro and binding that nothing in `read` reads.

    Args:
        graph: the configuration.
        read: what is read.
        forgiven: says of a place whether what was bound there first need not be read.
    """
    def pardons(name: str | Key, bound: Bound) -> bool:
        first = [*graph.superseded.get(name, ()), bound][0]
        return forgiven is not None and forgiven(first.where)

    referenced = {name for bound in [*graph.macros.values(), *graph.bindings.values()]
                  for name in macros_in(bound.value)}
    mistakes = []
    for name, bound in graph.macros.items():
        if name not in read.macros and not pardons(name, bound):
            near = did_you_mean(name, (referenced | read.macros) - {name})
            mistakes.append(UserError(
                f"nothing reads the macro {name} ({bound.where})", got=f"{name} = {bound.value!r}",
                fix=near or f"delete the line, or refer to it as %{name}"))
    reached = {name_of(target) for target in read.targets}
    for key, bound in graph.bindings.items():
        if key in read.bindings or pardons(key, bound):
            continue
        target = name_of(key.target)
        if target in reached:
            scope = "/".join(key.scope)
            fix = f"nothing calls it in the scope {scope!r}: refer to it as @{scope}/...()"
        else:
            short = {name.rpartition(".")[2]: name for name in reached}
            near = did_you_mean(target.rpartition(".")[2], short)
            fix = near or f"refer to {target} from something that is read, or delete the line"
        mistakes.append(UserError(f"nothing reads {key} ({bound.where})",
                                  got=f"{key} = {bound.value!r}", fix=fix))
    return mistakes


def missing(graph: Graph, values: Iterable[Missing]) -> list[UserError]:
    """Returns a mistake for every value that is read and not there."""
    mistakes = []
    required = [value for value in values if value.kind == "required"]
    if required:
        wanted = "\n       ".join(f"{value.name}, described in {value.where}"
                                  for value in required)
        lines = "\n       ".join(f"--gin.{value.name}={_example(value)}" for value in required)
        mistakes.append(UserError("a value must be set before this can run", got=wanted,
                                  fix=f"add to the command line\n       {lines}"))
    for value in values:
        if value.kind == "undefined":
            near = did_you_mean(value.name, graph.macros)
            mistakes.append(UserError(
                f"the macro %{value.name} is not defined ({value.where})",
                fix=near or f"add to the command line --gin.{value.name}={_example(value)}"))
        elif value.kind == "parameter":
            mistakes.append(UserError(
                f"{value.name} has no value and no default", got=f"used in {value.where}",
                fix=f"bind it to a value of type {_describe(value.annotation)}"))
    return mistakes


def lacking(function: Target, arguments: Collection[str], where: str) -> list[UserError]:
    """Returns a mistake for every parameter without default that is not in `arguments`."""
    return missing(Graph(), [
        Missing(f"{name_of(function)}.{name}", where, annotation_of(function, name), "parameter")
        for name in required_parameters(function) if name not in arguments])


def undefined(graph: Graph) -> list[Missing]:
    """Returns every macro that is referred to anywhere and bound nowhere."""
    found = {}
    for owner, bound in [*graph.bindings.items(), *graph.macros.items()]:
        for name in macros_in(bound.value):
            if graph.macro(name) is None:
                annotation = UNKNOWN
                if isinstance(owner, Key):
                    annotation = annotation_of(owner.target, owner.parameter)
                found.setdefault(name, Missing(name, bound.where, annotation, "undefined"))
    return list(found.values())


def wrong_types(graph: Graph) -> list[UserError]:
    """Returns a mistake for every binding whose value is not of the type its parameter has."""
    mistakes = []
    for key, bound in graph.bindings.items():
        annotation = annotation_of(key.target, key.parameter)
        value = graph.resolve(bound.value)
        parameter = parameters_of(key.target).get(key.parameter)
        if annotation is UNKNOWN or parameter is None or value is None is parameter.default:
            continue
        if _fits(value, annotation):
            continue
        through = where = ""
        if isinstance(bound.value, Macro):
            through = f", through {bound.value!r}"
            if (macro := graph.macro(bound.value.name)) is not None:
                where = f", set in {macro.where}"
        mistakes.append(UserError(
            f"{key} ({bound.where}) is of the wrong type",
            got=f"{value!r}{_kind(value)}{through}{where}\n  expected: {_describe(annotation)}",
            fix=_mend(value, annotation)))
    return mistakes


def _fits(value: Any, annotation: Any) -> bool:
    """Says whether `value`, which may hold references, is of the type `annotation`."""
    annotation = _plain(annotation)
    if annotation in (Any, object, UNKNOWN) or isinstance(annotation, typing.TypeVar):
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in arguments)
    if isinstance(value, Constant):
        return value.required or _fits(value.value, annotation)
    if isinstance(value, Macro):
        return True  # Undefined, or a circle: reported by another check.
    if isinstance(value, Reference):
        return _reference_fits(value, annotation)
    if isinstance(value, bool) and annotation in (int, float, complex):
        return False  # A bool is an int to Python; as a number of layers it is a slip.
    if isinstance(value, str) and inspect.isclass(origin) and origin is not str:
        return origin is typing.Literal and value in arguments  # Sequence[str] given one string.
    if isinstance(value, (list, tuple, dict)) and has_reference(value):
        return _container_fits(value, origin or annotation, arguments)
    try:
        typeguard.check_type(value, annotation,
                             collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    return True


def _plain(annotation: Any) -> Any:
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):  # NewType
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation


def _container_fits(value: Any, container: Any, arguments: tuple) -> bool:
    if not inspect.isclass(container) or not isinstance(value, container):
        return False
    if isinstance(value, dict):
        key, item = arguments if len(arguments) == 2 else (Any, Any)
        return all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if isinstance(value, tuple) and arguments and arguments[-1] is not Ellipsis \
            and container is tuple:
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    return all(_fits(item, arguments[0] if arguments else Any) for item in value)


def _reference_fits(reference: Reference, annotation: Any) -> bool:
    """Says whether what `reference` gives can be of the type `annotation`; True when unsure."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal or annotation is None or annotation is type(None):
        return False
    wanted = origin or annotation
    if not inspect.isclass(wanted):
        return True
    structural = getattr(wanted, "_is_protocol", False)
    if not reference.evaluate:
        if structural:
            return "__call__" in _members(wanted)
        if wanted is type:
            bound = arguments[0] if arguments else object
            return inspect.isclass(reference.target) and (
                not inspect.isclass(bound) or issubclass(reference.target, bound))
        return wanted is collections.abc.Callable or wanted is types.FunctionType
    given = _plain(result_of(reference.target))
    given = typing.get_origin(given) or given
    if not inspect.isclass(given):
        return True  # No return annotation, or a union: the function knows better.
    if structural:
        return getattr(given, "_is_protocol", False) or all(
            hasattr(given, name) or annotation_of(given, name) is not UNKNOWN
            for name in _members(wanted))
    return issubclass(given, wanted) or issubclass(wanted, given)


def _members(protocol: type) -> set[str]:
    """Returns the methods and attributes that a Protocol asks for."""
    return {name for base in inspect.getmro(protocol) if getattr(base, "_is_protocol", False)
            for name in [*vars(base), *inspect.get_annotations(base)]
            if name == "__call__" or not name.startswith("_")}


def _mend(value: Any, annotation: Any) -> str:
    """Returns the nearest value that would fit, as an instruction."""
    if isinstance(value, Reference):
        other = Reference(value.target, value.scope, not value.evaluate)
        if _fits(other, annotation):
            return f"write {other!r}"
        return f"refer to something that gives {_describe(annotation)}"
    choices = [item for item in _literals(annotation) if isinstance(item, str)]
    if isinstance(value, str) and choices and (near := did_you_mean(value, choices)):
        return near
    for candidate in _candidates(value):
        if not has_reference(candidate) and _fits(candidate, annotation):
            return f"write {candidate!r}"
    wanted = [member for member in typing.get_args(annotation) or (annotation,)
              if inspect.isclass(member) and member.__module__ != "builtins"
              and member is not type(None)]
    if wanted:
        return f"refer to something that gives one, such as @{name_of(wanted[0])}()"
    return f"write a value of type {_describe(annotation)}"


def _candidates(value: Any) -> Iterable[Any]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):  # Perhaps a literal in quotes.
            yield ast.literal_eval(value)
        yield (value,)
        yield [value]
    elif isinstance(value, float) and value.is_integer():
        yield int(value)
    elif isinstance(value, bool):
        yield int(value)
        yield str(value)
    elif isinstance(value, list):
        yield tuple(value)
    elif isinstance(value, tuple):
        yield list(value)
    elif isinstance(value, int):
        yield str(value)
        yield (value,)


def _literals(annotation: Any) -> Collection[Any]:
    annotation = _plain(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return arguments
    if origin in (typing.Union, types.UnionType):
        return [item for member in arguments for item in _literals(member)]
    return ()


def _describe(annotation: Any) -> str:
    if annotation is UNKNOWN:
        return "the type its documentation names"
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        return annotation.__qualname__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def _kind(value: Any) -> str:
    if isinstance(value, Reference) or value is None:
        return ""
    return f" ({type(value).__name__})"


def _example(value: Missing) -> str:
    """Returns a value of the right type, quoted for a shell."""
    annotation = _plain(value.annotation)
    members = typing.get_args(annotation) or (annotation,)
    if literals := _literals(annotation):
        return f"'\"{literals[0]}\"'" if isinstance(literals[0], str) else str(literals[0])
    for kind, example in ((bool, "True"), (int, "1"), (float, "0.1"), (str, "'\"...\"'")):
        if kind in members:
            return example
    if typing.get_origin(annotation) in (dict, collections.abc.Mapping):
        return "\"{'inputs': 64, 'targets': 64}\""
    name = value.name.rpartition(".")[2]
    return "'\"...\"'" if name.isupper() and annotation is UNKNOWN else "VALUE"


def unknown_parameter(target: Any, parameter: str, where: str) -> UserError | None:
    """Returns the mistake of binding a parameter that `target` does not have, or None."""
    known = parameters_of(target)
    if parameter in known or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return None
    names = [name for name, p in known.items() if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    return UserError(f"{name_of(target)} has no parameter {parameter!r} ({where})",
                     got=f"{parameter!r}; it has {', '.join(names) or 'none'}",
                     fix=did_you_mean(parameter, names) or "use one of its parameters")
