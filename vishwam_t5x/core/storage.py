"""Files in folders and in object stores: the one door through which every room opens them.

A path with '://' is an object store's: gs:// (extra `gcs`), s3:// (extra `s3`), or anything else
that fsspec knows. There a request that fails for a passing reason (5xx, time-out, connection lost)
is tried again with back-off, for at most `patience()` seconds; a refusal is not. An object appears
whole or not at all. Paths without '://' are plain files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.patience import StorageAway, StorageError, patience, patiently

__all__ = ["StorageAway", "StorageError"]  # raised here, caught by those who use this module

PathLike = str | os.PathLike

EMULATOR_VARIABLE = "STORAGE_EMULATOR_HOST"
_EXTRAS = {"gs": "pip install 'vishwam_t5x[gcs]'", "gcs": "pip install 'vishwam_t5x[gcs]'",
           "s3": "pip install 'vishwam_t5x[s3]'"}

_prepared, _preparing = False, threading.Lock()

# etils would take TensorFlow for gs:// as soon as it is installed; whoever sets it decides.
os.environ.setdefault("EPATH_USE_TF", "false")


def is_remote(path: PathLike) -> bool:
    """Whether `path` is in an object store."""
    return "://" in os.fspath(path)


def prepare() -> None:
    """Sets how long the libraries below wait; before the first remote path is touched.

    Does not replace what the environment or fsspec's own configuration says already.
    """
    global _prepared
    with _preparing:
        if _prepared:
            return
        _prepared = True
    stall = max(5.0, min(60.0, patience() / 5))  # seconds without a byte: the request is lost
    emulator = os.environ.get(EMULATOR_VARIABLE)
    if emulator:
        url = emulator if "://" in emulator else f"http://{emulator}"
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", url)
        # gcsfs would ask over gRPC what kind of bucket it is, which no emulator answers.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(round(stall)))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(round(stall)))
    import fsspec.config

    # Arrays are written past gcsfs, by TensorStore: a listing it remembers would be an old one.
    options: dict[str, Any] = {"use_listings_cache": False}
    if emulator:
        options["token"] = "anon"
    with contextlib.suppress(ImportError):  # said by `_open`, with the fix
        import aiohttp

        # Not the whole request: a large object on a slow line is no fault.
        options["requests_timeout"] = aiohttp.ClientTimeout(
            total=None, sock_connect=stall, sock_read=stall)
    for scheme in ("gs", "gcs"):
        fsspec.config.conf[scheme] = {**options, **fsspec.config.conf.get(scheme, {})}
    # It prints a traceback for each request it gives up; the error that we raise says it once.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def _open(path: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a remote path, and the path as it knows it."""
    prepare()
    import fsspec

    scheme = path.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise UserError(f"{scheme}:// paths need a package that is not installed",
                        got=f"{path}: {error}",
                        fix=_EXTRAS.get(scheme, f"install fsspec's package for {scheme}://")
                        ) from error
    except ValueError as error:
        raise UserError(f"{scheme}:// is no kind of storage that is known", got=path,
                        fix="gs://, s3:// or a plain path") from error


def join(folder: PathLike, *names: str) -> str:
    """Returns the path of `names` below `folder`; a whole path among them stands for itself."""
    path = os.fspath(folder)
    for name in names:
        if is_remote(name) or os.path.isabs(name):
            path = name
        else:
            path = f"{path.rstrip('/')}/{name}" if is_remote(path) else os.path.join(path, name)
    return path


def parent(path: PathLike) -> str:
    """Returns the folder that `path` lies in."""
    whole = os.fspath(path)
    if not is_remote(whole):
        return os.path.dirname(whole) or "."
    scheme, rest = whole.split("://", 1)
    return f"{scheme}://{rest.rstrip('/').rpartition('/')[0]}"


def expanded(path: PathLike) -> str:
    """Returns a path with '~' resolved; a remote one as it is."""
    return os.fspath(path) if is_remote(path) else os.path.expanduser(path)


def local(path: PathLike) -> pathlib.Path:
    """Returns a plain path with '~' resolved."""
    return pathlib.Path(path).expanduser()


def place(path: PathLike) -> pathlib.PurePath:
    """Returns a path to build others on with `/`: a plain one with '~' resolved, or gs:// or s3://.

    Give what is built to the functions here: a remote one must be opened with patience.
    """
    if not is_remote(path):
        return local(path)
    from etils import epath

    return epath.Path(path)


def read_bytes(path: PathLike) -> bytes:
    """Returns what is in a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read; see `patiently`.
    """
    if not is_remote(path):
        return local(path).read_bytes()
    system, name = _open(os.fspath(path))
    return patiently("read", path, lambda: system.cat_file(name))


def read_text(path: PathLike) -> str:
    """Returns what is in a UTF-8 file; raises as `read_bytes`."""
    return read_bytes(path).decode("utf-8")


