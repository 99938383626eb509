"""Which checkpoint a conversion that was killed was of: the next try converts the same one.

The newest of a run that goes on is another one by then, and its step names the folder to write.
What was found is kept in a file beside that folder for as long as the conversion lasts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator

from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.checkpointing import manifest as manifests
from vishwam_t5x.checkpointing.convert import t5x
from vishwam_t5x.checkpointing.convert.conversion import (
    HUGGINGFACE,
    Conversion,
    Opened,
    open_any,
)
from vishwam_t5x.checkpointing.convert.new_folder import TEMPORARY, alone
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError

log = logging.getLogger(__name__)

FILE = "converting.json"


def same_again(opened: Opened, given: str | os.PathLike, kind: str, to: str | os.PathLike
               ) -> Opened:
    """Returns the checkpoint that an interrupted conversion was of, or else `opened`.

    Args:
        opened: what `given` means now.
        given: what --from says.
        kind: layout to write.
        to: what --to says.

    Raises:
        UserError: the file that says it cannot be read, or it goes on in another process.
    """
    file = directories.absolute(to) / FILE
    if kind == HUGGINGFACE or not storage.exists(file):
        return opened  # a Hugging Face folder has no step in its name
    try:
        said = {name: str(value) for name, value in json.loads(storage.read_text(file)).items()}
        source, checkpoint, target = said["from"], said["checkpoint"], epath.Path(said["target"])
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError("what an interrupted conversion was of cannot be read",
                        got=f"{file}: {error!r}", fix=f"delete {file}") from error
    if _is_finished(target):  # killed between the end and the removal of the file
        storage.remove(file)
        return opened
    if source != str(directories.absolute(given)) or said.get("format", kind) != kind:
        return opened
    there = storage.exists(checkpoint)
    if storage.is_remote(target) or not there:
        _remove_remains(directories.absolute(to), target)
    if checkpoint == str(opened.place):
        return opened
    if there:
        log.warning("going on with the conversion of %s that was interrupted, not with %s; to "
                    "convert that one give its own path, or delete %s", checkpoint, opened.place,
                    file)
        return open_any(checkpoint)
    log.warning("the checkpoint of the interrupted conversion is gone (%s): converting %s",
                checkpoint, opened.place)
    return opened


def _is_finished(target: epath.Path) -> bool:
    if not storage.is_remote(target):
        return storage.exists(target)  # it gets this name when it is whole
    return manifests.exists(target) or t5x.is_whole(target)


def _remove_remains(to: epath.Path, target: epath.Path) -> None:
    """Removes the half of a folder: one that nobody will finish, or that lies in an object store,
    where it has the very name of the target. Only one below `to` can be ours.
    """
    if to not in target.parents or not re.fullmatch(r"(checkpoint_)?\d+", target.name):
        return
    with alone(target):  # or it is not interrupted, and another process goes on with it
        if _is_finished(target):
            return
        if not storage.is_remote(target):
            (target.parent / f"{target.name}{TEMPORARY}").rmtree(missing_ok=True)
        elif storage.names(target):
            log.warning("removing what an interrupted conversion had left: %s", target)
            directories.remove(target)


@contextlib.contextmanager
def kept_in_mind(conversion: Conversion, given: str | os.PathLike, to: str | os.PathLike
                 ) -> Iterator[None]:
    """Keeps the file while the conversion lasts; only a kill leaves it. For `conversion.write`,
    which enters it when it is the only one to write there.

    Args:
        conversion: what is to be written.
        given: what --from says.
        to: what --to says.
    """
    folder = directories.absolute(to)
    if conversion.kind == HUGGINGFACE or folder not in conversion.target.parents:
        yield  # the name of the target is given
        return
    file = folder / FILE
    text = json.dumps({
        "from": str(directories.absolute(given)), "checkpoint": str(conversion.opened.place),
        "target": str(conversion.target), "format": conversion.kind}) + "\n"
    storage.write_text(file, text)
    try:
        yield
    finally:
        # Another conversion, to another folder, may have written its own since.
        with contextlib.suppress(FileNotFoundError, storage.StorageError):
            if storage.read_text(file) == text:
                storage.remove(file)
