"""The laws of the house: who may import whom, what lives where, how long a file may be."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess

import pytest

from helpers import ROOT, run_python

# Imports run downhill: a room imports rooms of lower floors and itself. A file directly under
# vishwam_t5x/ (the verbs, gin_*.py) is on the top floor, where one may import another.
FLOORS = {
    "core": 0,
    "parallelism": 1, "precision": 1, "objectives": 1,
    "models": 2, "data": 2, "checkpointing": 2,
    "peft": 3, "serving": 3, "evaluation": 3,
    "training": 4,
    "planning": 5, "launching": 5, "compat": 5,
}
TOP = 6
TENSORFLOW = {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "clu", "t5"}
MAX_LINES = 400
MAX_FUNCTION = 80
# The train loop reads top to bottom as one page.
LONGER_FUNCTIONS = {("vishwam_t5x/training/loop.py", 120), ("vishwam_t5x/train.py", 120)}
# A path of the machine that something was written on has no business in the project.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|tmp/w|root|opt/wh)/|\.\./shared\b|(?<!\w)\.library\b")


def tracked(*patterns: str) -> list[pathlib.Path]:
    """Returns the files of the project, by git where there is git."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z",
                           "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found = [ROOT / name for name in done.stdout.split("\0") if name]
    else:
        found = [path for pattern in patterns for path in ROOT.rglob(pattern)
                 if not any(part.startswith((".venv", "build")) for part in path.parts)]
    return sorted(path for path in found if path.is_file())


def name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


LIBRARY = [path for path in tracked("*.py") if name(path).startswith("vishwam_t5x/")]
SOURCES = [path for path in tracked("*.py") if name(path).startswith(("vishwam_t5x/", "tasks/"))]


def module_of(path: pathlib.Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts[0] = {"tasks": "vishwam_t5x_tasks"}.get(parts[0], parts[0])
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: pathlib.Path) -> set[str]:
    """Returns every module that `path` imports anywhere, and every name taken from a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_of(path)
            if path.name != "__init__.py":
                package = package[:-1]
            base = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def room(module: str) -> str | None:
    """Returns the room that a module of the library is in; "" for the top floor."""
    parts = module.split(".")
    if parts[0] != "vishwam_t5x" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in FLOORS else ""


def uphill(path: pathlib.Path) -> list[str]:
    """Returns the imports of `path` that break the law."""
    here = room(".".join(module_of(path)))
    floor = FLOORS.get(here, TOP)
    wrong = []
    for module in imports(path):
        there = room(module)
        if there is None or there == here or module == "vishwam_t5x.__version__":
            continue
        if FLOORS.get(there, TOP) >= floor:
            wrong.append(module)
    return wrong


def test_every_room_has_a_floor():
    rooms = {module_of(path)[1] for path in LIBRARY if len(path.relative_to(ROOT).parts) > 2}
    assert rooms <= set(FLOORS), "a room without a floor: add it to FLOORS and to DESIGN"


def test_imports_run_downhill():
    wrong = {name(path): found for path in LIBRARY if (found := uphill(path))}
    assert not wrong


def test_data_does_not_import_its_tensorflow_room():
    for path in LIBRARY:
        if name(path).startswith("vishwam_t5x/data/tf/"):
            continue
        if name(path) == "vishwam_t5x/cache.py" or room(".".join(module_of(path))) == "":
            continue  # A verb may, when it is run.
        assert not [module for module in imports(path)
                    if module.startswith("vishwam_t5x.data.tf")], name(path)


def test_tensorflow_and_seqio_only_in_their_rooms():
    for path in SOURCES:
        if not name(path).startswith(("vishwam_t5x/data/tf/", "tasks/")):
            roots = {module.partition(".")[0] for module in imports(path)}
            assert not roots & TENSORFLOW, name(path)


def test_grain_is_never_imported():
    """Its import replaces `__import__` for a moment, under which another thread's import breaks."""
    assert not [name(path) for path in LIBRARY
                if "grain" in {module.partition(".")[0] for module in imports(path)}]


def test_only_gin_config_imports_gin():
    importers = [name(path) for path in SOURCES
                 if "gin" in {module.partition(".")[0] for module in imports(path)}]
    assert importers == ["vishwam_t5x/gin_config.py"]


def test_the_checks_see_a_broken_law(tmp_path, monkeypatch):
    """The laws above must be able to fail."""
    monkeypatch.setattr("test_laws.ROOT" if __name__ == "test_laws" else f"{__name__}.ROOT",
                        tmp_path)
    path = tmp_path / "vishwam_t5x" / "models" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text("def f():\n    from ..training import loop\n    import seqio.utils\n"
                    "from vishwam_t5x import data, core\nfrom . import layers\n")
    assert sorted(uphill(path)) == ["vishwam_t5x.data", "vishwam_t5x.training",
                                    "vishwam_t5x.training.loop"]
    assert "seqio.utils" in imports(path)


def test_no_python_in_gin():
    assert not [name(path) for path in tracked("*.py") if name(path).startswith("gin/")]


def test_package_init_imports_nothing():
    tree = ast.parse((ROOT / "vishwam_t5x" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_room_inits_hold_one_docstring():
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != ROOT / "vishwam_t5x":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and ast.get_docstring(ast.Module(body, [])), name(path)


def test_no_utils():
    assert not [name(path) for path in tracked("*.py") if path.stem in ("utils", "util", "misc")]


@pytest.mark.parametrize("path", tracked("*.py"), ids=name)
def test_length_of_files_and_functions(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    limit = dict(LONGER_FUNCTIONS).get(name(path), MAX_FUNCTION)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{node.name}: {length} lines"


def test_every_module_and_public_class_says_what_it_is_for():
    silent = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            silent.append(name(path))
        silent += [f"{name(path)}: {node.name}" for node in tree.body
                   if isinstance(node, (ast.ClassDef, ast.FunctionDef))
                   and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not silent


def test_no_machine_paths():
    this = pathlib.Path(__file__).resolve()
    found = []
    for path in tracked("*"):
        if path.suffix in (".npz", ".npy", ".png", ".model") or path.resolve() == this:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATHS.search(line):
                found.append(f"{name(path)}:{number}: {line.strip()[:80]}")
    assert not found


def test_everything_else_imports_without_tensorflow_and_seqio():
    modules = [".".join(module_of(path)) for path in LIBRARY
               if not name(path).startswith("vishwam_t5x/data/tf/")
               and path.name != "__main__.py"]
    run_python(f"""
        import importlib, sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {TENSORFLOW!r}:
                    raise ImportError(name + " is blocked")

        sys.meta_path.insert(0, Blocked())
        for name in {modules!r}:
            importlib.import_module(name)
        assert not {TENSORFLOW!r} & set(sys.modules)
        """)