def write_bytes(path: PathLike, data: bytes, new_only: bool = False) -> None:
    """Writes a whole file or, if killed, none of it; its folder is made.

    Args:
        path: replaced if it is there.
        data: what it shall hold.
        new_only: of a remote path: fail where it is there already. Gives no lock on its own: not
            every store heeds it, and a repeated request may collide with its own first try.

    Raises:
        OSError: it cannot be written; see `patiently`.
        FileExistsError: `new_only`, and it is there.
    """
    if is_remote(path):
        system, name = _open(os.fspath(path))
        mode = {"mode": "create"} if new_only else {}
        patiently("written", path, lambda: system.pipe_file(name, data, **mode))
        return
    file = local(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Writes a UTF-8 file as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def exists(path: PathLike) -> bool:
    """Whether there is a file or a folder; raises as `patiently`."""
    if not is_remote(path):
        return local(path).exists()
    return _info(path) is not None


def is_file(path: PathLike) -> bool:
    """Whether there is a file; raises as `patiently`."""
    if not is_remote(path):
        return local(path).is_file()
    found = _info(path)
    return found is not None and found["type"] == "file"


def _info(path: PathLike) -> dict[str, Any] | None:
    system, name = _open(os.fspath(path))
    try:
        return patiently("looked at", path, lambda: system.info(name))
    except FileNotFoundError:
        return None


def fingerprint(path: PathLike) -> tuple[int, str]:
    """Returns bytes and checksum of a remote object, as the store itself keeps them.

    Returns:
        (bytes, 'crc32c:…' or 'md5:…', or '' where the store keeps none).

    Raises:
        FileNotFoundError: there is none.
        StorageError: see `patiently`.
    """
    found = _info(path)
    if found is None or found["type"] != "file":
        raise FileNotFoundError(os.fspath(path))
    for key, name in (("crc32c", "crc32c"), ("md5Hash", "md5"), ("ETag", "etag")):
        if found.get(key):
            return int(found["size"]), f"{name}:{found[key]}".replace('"', "")
    return int(found["size"]), ""


def names(folder: PathLike) -> list[str]:
    """Returns the names of what lies in a folder, sorted; none where there is no folder."""
    if not is_remote(folder):
        here = local(folder)
        return sorted(entry.name for entry in here.iterdir()) if here.is_dir() else []
    system, name = _open(os.fspath(folder))
    try:
        found = patiently("listed", folder, lambda: system.ls(name, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    # A store may list an empty object that stands for the folder itself.
    own = name.strip("/")
    return sorted({entry.strip("/").rsplit("/", 1)[-1] for entry in found
                   if entry.strip("/") != own})


def files_below(folder: PathLike) -> list[str]:
    """Returns the '/'-joined paths of all files below a remote folder, sorted."""
    system, name = _open(os.fspath(folder))
    try:
        found = patiently("listed", folder, lambda: system.find(name))
    except FileNotFoundError:
        return []
    own = name.strip("/") + "/"
    return sorted(entry.strip("/").removeprefix(own) for entry in found
                  if entry.strip("/").startswith(own) and not entry.endswith("/"))


def remove(path: PathLike) -> None:
    """Deletes a file; does nothing where there is none."""
    if not is_remote(path):
        local(path).unlink(missing_ok=True)
        return
    system, name = _open(os.fspath(path))
    with contextlib.suppress(FileNotFoundError):
        patiently("deleted", path, lambda: system.rm_file(name))


def remove_tree(folder: PathLike) -> None:
    """Deletes a remote folder and everything in it; does nothing where there is none."""
    system, name = _open(os.fspath(folder))

    def delete() -> None:
        if system.exists(name):
            system.rm(name, recursive=True)

    with contextlib.suppress(FileNotFoundError):  # another try has got there
        patiently("deleted", folder, delete)


def upload(source: PathLike, target: PathLike) -> None:
    """Copies a plain file to a remote path, where it appears whole."""
    system, name = _open(os.fspath(target))
    patiently("written", target, lambda: system.put_file(os.fspath(source), name))


def download(source: PathLike, target: PathLike) -> None:
    """Copies a remote file to a plain path, where it appears whole.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read or written.
    """
    system, name = _open(os.fspath(source))
    file = local(target)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        patiently("read", source, lambda: system.get_file(name, os.fspath(temporary)))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def as_local(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a plain path to read a file from, for libraries that know no other.

    Raises:
        FileNotFoundError: there is none at the remote path.
    """
    if not is_remote(path):
        yield local(path)
        return
    with tempfile.TemporaryDirectory(prefix="vishwam-") as folder:
        copy = pathlib.Path(folder) / os.fspath(path).rstrip("/").rsplit("/", 1)[-1]
        download(path, copy)
        yield copy
