"""One program on many processes: joining them, agreeing on what all must agree on, leaving."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from importlib import metadata

import jax

from vishwam_t5x.core import coordination, roll_call
from vishwam_t5x.core.coordination import DEADLINE, exchange, process_name
from vishwam_t5x.core.errors import EXIT_ABORTED, PeersLost, Preempted, Resumable, UserError

_LEAVING = 10.0  # seconds that process 0, in which the coordination service lives, stays for others
# What a step or a checkpoint is made with: another version may ask the others for other messages.
_DECIDING = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "libtpu",
             "jax-cuda12-plugin", "jax-cuda13-plugin")
_STARTERS = frozenset({"__main__", "__mp_main__", "sitecustomize", "usercustomize"})
_SHOWN = 8  # lines of a difference in a message


def initialize(coordinator_address: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, timeout_seconds: float = 300,
               heartbeat_seconds: int = 100) -> None:
    """Joins the processes of one run; does nothing for a run of a single process.

    With no arguments the cluster is looked for where jax looks (Cloud TPU, Slurm, Open MPI, GKE),
    but only if the environment names one: a laptop must not wait for a metadata server.

    Args:
        coordinator_address: 'host:port' of process 0.
        num_processes: processes in the run.
        process_id: number of this process, from 0.
        timeout_seconds: how long to wait for the others.
        heartbeat_seconds: after how long a silence jax takes a process for dead; more than
            `training.watchdog` does, which says more.

    Raises:
        UserError: some of the three are given and some are not, or there is no such process.
        PeersLost: not all came; says who is absent.
    """
    explicit = (coordinator_address, num_processes, process_id)
    # `training.signals` listens for SIGTERM; jax's own service would swallow what comes before.
    jax.config.update("jax_enable_preemption_service", False)
    found: tuple[str, int, int] | None
    if any(value is not None for value in explicit):
        found = _checked(*explicit)
    elif _cluster_is_near():
        found = coordination.detect_cluster(timeout_seconds)
        if found is None:
            jax.distributed.initialize(initialization_timeout=int(timeout_seconds),
                                       heartbeat_timeout_seconds=heartbeat_seconds)
            return
    else:
        return
    roll_call.call(*found, timeout_seconds)
    coordination.on_abort(_lost_while_joining)  # until a watchdog knows better
    jax.distributed.initialize(*found, initialization_timeout=int(max(timeout_seconds, 1)),
                               heartbeat_timeout_seconds=heartbeat_seconds)
    coordination.service()  # says now, and not in the middle of a run, that jax has changed


def _lost_while_joining() -> None:
    print("vishwam: another process was lost while the processes joined; run the same command to "
          "resume", file=sys.stderr, flush=True)
    os._exit(EXIT_ABORTED)


def _checked(address: str | None, count: int | None, index: int | None) -> tuple[str, int, int]:
    if address is None or count is None or index is None:
        raise UserError("coordinator_address, process_count and process_index go together",
                        got=f"{address}, {count}, {index}",
                        fix="give all three, or none and let the cluster be detected")
    if not 0 <= index < count:
        raise UserError("process_index counts the processes of the run from 0",
                        got=f"{index} of {count}",
                        fix=f"a number from 0 to {max(count, 1) - 1}")
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise UserError("coordinator_address is HOST:PORT of process 0", got=repr(address),
                        fix=f"--coordinator_address={address or 'HOST'}:8476")
    return address, count, index


def _cluster_is_near() -> bool:
    """Whether the environment names a cluster of several processes; asks no network."""
    # VISHWAM_CLUSTER: the hosts of a Cloud TPU slice, which a metadata server knows, not the
    # environment. The launchers set it.
    return (os.environ.get("VISHWAM_CLUSTER") == "1"
            or any(_count(name) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
            or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1)


def _count(variable: str) -> int:
    text = os.environ.get(variable, "1")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"${variable} is not the number of processes", got=repr(text),
                        fix=f"unset {variable}, or pass --coordinator_address, --process_count and "
                            "--process_index") from None


def is_primary() -> bool:
    """Whether this process writes what only one process may write."""
    return jax.process_index() == 0


def any_process(flag: bool, name: str = "any process", timeout: float = DEADLINE) -> bool:
    """Returns whether `flag` is true on any process; all processes must call it together.

    Raises:
        PeersLost: somebody did not come within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return bool(flag)
    return "1" in exchange(name, "1" if flag else "0", timeout)


def barrier(name: str, timeout: float = DEADLINE) -> None:
    """Waits until every process has arrived at the place called `name`.

    Raises:
        PeersLost: somebody did not come within `timeout` seconds.
    """
    exchange(name, timeout=timeout)


