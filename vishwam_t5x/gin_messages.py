"""The words for what gin itself could not read, import or find."""

from __future__ import annotations

import pkgutil
import re
import sys
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

from vishwam_t5x import gin_graph
from vishwam_t5x.compat import refused
from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.core.storage import StorageAway

# Comes with the extra `seqio`; whoever misses one of these misses the extra.
_EXTRA_SEQIO = ("seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "sklearn")


def place(source: str, line: int) -> str:
    """Returns "file:line", or the flag of the command line that `source` is."""
    return source if source.startswith("--") else f"{source}:{line}"


def anew(error: UserError) -> UserError:
    """Returns the same error without what gin has added to it."""
    kind = StorageAway if isinstance(error, StorageAway) else UserError
    return kind(error.problem, error.got, error.fix)


def at(error: UserError, where: str) -> UserError:
    """Returns the error with the place in the gin file that it is about."""
    return UserError(f"{error.problem} ({where})", error.got, error.fix)


def not_one(selector: str, found: Sequence[Any], used: Mapping[str, Any], t5x: bool) -> UserError:
    """Says that a name without import is that of several things in `found`, or of nothing."""
    if found:
        names = ", ".join(gin_graph.name_of(known.wrapped) for known in found)
        return UserError(f"{selector!r} can be several things", got=names,
                         fix="write more of its name")
    short = {name.rpartition(".")[2]: name for name in used}
    absent = t5x and refused.whatever(selector)
    return absent or UserError(f"the files refer to nothing called {selector!r}",
                     fix=did_you_mean(selector.rpartition(".")[2], short)
                     or "name a function or class that one of the gin files uses")


def unreadable(error: SyntaxError | tokenize.TokenError, source: str, text: str) -> UserError:
    """Says in our words what gin's parser could not read."""
    if isinstance(error, SyntaxError):
        number, line, reason = error.lineno or 1, (error.text or "").strip(), error.msg
    else:
        reason, (number, _) = error.args
        lines = text.splitlines() or [""]
        number = min(number, len(lines))  # At the end of the file it is one too many.
        line = lines[number - 1].strip()
    bare = re.search(r"Failed to parse token '(.*)'", reason, re.DOTALL)
    name, _, value = (part.strip() for part in line.partition("="))
    if bare and source.startswith("--"):
        fix = f"a string needs quotes that survive the shell: {source}='\"{value}\"'"
    elif bare:
        fix = f"a string needs quotes: {name} = \"{value}\"; a macro is written %{bare[1]}"
    else:
        fix = "a statement is NAME = VALUE, with a Python literal, %MACRO or @reference as VALUE"
    reason = reason.strip().splitlines()[-1].strip()
    return UserError(f"cannot read {place(source, number)}: {reason}", got=line or text.strip(),
                     fix=fix)


def no_import(statement: str, module: str, error: ImportError, where: str) -> UserError:
    """Says which module is not there: the one `statement` names, or one that it needs."""
    absent = error.name or ""
    if module != absent and not module.startswith(f"{absent}."):
        extra = absent.partition(".")[0] in _EXTRA_SEQIO
        return UserError(f"{module} cannot be imported ({where})", got=str(error),
                         fix="pip install 'vishwam_t5x[seqio]'" if extra
                         else f"install {absent or 'what it needs'}")
    package, _, last = absent.rpartition(".")
    near = ""
    if package:
        folder = getattr(sys.modules.get(package), "__path__", ())
        near = did_you_mean(last, [found.name for found in pkgutil.iter_modules(folder)])
    return UserError(f"there is no module {absent} ({where})", got=statement,
                     fix=near or "install the package it is in, or mend the name")


def no_attribute(selector: str, symbols: Mapping[str, Any]) -> UserError:
    """Says which part of a dotted name is not there; `symbols` are the modules imported."""
    first, *rest = selector.split(".")
    value, path = symbols[first], first
    for name in rest:
        if not hasattr(value, name):
            public = [other for other in dir(value) if not other.startswith("_")]
            return UserError(f"{path} has no {name!r}", got=selector,
                             fix=did_you_mean(name, public) or f"it has {', '.join(public[:12])}")
        value, path = getattr(value, name), f"{path}.{name}"
    raise AssertionError("every part of the name is there")


def not_imported(selector: str, dynamic: bool, symbols: Mapping[str, Any]) -> UserError:
    """Says that no import of the file gives `selector`; `dynamic` if it registers by import."""
    head = selector.partition(".")[0]
    if not dynamic:
        return UserError(f"{selector} is not imported", fix="begin the file with 'from __gin__ "
                         f"import dynamic_registration' and 'from vishwam_t5x import {head}'")
    return UserError(f"{head!r} is not imported in this file", got=selector,
                     fix=did_you_mean(head, symbols)
                     or f"add a line such as 'from vishwam_t5x import {head}' at its top")
