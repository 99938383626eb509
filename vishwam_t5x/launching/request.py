"""What the user asked for: options of each place, checked, with the fix for each mistake."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

from vishwam_t5x.core.errors import UserError, did_you_mean, one_of
from vishwam_t5x.launching import presets, supervise
from vishwam_t5x.launching.presets import packaged

# Places, and what each needs and takes besides the common options.
_CLOUD = ("project", "zone", "accelerator")
PLACES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "local": ((), ("supervise",)),
    "gpu": ((), ("devices",)),
    "gpu-pair": ((), ("devices",)),
    "gpu-8": ((), ("devices",)),
    "slurm": ((), ("nodes", "gpus-per-node", "partition", "account", "time", "setup")),
    "tpu-vm": (_CLOUD, ("spot", "install", "copy", "runtime-version")),
    "tpu-pod": (_CLOUD, ("spot", "install", "copy", "runtime-version")),
    "gke": (("accelerator", "image"), ("nodes", "spot", "namespace", "context")),
    "xpk": (("cluster", *_CLOUD, "image"), ("nodes", "spot")),
    "skypilot": (("accelerator",), ("nodes", "spot", "install", "copy", "zone")),
    "docker": ((), ("extra", "image", "install", "push")),
}
COMMON = ("on", "dry-run", "name", "env", "python", "restart-on", "give-up-after")
_SWITCHES = ("dry-run", "supervise", "spot", "push")
_REPEATED = ("env", "copy")
_EXAMPLES = {"project": "my-project", "zone": "us-central2-b", "accelerator": "v4-32",
             "image": "REGISTRY/vishwam:tag", "cluster": "my-cluster"}
VERBS = ("train", "evaluate", "infer", "forward", "cache", "doctor")
# Many processes end together when one does: jax's coordination service aborts the others.
RESTART_ON_HOSTS = f"{supervise.RESTART_ON},SIGABRT"
# A tokenizer is no token.
_SECRET = re.compile(r"(?i)(token(?!iz)|secret|passw|credential|private|api_?key|access_?key)")
_GOOGLE_ZONE = r"[a-z]+-[a-z]+\d+-[a-z]"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# As in training/maintenance.py, which would load what trains.
METADATA_SERVER = "http://metadata.google.internal"


@dataclasses.dataclass(frozen=True)
class Request:
    """One `vishwam launch`.

    Attributes:
        place: where, a key of `PLACES`.
        options: single options by name, without dashes in front.
        environment: variables for the command, from --env.
        copies: files to take along, from --copy and the user's own gin files.
        verb: what to run there, e.g. 'train'.
        arguments: the verb's arguments.
        dry_run: whether only to print.
    """

    place: str
    options: Mapping[str, str]
    environment: Mapping[str, str]
    copies: tuple[str, ...]
    verb: str
    arguments: tuple[str, ...]
    dry_run: bool = False

    @property
    def name(self) -> str:
        """Of the run, on the cluster or cloud."""
        return self.options.get("name", "vishwam")

    @property
    def python(self) -> str:
        """The interpreter there; on this machine, by default, the one that runs us."""
        return self.options.get("python", sys.executable if self.place in (
            "local", "gpu", "gpu-pair", "gpu-8") else "python3")

    @property
    def google_zone(self) -> str | None:
        """--zone, where it is one of Google's."""
        zone = self.options.get("zone", "")
        return zone if re.fullmatch(_GOOGLE_ZONE, zone) else None

    @property
    def model_dir(self) -> str | None:
        """MODEL_DIR as bound on the command line, or None."""
        return supervise.model_dir_of(self.arguments)

    def number(self, option: str, default: int) -> int:
        """Returns an option that is a whole number, 1 or more.

        Raises:
            UserError: it is something else.
        """
        text = self.options.get(option, str(default))
        if not text.isdigit() or int(text) < 1:
            raise UserError(f"--{option} is a whole number, 1 or more", got=repr(text))
        return int(text)

    def supervisor_flags(self, hosts: int = 1) -> list[str]:
        """Flags of the supervisor for a run of so many processes that end together."""
        restart_on = self.options.get(
            "restart-on", RESTART_ON_HOSTS if hosts > 1 else supervise.RESTART_ON)
        return [f"--restart-on={restart_on}",
                f"--give-up-after={self.number('give-up-after', 3)}"]

    def with_preset(self, preset: str) -> Request:
        """Adds a preset of gin/hardware/ after the user's gin files, unless one is among them.

        What the user's own files say about the same is said again: the preset does not undo it. One
        that they include is theirs.
        """
        chosen = [word for word in self.gin_files() if "hardware/" in word]
        theirs = chosen or preset in self.said().hardware
        if theirs or self.verb == "doctor" or not packaged(f"gin/hardware/{preset}"):
            return self
        # In front: flags of the user's for the same thing come later, and win.
        return dataclasses.replace(self, arguments=(
            *self.said().flags(), *self.arguments, f"--gin_file=gin/hardware/{preset}"))

    def with_notice(self) -> Request:
        """Lets training ask Google's metadata server whether its machine will be taken away.

        Only where the gin files have a watchdog: else nothing would read it, which is refused.
        """
        said = self.said()
        if self.verb != "train" or not said.watched or said.asks:
            return self
        return dataclasses.replace(self, arguments=(
            f'--gin.watchdog.WatchdogConfig.metadata_server="{METADATA_SERVER}"',
            *self.arguments))

    def said(self) -> presets.Said:
        """What the gin files say that matters to a launch."""
        folders = [folder for value in self._values("gin_search_paths")
                   for folder in value.split(",") if folder]
        return presets.read(self.gin_files(), folders)

    def gin_files(self) -> list[str]:
        """The values of --gin_file, in their order."""
        return self._values("gin_file")

    def _values(self, flag: str) -> list[str]:
        words = (*self.arguments, "")
        return [after if word == f"--{flag}" else word.partition("=")[2]
                for word, after in zip(words, words[1:], strict=False)
                if word.partition("=")[0] == f"--{flag}"]