def from_primary(name: str, value: str, timeout: float = DEADLINE) -> str:
    """Returns what process 0 says, on every process; what the others say is ignored."""
    return exchange(name, value if is_primary() else "", timeout)[0]


def refuse_together(name: str, check: Callable[[], object], timeout: float = DEADLINE) -> None:
    """Runs a check that may fail on one process alone; if it fails on any, it does on all.

    Args:
        name: what is checked.
        check: raises, or not; what it returns is not looked at.
        timeout: seconds to wait for the others.

    Raises:
        Exception: what the check says here or, where it has nothing to say, that another process
            failed: a `UserError`, a `Resumable` or a `RuntimeError`, so that all end with one code.
    """
    failure: Exception | None = None
    try:
        check()
    except (Preempted, PeersLost):
        raise  # the others have been told, or are gone
    except Exception as error:  # noqa: BLE001 - raised again, once the others know
        failure = error
    found = exchange(name, "" if failure is None else f"{_kind(failure)} {failure}", timeout)
    if failure is not None:
        raise failure
    for process, said in enumerate(found):
        kind, _, text = said.partition(" ")
        if kind == "mistake":
            raise UserError(f"{process_name(process)} refuses to start", got=text,
                            fix="see its own message")
        if kind:
            raise (Resumable if kind == "passing" else RuntimeError)(
                f"{process_name(process)} cannot go on: {text}")


def _kind(error: Exception) -> str:
    if isinstance(error, Resumable):  # first: a storage that does not answer is both
        return "passing"
    return "mistake" if isinstance(error, UserError) else f"fault {type(error).__name__}:"


def compare(what: str, texts: Mapping[str, str], fix: str) -> None:
    """Refuses, on every process, to go on unless all say the same.

    Args:
        what: what is compared, for the message.
        texts: {name: text that must be equal everywhere}.
        fix: what to do about a difference.

    Raises:
        UserError: some process differs from process 0, in what and how.
    """
    if jax.process_count() == 1:
        return
    hashes = exchange(what, " ".join(hashlib.sha256(text.encode()).hexdigest()
                                     for text in texts.values()))
    odd = [process for process, value in enumerate(hashes) if value != hashes[0]]
    if not odd:
        return
    differing = [name for number, name in enumerate(texts)
                 if hashes[odd[0]].split()[number] != hashes[0].split()[number]]
    whole = exchange(f"{what}: in full", "\n".join(
        f"{name}: {line}" for name in differing for line in texts[name].splitlines()))
    ours, theirs = whole[0].splitlines(), whole[odd[0]].splitlines()
    lines = [f"process 0  {line}" for line in ours if line not in theirs] + [
        f"process {odd[0]}  {line}" for line in theirs if line not in ours]
    raise UserError(
        f"the processes differ in {what}",
        got="\n       ".join([", ".join(map(process_name, odd)) + " unlike process 0:",
                              *lines[:_SHOWN]]), fix=fix)


def code_version() -> str:
    """Returns what program this is: versions, and hashes of our source and the user's, by line."""
    root = pathlib.Path(__file__).resolve().parent.parent
    ours = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return "\n".join([*map(_version, _DECIDING), f"python {platform.python_version()}",
                      f"source {_hash(ours)}", *_of_the_user(root)])


def _of_the_user(ours: pathlib.Path) -> list[str]:
    """The modules that were loaded from neither an installed package nor Python's own library."""
    library = pathlib.Path(sysconfig.get_path("stdlib")).resolve()
    found = []
    for name, module in sorted(sys.modules.items()):
        path = pathlib.Path(getattr(module, "__file__", None) or os.devnull)
        if path.suffix == ".py" and name not in _STARTERS and path.exists():
            parents = set(path.resolve().parents)
            if not parents & {ours, library} and not {"site-packages", "dist-packages"} & set(
                    path.parts):
                found.append(f"module {name} {_hash({name: path})}")
    return found


def _hash(files: Mapping[str, pathlib.Path]) -> str:
    sources = hashlib.sha256()
    for name, path in sorted(files.items()):
        sources.update(name.encode() + path.read_bytes())
    return sources.hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} (not installed)"


def is_joined() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def leave(code: int) -> None:
    """Ends this process of several, at once.

    Without jax's own farewell, which would wait minutes for processes that may be gone. Process 0
    leaves last, if the others are quick: when it goes, the service on which they talk goes too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):  # whatever is the matter, the exit code is what counts
        index = jax.process_index()
        coordination.put(f"left/{index}", str(code))
        deadline = time.monotonic() + _LEAVING
        while index == 0 and time.monotonic() < deadline:
            if len(coordination.get_all("left")) == jax.process_count():
                time.sleep(0.2)  # the last of them is between its message and its end
                break
            time.sleep(0.05)
    os._exit(code)
