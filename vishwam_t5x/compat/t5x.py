"""T5X's package: its modules as attributes, for files that say `import t5x`."""

from __future__ import annotations

import importlib
import types

from vishwam_t5x.compat import names

STANDS_FOR = "t5x"


def __getattr__(name: str) -> types.ModuleType:
    module = names.MODULES.get(f"t5x.{name}")
    if module is None:
        raise AttributeError(name)
    return importlib.import_module(module)
