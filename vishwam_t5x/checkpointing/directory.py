"""The folder of a run's checkpoints: what lies in it, by name, without opening any array.

    MODEL_DIR/checkpoints/1000/                  a checkpoint: Orbax's files and manifest.json
    MODEL_DIR/checkpoints/2000.orbax-checkpoint-tmp/   a save under way, or killed
    MODEL_DIR/checkpoints/2000.damaged/          found damaged on restore
    MODEL_DIR/checkpoints/2000.abandoned/        newer than a checkpoint that was gone back to

An object store knows no renaming of folders. There a save writes into the folder's own name, and
what makes a checkpoint of it are two objects written last: manifest.json, then Orbax's
commit_success.txt. Deleting begins with the latter; one set aside has a manifest.json.REASON.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile

from etils import epath

from vishwam_t5x.checkpointing import manifest as manifests
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint, Manifest
from vishwam_t5x.core import storage
from vishwam_t5x.core.distributed import any_process, from_primary, is_primary
from vishwam_t5x.core.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_TEMPORARY = ".orbax-checkpoint-tmp"
DAMAGED, ABANDONED = "damaged", "abandoned"
PINNED = "PINNED"
"""A file of this name in a checkpoint, as in T5X, and no rule of keeping deletes it."""


def absolute(path: str | os.PathLike) -> epath.Path:
    """Returns the whole path: Orbax takes no relative ones, and the working folder may change."""
    if not storage.is_remote(path):
        return epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path))))
    if not os.fspath(path).startswith("gs://"):
        raise UserError("checkpoints lie in a folder or in gs://", got=path)
    storage.prepare()  # Orbax opens it too
    return epath.Path(path)


def steps_in(folder: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints in `folder`, rising; damaged ones are among them."""
    return sorted(int(name) for name in storage.names(folder) if re.fullmatch(r"\d+", name)
                  and (not storage.is_remote(folder) or manifests.exists(folder / name)))


def agreed_steps_in(folder: epath.Path) -> list[int]:
    """As `steps_in`, as process 0 sees it: a network file system may show others less."""
    steps = steps_in(folder) if is_primary() else []
    return list(map(int, from_primary("checkpoints listed", " ".join(map(str, steps))).split()))


def sweep(folder: epath.Path) -> list[str]:
    """Removes what killed saves left behind and returns the names; one process only.

    Must not run while another process saves into `folder`.
    """
    swept = []
    for name in storage.names(folder):
        if storage.is_remote(folder):
            if _TEMPORARY in name or re.fullmatch(r"\d+", name) and not (
                    manifests.exists(folder / name) or _set_aside_as(folder / name)):
                storage.remove_tree(folder / name)
                swept.append(name)
        elif _TEMPORARY in name:
            (folder / name).rmtree(missing_ok=True)
            swept.append(name)
    if swept:
        log.warning("removed what an interrupted save had left in %s: %s", folder,
                    ", ".join(swept))
    return swept


def probe(folder: epath.Path, size: int) -> None:
    """Writes a little into `folder`, to find out before all processes begin to save together.

    Args:
        folder: of checkpoints; made if it is new.
        size: bytes that this process is about to write.

    Raises:
        OSError: that will not do.
    """
    if "://" in os.fspath(folder):
        return  # a bucket is never full; whether it answers, only the write itself shows
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free, {size:,} are needed", str(folder))
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())


def remove(directory: epath.Path) -> None:
    """Deletes a checkpoint so that a kill in the middle leaves no half of one."""
    if storage.is_remote(directory):
        storage.remove(directory / manifests.COMMITTED)
        storage.remove_tree(directory)
        return
    if directory.exists():
        doomed = directory.parent / f"{directory.name}.deleted{_TEMPORARY}"
        doomed.rmtree(missing_ok=True)
        directory.rename(doomed)
        doomed.rmtree(missing_ok=True)


def is_pinned(directory: epath.Path) -> bool:
    """Whether the user wants a checkpoint kept, whatever the rules of keeping say."""
    return storage.exists(directory / PINNED)


