"""Where a gin file is found: folders given, the current one, the checkout, the installed data."""

from __future__ import annotations

import atexit
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence

from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError, did_you_mean

PACKAGE = pathlib.Path(__file__).resolve().parent
_INCLUDE = re.compile(r"^[ \t]*include[ \t]+(['\"])(.+?)\1", re.MULTILINE)
# What the checkout calls `gin/` is installed under this name (see pyproject.toml).
INSTALLED = PACKAGE / "gin_files"


def checkout() -> pathlib.Path | None:
    """Returns the root of the source checkout this package runs from, or None when installed."""
    root = PACKAGE.parent
    return root if (root / "gin").is_dir() and (root / "pyproject.toml").is_file() else None


def search_paths(extra: Iterable[str | os.PathLike] = ()) -> list[pathlib.Path]:
    """Returns the folders a gin file is looked for in, first match wins.

    Args:
        extra: folders to look in before all others (`--gin_search_paths`).
    """
    for path in extra:
        if storage.is_remote(path):
            raise UserError("gin files are searched for in folders, not in object stores",
                            got=path, fix="--gin_file=gs://… with the whole path")
    paths = [pathlib.Path(path) for path in extra] + [pathlib.Path.cwd()]
    paths += [root] if (root := checkout()) else [INSTALLED]
    return list({path.resolve(): path for path in paths}.values())


def find(name: str | os.PathLike, paths: Sequence[pathlib.Path]) -> pathlib.Path:
    """Returns the path of the gin file called `name`.

    Args:
        name: an absolute path, one relative to a folder of `paths`, or one in an object store,
            e.g. gs://bucket/run.gin; of that the copy is returned that was made of it now.
        paths: as `search_paths` returns them.

    Raises:
        UserError: no such file; the message lists the folders and the nearest names.
    """
    if storage.is_remote(name):
        return _copy(os.fspath(name))
    wanted = pathlib.Path(name).expanduser()
    for candidate in [wanted] if wanted.is_absolute() else _candidates(wanted, paths):
        if candidate.is_file():
            return candidate
    if wanted.parts[:1] == ("t5x",):  # T5X's own, in our words, where T5X itself is not at hand
        theirs = pathlib.Path("gin") / wanted
        for candidate in _candidates(theirs, [checkout() or INSTALLED]):
            if candidate.is_file():
                return candidate
    looked_in = "\n       ".join(map(str, paths))
    hint = _near(wanted, paths)
    raise UserError(
        f"no gin file {str(name)!r}",
        got=f"nothing of that name in\n       {looked_in}",
        fix=hint or "give its path, or add its folder with --gin_search_paths=FOLDER")


def with_included(names: Iterable[str | os.PathLike], paths: Sequence[pathlib.Path]
                  ) -> Iterator[str]:
    """Yields the text of gin files and of all that they include, each once.

    Args:
        names: as `find` takes them.
        paths: as `search_paths` returns them.

    Raises:
        UserError: one of `names` is not there; an included one is left to whoever reads the file
            that names it, who can say where.
    """
    waiting, seen = [(name, True) for name in names], set()
    while waiting:
        name, must = waiting.pop(0)
        try:
            path = find(name, paths)
        except UserError:
            if must:
                raise
            continue
        if path.resolve() not in seen:
            seen.add(path.resolve())
            text = path.read_text(encoding="utf-8")
            waiting += [(found, False) for _, found in _INCLUDE.findall(text)]
            yield text


def _copy(url: str) -> pathlib.Path:
    """Copies a gin file from an object store; its folder is named by the path, for messages."""
    place = _copies() / url.replace("://", "/")
    try:
        storage.download(url, place)
    except FileNotFoundError:
        raise UserError(f"no gin file {url!r}", got="nothing of that name in the object store",
                        fix="gcloud storage ls shows what there is") from None
    return place


@functools.cache
def _copies() -> pathlib.Path:
    folder = tempfile.mkdtemp(prefix="vishwam-gin-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


def available(paths: Sequence[pathlib.Path]) -> list[str]:
    """Returns the names of the gin files under `gin/` of every folder in `paths`, sorted."""
    names = set()
    for path in paths:
        top = path if path == INSTALLED else path / "gin"
        if top.is_dir():
            names |= {f"gin/{file.relative_to(top).as_posix()}" for file in top.rglob("*.gin")}
    return sorted(names)


def _candidates(wanted: pathlib.Path, paths: Sequence[pathlib.Path]) -> Iterable[pathlib.Path]:
    for path in paths:
        if path == INSTALLED and wanted.parts[:1] == ("gin",):
            yield path.joinpath(*wanted.parts[1:])
        else:
            yield path / wanted


def _near(wanted: pathlib.Path, paths: Sequence[pathlib.Path]) -> str:
    names = available(paths)
    for path in _candidates(wanted.parent, paths):
        if path.is_dir():
            names += [str(wanted.parent / file.name) for file in path.glob("*.gin")]
    same = sorted({name for name in names if pathlib.PurePath(name).stem == wanted.stem})
    if same:
        return "did you mean " + " or ".join(map(repr, same[:3])) + "?"
    by_stem = {pathlib.PurePath(name).stem: name for name in names}
    hint = did_you_mean(wanted.as_posix(), names) or did_you_mean(wanted.stem, by_stem)
    for stem, name in by_stem.items():
        hint = hint.replace(repr(stem), repr(name))
    return hint
