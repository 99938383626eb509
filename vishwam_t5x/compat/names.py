"""Which module of ours stands for which of T5X's, and how a gin file of T5X's is told from ours.

Imports nothing: every gin file is looked at with it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vishwam_t5x.compat import refused
from vishwam_t5x.core.errors import UserError, did_you_mean

_HERE = "vishwam_t5x.compat"
_SCRIPTS = "vishwam_t5x.t5x_scripts"
MAIN = "t5x"
"""What the functions of T5X's scripts are called in messages: `t5x.train`."""

MODULES = {
    "__main__": _SCRIPTS,
    "seqio": f"{_HERE}.seqio_names",
    "t5x": f"{_HERE}.t5x",
    "t5x.adafactor": f"{_HERE}.adafactor",
    "t5x.checkpoints": f"{_HERE}.checkpoints",
    "t5x.decoding": f"{_HERE}.decoding",
    "t5x.examples.decoder_only.network": f"{_HERE}.decoder_only.network",
    "t5x.examples.scalable_t5.network": f"{_HERE}.scalable_t5.network",
    "t5x.examples.t5.network": f"{_HERE}.t5.network",
    "t5x.gin_utils": f"{_HERE}.gin_functions",
    "t5x.losses": "vishwam_t5x.objectives.losses",
    "t5x.metrics": "vishwam_t5x.objectives.metrics",
    "t5x.models": f"{_HERE}.models",
    "t5x.optimizers": f"{_HERE}.optimizers",
    "t5x.partitioning": f"{_HERE}.partitioning",
    "t5x.train": _SCRIPTS,
    "t5x.eval": _SCRIPTS,
    "t5x.infer": _SCRIPTS,
    "t5x.trainer": f"{_HERE}.trainer",
    "t5x.utils": f"{_HERE}.t5x_utils",
}
"""T5X's modules (and those that its gin files import beside them) and ours."""

VERBS = ("train", "evaluate", "infer")
"""The verbs that T5X's scripts have counterparts of."""

CHOICES = ("compat", "installed")
"""Who runs T5X's gin files: we, or T5X itself."""

_SPEAKS = re.compile(
    rf"^[ \t]*(?:(?:from|import)[ \t]+(?:t5x\b|__main__\b|{re.escape(_HERE)}\b)"
    r"|from[ \t]+vishwam_t5x[ \t]+import[ \t]+t5x_scripts\b"
    r"|include[ \t]+['\"]t5x/)", re.MULTILINE)
_THEIRS = re.compile(r"(^|/)t5x/(configs|examples|contrib)/")
# Libraries that a gin file may name things of, and that register no tasks.
_LIBRARIES = {"__gin__", "vishwam_t5x", "gin", "jax", "flax", "optax", "numpy", "functools"}


def speaks(text: str) -> bool:
    """Whether a gin file is one of T5X's, or made of such."""
    return _SPEAKS.search(text) is not None


def is_theirs(where: str) -> bool:
    """Whether a place ("file:line") is in a file that comes with T5X: what it binds need not be
    read, as its files serve many models and runs."""
    return _THEIRS.search(where) is not None


def ours(module: str) -> str:
    """Returns what stands for a module of T5X's, or the module itself if it is none.

    Raises:
        UserError: T5X has it, or could have it, and we have not.
    """
    if module in MODULES:
        return MODULES[module]
    if module.partition(".")[0] != "t5x":
        return module
    if (why := refused.whatever(module)) is not None:
        raise why
    raise UserError(f"nothing here stands for {module}", got=f"import of {module}",
                    fix=did_you_mean(module, MODULES)
                    or "what there is: " + ", ".join(name for name in MODULES if "." in name))


def absent(selector: str, symbols: Mapping[str, Any]) -> UserError | None:
    """Returns why a name of T5X's is not here, if that is known."""
    first, _, rest = selector.partition(".")
    module = getattr(symbols[first], "STANDS_FOR", None)
    return module and refused.whatever(f"{module}.{rest}")


def entry(verb: str, roots: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """Returns the function of T5X's that a verb calls, among those that the files bind.

    Raises:
        UserError: the files bind none for this verb.
    """
    module = MODULES["__main__"]
    for root in roots:
        if root.__module__ == module and root.__name__ == verb:
            return root
    bound = [root.__name__ for root in roots if root.__module__ == module]
    if verb not in VERBS:
        raise UserError(f"vishwam {verb} does not read T5X's gin files",
                        got="files that import t5x or __main__",
                        fix="vishwam train, evaluate and infer do; for the others write the run "
                            "with gin/runs/ and gin/models/")
    files = {"train": "pretrain.gin", "evaluate": "eval.gin", "infer": "infer.gin"}
    raise UserError(f"these gin files say nothing of T5X's {verb}",
                    got=f"bindings of {', '.join(bound)}" if bound else "no binding of any",
                    fix=f"--gin_file=t5x/configs/runs/{files[verb]}" + (
                        f", or vishwam {bound[0]}" if bound else ""))


def may_wait(module: str) -> bool:
    """Whether a module need not be imported before something in it is named: T5X's files import
    modules of tasks, which bring TensorFlow; here the process that fills the cache does.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    if module.partition(".")[0] in _LIBRARIES:
        return False
    _check_there(module)
    return True


def _check_there(module: str) -> None:
    parts = module.split(".")
    if module in sys.modules:
        return
    spec = importlib.util.find_spec(parts[0])
    for length in range(1, len(parts) + 1):
        if length > 1:
            name = ".".join(parts[:length])
            folders = spec.submodule_search_locations
            spec = folders and importlib.machinery.PathFinder.find_spec(name, folders)
        if spec is None:
            name = ".".join(parts[:length])
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class Deferred(types.ModuleType):
    """A module that is imported when something in it is asked for.

    Attributes:
        name: its full name.
        used: whether something was.
    """

    def __init__(self, name: str, whole: bool) -> None:
        """Args:
            name: full name.
            whole: whether the gin file's name for it is the module itself, not its first package.
        """
        super().__init__(name)
        self.name, self.used = name, False
        self._at = name if whole else name.partition(".")[0]

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        self.used = True
        try:
            importlib.import_module(self.name)
        except ImportError as error:
            raise UserError(f"{self.name} cannot be imported", got=error,
                            fix=f"install {error.name or 'what it needs'}") from error
        return getattr(sys.modules[self._at], attribute)
