"""What the user's gin files say about the hardware themselves, and what a preset must not undo.

A preset of gin/hardware/ is read after the user's files: a recipe that includes another one must
not undo it; one that includes the same has it, and what it changes of it stands. What the user
wrote with their own hand, the lines of `vishwam plan --search` above all, must stand even so: it is
said again on the command line, which is read last.

Files are read as text: starting a run elsewhere needs no gin, and none of what the files import.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
_OURS = (PACKAGE / "gin_files", PACKAGE.parent / "gin")
_INCLUDE = re.compile(r"""include\s+(['"])(.+?)\1""")
_MACRO = re.compile(r"(MESH|PRECISION|REMAT)\s*=\s*(.+)")
_MESH = re.compile(r"(?:\w+\.)*MeshConfig\.(\w+)\s*=\s*(.+)")
_MESH_BLOCK = re.compile(r"(?:\w+\.)*MeshConfig\s*:")
_MEMBER = re.compile(r"\s+(\w+)\s*=\s*(.+)")
# What presets say too.
_AS_PRESETS = re.compile(r"@(\w+\.)*MeshConfig\(\)")


def packaged(gin_file: str) -> bool:
    """Whether a gin file comes with the package, and so is wherever that is installed."""
    inside = gin_file.removeprefix("gin/")
    return inside != gin_file and any((folder / inside).is_file() for folder in _OURS)


@dataclasses.dataclass
class Said:
    """What gin files say, as far as it matters to a launch.

    Attributes:
        own: what the user's own lines bind, NAME to value, where nothing after it binds it anew.
        watched: whether the run has a `WatchdogConfig`.
        asks: whether the files say which metadata server that asks.
        hardware: presets of gin/hardware/ that the files include, by file name.
    """

    own: dict[str, str] = dataclasses.field(default_factory=dict)
    watched: bool = False
    asks: bool = False
    hardware: set[str] = dataclasses.field(default_factory=set)

    def flags(self) -> list[str]:
        """Returns `own` as flags of a verb."""
        return [f"--gin.{name}={value}" for name, value in self.own.items()
                if not (name == "MESH" and _AS_PRESETS.fullmatch(value))]


def read(gin_files: Sequence[str], search_paths: Sequence[str] = ()) -> Said:
    """Returns what the files say, in their order; one that is not on this machine says nothing.

    Args:
        gin_files: values of --gin_file.
        search_paths: folders of --gin_search_paths.
    """
    said = Said()
    for name in gin_files:
        _read(name, search_paths, said, ())
    return said


def _read(name: str, folders: Sequence[str], said: Said, open_: tuple[pathlib.Path, ...]) -> None:
    path = _find(name, folders)
    if path is None or path in open_:
        return
    ours = any(path.is_relative_to(folder.resolve()) for folder in _OURS)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # The verb will say what is wrong with it.
    if ours and path.parent.name == "hardware":
        said.hardware.add(path.name)
    said.watched = said.watched or "@watchdog.WatchdogConfig()" in text
    said.asks = said.asks or "metadata_server" in text
    for what, value in _statements(text):
        if what == "include":
            _read(value, folders, said, (*open_, path))
        elif ours:
            said.own.pop(what, None)
        else:
            said.own[what] = value


def _find(name: str, folders: Sequence[str]) -> pathlib.Path | None:
    places = [*map(pathlib.Path, folders), pathlib.Path.cwd(), PACKAGE.parent]
    candidates = [(place / pathlib.Path(name).expanduser()) for place in places]
    if name.startswith("gin/"):
        candidates.append(_OURS[0] / name.removeprefix("gin/"))
    return next((path.resolve() for path in candidates if path.is_file()), None)


def _statements(text: str) -> Iterator[tuple[str, str]]:
    """Yields ('include', file) and (name, value), in order, of those that matter here."""
    block = False
    for line in text.splitlines():
        line = re.sub(r"\s*(#[^'\"]*)?$", "", line)
        if block and (member := _MEMBER.fullmatch(line)):
            yield f"mesh.MeshConfig.{member[1]}", member[2]
        elif line:
            block = _MESH_BLOCK.fullmatch(line) is not None
        if found := _INCLUDE.fullmatch(line):
            yield "include", found[2]
        elif found := _MACRO.fullmatch(line):
            yield found[1], found[2]
        elif found := _MESH.fullmatch(line):
            yield f"mesh.MeshConfig.{found[1]}", found[2]