def parse(argv: Sequence[str]) -> Request:
    """Returns the request of `vishwam launch ARGV`.

    Raises:
        UserError: an option is unknown, missing or of the wrong form.
    """
    words = list(argv)
    if "--" not in words and "--push" not in words:
        raise UserError("what to run is missing",
                        fix="vishwam launch --on=PLACE [options] -- train --gin_file=FILE ...")
    split = words.index("--") if "--" in words else len(words)
    single, repeated = _options(words[:split])
    place = one_of(single.pop("on", ""), PLACES, "place (--on=PLACE)")
    command = words[split + 1:]
    command = command[1:] if command[:1] == ["vishwam"] else command
    if not command and "push" in single:
        command = ["doctor"]  # What the image does unasked; nothing is run.
    if not command:
        raise UserError("what to run is missing after --", fix="e.g. -- train --gin_file=FILE")
    verb = one_of(command[0], VERBS, "verb to launch")
    dry_run = bool(single.pop("dry-run", ""))
    _check_options(place, single, repeated)
    request = Request(place, single, _environment(repeated.get("env", [])), (), verb,
                      tuple(command[1:]), dry_run)
    return dataclasses.replace(request, copies=_copies(request, repeated.get("copy", [])))


def _options(words: Sequence[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    known = {*COMMON, *(name for need, take in PLACES.values() for name in (*need, *take))}
    single: dict[str, str] = {}
    repeated: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--") or name not in known:
            raise UserError(f"vishwam launch does not know {word.partition('=')[0]!r}", got=word,
                            fix=did_you_mean(name, known)
                            or "flags of the training go after --; see vishwam launch --help")
        if name in _SWITCHES:
            if equals:
                raise UserError(f"--{name} takes no value", got=word, fix=f"write --{name}")
            single[name] = "yes"
        elif not value:
            raise UserError(f"--{name} needs a value", fix=f"write --{name}=VALUE")
        elif name in _REPEATED:
            repeated.setdefault(name, []).append(value)
        else:
            single[name] = value
    return single, repeated


def _check_options(place: str, single: Mapping[str, str], repeated: Mapping[str, list[str]]
                   ) -> None:
    need, take = PLACES[place]
    for name in (*single, *repeated):
        if name not in (*COMMON, *need, *take):
            others = [other for other, lists in PLACES.items() if name in lists[0] + lists[1]]
            raise UserError(f"--{name} means nothing for --on={place}",
                            fix=f"leave it out; it is for {', '.join(others)}")
    missing = [name for name in need if name not in single]
    if missing:
        raise UserError(f"--on={place} needs " + ", ".join(f"--{name}" for name in missing),
                        fix=" ".join(f"--{name}={_EXAMPLES[name]}" for name in missing))
    if not _NAME.fullmatch(single.get("name", "vishwam")):
        raise UserError("--name is small letters, digits and '-', at most 40, a letter first",
                        got=repr(single["name"]))
    for name in ("project", "cluster", "namespace", "context", "partition", "account"):
        if single.get(name, "").startswith("-") or re.search(r"\s", single.get(name, "")):
            raise UserError(f"--{name} is one word", got=repr(single[name]))
    zone = single.get("zone", "a-b1-c")
    # SkyPilot has other clouds, which name their zones otherwise: us-east-1a, 1.
    if not re.fullmatch(r"[a-z0-9][-a-z0-9]*" if place == "skypilot" else _GOOGLE_ZONE, zone):
        raise UserError("--zone is a zone of the cloud, which ends in a letter", got=repr(zone),
                        fix="e.g. us-central2-b, europe-west4-a")
    if "restart-on" in single:
        try:
            supervise.parse_ends(single["restart-on"])
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--restart-on: {error}", fix="e.g. 75,76,SIGKILL") from None


def _environment(given: Sequence[str]) -> dict[str, str]:
    result = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError("--env is NAME=VALUE", got=repr(name), fix="e.g. --env=TF_CPP_MIN_LOG_"
                            "LEVEL=2")
        if _SECRET.search(name):
            # It would be printed, and written into files.
            raise UserError(f"--env does not carry secrets: {name}",
                            fix="use the secret store of the platform, or set it there by hand")
        result[name] = value
    return result


def _copies(request: Request, given: Sequence[str]) -> tuple[str, ...]:
    """The files to take along where the machine is another: --copy, and gin files of the user's."""
    if request.place not in ("tpu-vm", "tpu-pod", "skypilot"):
        return ()
    own = [name for name in request.gin_files()
           if not packaged(name) and pathlib.Path(name).is_file()]
    files = list(dict.fromkeys([*given, *own]))
    for name in files:
        if not pathlib.Path(name).is_file():
            raise UserError("--copy names no file", got=name)
        if os.path.isabs(name) or ".." in pathlib.PurePath(name).parts:
            raise UserError("a file that is copied is named from the current folder down",
                            got=name, fix="go to its folder, and name it from there")
    return tuple(files)


def check_shared_model_dir(request: Request, why: str) -> None:
    """Checks that MODEL_DIR is in a bucket, where no machine's disk will do.

    Raises:
        UserError: it is not, or is not given.
    """
    if request.verb != "doctor" and not (request.model_dir or "").startswith("gs://"):
        raise UserError(f"MODEL_DIR must be in a bucket: {why}", got=request.model_dir,
                        fix="--gin.MODEL_DIR='\"gs://BUCKET/FOLDER\"'")