def set_aside(directory: epath.Path, reason: str) -> str:
    """Renames a checkpoint so that it is none any more; returns its new name."""
    if storage.is_remote(directory):  # a rename would copy every byte
        marker = f"{manifests.FILE_NAME}.{reason}"
        storage.write_text(directory / marker, "")
        storage.remove(directory / manifests.COMMITTED)
        return f"{directory.name} with {marker}"
    number, name = 1, f"{directory.name}.{reason}"
    while (directory.parent / name).exists():
        number += 1
        name = f"{directory.name}.{reason}-{number}"
    directory.rename(directory.parent / name)
    return name


def remove_set_aside(folder: epath.Path) -> None:
    """Deletes what `set_aside` renamed, but for what is pinned."""
    for name in storage.names(folder):
        is_one = re.fullmatch(rf"\d+\.({DAMAGED}|{ABANDONED})(-\d+)?", name) or (
            storage.is_remote(folder) and re.fullmatch(r"\d+", name)
            and _set_aside_as(folder / name))
        if is_one and not is_pinned(folder / name):
            remove(folder / name)


def _set_aside_as(directory: epath.Path) -> bool:
    """Whether `set_aside` was called for a folder of an object store."""
    return (not manifests.exists(directory)
            and any(name.startswith(f"{manifests.FILE_NAME}.")
                    for name in storage.names(directory)))


def verify_together(place: epath.Path, checksums: bool) -> Manifest:
    """`manifest.verify` in process 0; all processes agree with what it finds.

    Raises:
        DamagedCheckpoint: in every process.
    """
    found: Manifest | DamagedCheckpoint | None = None
    try:
        # The bytes are read once; that it can reach the files each process finds out for itself.
        found = manifests.verify(place, checksums) if is_primary() else manifests.read(place)
    except DamagedCheckpoint as damage:
        found = damage
    if any_process(isinstance(found, DamagedCheckpoint), "checkpoint verified"):
        raise found if isinstance(found, DamagedCheckpoint) else DamagedCheckpoint(
            place, "another process says so")
    assert isinstance(found, Manifest)
    return found


def newest_good(folder: epath.Path, checksums: bool = True) -> tuple[int, Manifest] | None:
    """Returns step and manifest of the newest undamaged checkpoint, None if there are none at all.

    Args:
        folder: of checkpoints.
        checksums: compare every byte.

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    faults = []
    for step in reversed(agreed_steps_in(folder)):
        try:
            return step, verify_together(folder / str(step), checksums)
        except DamagedCheckpoint as damage:
            log.error("%s; trying the next older one", damage)
            faults.append(str(damage))
    if faults:
        raise all_damaged(folder, faults)
    return None


def all_damaged(folder: epath.Path, faults: list[str]) -> UserError:
    """The error of a folder in which no checkpoint can be used."""
    return UserError(f"every checkpoint in {folder} is damaged", got="\n       ".join(faults),
                     fix=f"restore one from a backup, or move {folder} away to start anew")


def find(path: str | os.PathLike) -> epath.Path:
    """Returns the folder of checkpoints, the single checkpoint, or the file that `path` means.

    What it is, or whether there is anything, is not asked.

    Args:
        path: MODEL_DIR, MODEL_DIR/checkpoints, either with '/latest', a checkpoint, or a file.
    """
    place = absolute(path)
    if place.name == "latest" and not storage.exists(place):
        place = place.parent
    if not manifests.exists(place) and storage.names(place / FOLDER):
        return place / FOLDER
    return place


def several_files(place: epath.Path) -> list[epath.Path]:
    """Returns the files whose paths a path that was found joins by commas; [] if it is no such."""
    words = os.fspath(place).split(",")
    if len(words) < 2 or storage.exists(place):
        return []
    files = [absolute(word.strip()) for word in words]
    for file in files:
        if not storage.is_file(file):
            raise UserError("there is no such file of parameters", got=str(file),
                            fix="paths of .npz or .safetensors files, joined by commas")
    return files


def is_ours(place: epath.Path) -> bool:
    """Whether a folder that was found is a checkpoint of ours, or one of checkpoints.

    Folders with the names of steps are not enough: those of an evaluation are called so too.
    """
    return (manifests.exists(place) or place.name == FOLDER
            or any(manifests.exists(place / str(step)) for step in steps_in(place)))
