"""What `evaluate` and `infer` set up alike: shapes, devices, the generator, restored parameters."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from absl import logging
from jax.sharding import Mesh

from vishwam_t5x.core import coordination, distributed, storage
from vishwam_t5x.core.batch import BatchSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import source
from vishwam_t5x.data.source import DatasetConfig
from vishwam_t5x.evaluation import restoring
from vishwam_t5x.evaluation.generator import DecodingConfig, Generator
from vishwam_t5x.evaluation.inference import Source, facts_of
from vishwam_t5x.evaluation.loss_evaluator import without_augmentation
from vishwam_t5x.evaluation.options import OptionScoring
from vishwam_t5x.parallelism import mesh as mesh_lib
from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
from vishwam_t5x.training import compilation, setup

if TYPE_CHECKING:
    from vishwam_t5x.checkpointing.restore import RestoreReport

Made = TypeVar("Made")
CACHE_FILLED = 24 * 3600.0
"""Seconds that a process waits for the slowest to have its caches."""
_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model that is ready to write, but for its parameters.

    Attributes:
        model: Flax module.
        objective: without augmentation.
        config: the dataset, unshuffled, of the split asked for.
        spec: shapes of its batches.
        devices: the mesh.
        rules: logical axis rules.
        generator: writes.
    """

    model: Any
    objective: Any
    config: DatasetConfig
    spec: BatchSpec
    devices: Mesh
    rules: LogicalAxisRules
    generator: Generator

    def load(self, checkpoint: str | None, model_dir: str) -> tuple[Any, RestoreReport]:
        """Restores the parameters that `--checkpoint` means, on all processes or on none; see
        `evaluation.restoring`."""
        place = on_all("checkpoint named", lambda: restoring.checkpoint_place(
            checkpoint, model_dir), coordination.DEADLINE)
        return on_all("checkpoint restored", lambda: self.restore(place), coordination.DEADLINE)

    def restore(self, place: str) -> tuple[Any, RestoreReport]:
        """Restores the parameters that lie at a path; every process must call it together."""
        # First what each sees for itself: one that sees nothing would leave the others waiting.
        kind = on_all("checkpoint found", lambda: restoring.kind_of(place), coordination.DEADLINE)
        distributed.compare("the checkpoint", {place: kind}, fix="a MODEL_DIR, or a checkpoint, "
                            "on a disk that all hosts share, or in a bucket")
        params, report = restoring.load_params(self.model, place, self.devices, self.rules)
        logging.info("%s", report.table())
        return params, report


def prepare(model: Any, objective: Any, dataset_cfg: DatasetConfig, split: str | None,
            decoding: Mapping[str, DecodingConfig] | None, decode_batch_size: int,
            mesh: mesh_lib.MeshConfig | None, rules: LogicalAxisRules,
            compilation_cache_dir: str | None, options: OptionScoring = OptionScoring()
            ) -> Prepared:
    """Checks that the parts fit together and builds what needs no parameters.

    Args:
        model: Flax module.
        objective: what it was trained with.
        dataset_cfg: mixture, split and shapes.
        split: instead of that of `dataset_cfg`; None: that.
        decoding: how each modality is written; greedily those not named.
        decode_batch_size: examples written together.
        mesh: devices along each axis; None: what suits the devices at hand.
        rules: logical axis rules.
        compilation_cache_dir: as for `train`.
        options: how the best of some options is found.

    Raises:
        UserError: they do not.
    """
    compilation.enable_compilation_cache(compilation_cache_dir)
    config = dataclasses.replace(dataset_cfg, shuffle=False, split=split or dataset_cfg.split)
    objective = without_augmentation(objective)
    spec = source.batch_spec(config, objective, model=model.config)
    setup.check_modalities(model, objective, spec)
    devices = mesh_lib.make_mesh(mesh)
    logging.info("mesh: %s", mesh_lib.describe_mesh(devices))
    generator = Generator(model, devices, rules, decode_batch_size, decoding or {},
                          spec.target_capacities.get("text", spec.target_length),
                          spec.input_capacities,
                          without_text=getattr(objective, "without_text", None),
                          option_scoring=options)
    return Prepared(model, objective, config, spec, devices, rules, generator)


def checkpoint_name(report: RestoreReport) -> str:
    """Returns the step, or the name of a file of parameters."""
    return str(report.step) if report.step is not None else pathlib.Path(report.path).stem


def overrides(flags: Mapping[str, str], switches: Collection[str] = ()) -> dict[str, Any]:
    """Returns the arguments that the flags --checkpoint, --split and --tasks stand for.

    Args:
        flags: as given.
        switches: flags that need no value.

    Raises:
        UserError: a flag, any other flag, has no value.
    """
    for name in flags:
        if not flags[name] and name not in switches:
            raise UserError(f"--{name} needs a value", fix=f"write --{name}=VALUE")
    given: dict[str, Any] = {}
    if "checkpoint" in flags:
        given["checkpoint_path"] = flags["checkpoint"]
    if "split" in flags:
        given["split"] = flags["split"]
    if "tasks" in flags:
        given["tasks"] = tuple(filter(None, flags["tasks"].split(",")))
    return given


def number(flags: Mapping[str, str], name: str) -> int:
    """Returns the whole number that a flag was given.

    Raises:
        UserError: it is none.
    """
    try:
        return int(flags[name])
    except ValueError:
        raise UserError(f"--{name} must be a whole number", got=repr(flags[name])) from None


def on_all(what: str, make: Callable[[], Made], seconds: float = CACHE_FILLED) -> Made:
    """Returns what `make` makes; if it fails on one process, it does on all: see
    `core.distributed.refuse_together`."""
    made: list[Made] = []
    distributed.refuse_together(what, lambda: made.append(make()), seconds)
    return made[0]


def check_same_data(caches: Sequence[Any], files: Sequence[Source] = (),
                    vocabulary: str | None = None) -> None:
    """Refuses, on every process, examples that are not the same on all.

    Args:
        caches: of tasks.
        files: of inputs.
        vocabulary: path of a SentencePiece model; None: that of the caches.

    Raises:
        UserError: what differs, and how.
    """
    if jax.process_count() == 1:
        return
    facts = [*map(facts_of, caches), *(file.facts() for file in files)]
    if vocabulary is not None:
        digest: list[str] = []
        distributed.refuse_together("vocabulary read", lambda: digest.append(
            hashlib.sha256(storage.read_bytes(vocabulary)).hexdigest()))
        facts.append({"vocabulary": vocabulary, "sha256": digest[0]})
    distributed.compare(
        "the data", {"examples": "\n".join(json.dumps(one, sort_keys=True) for one in facts)},
        fix="give every host the same caches, vocabulary and file of inputs (on a shared disk, or "
            "copies)")


def agreed_identity(report: RestoreReport) -> str:
    """Returns `restoring.identity` of what was restored, as process 0 sees it."""
    return on_all("identity of the checkpoint", lambda: (
        restoring.identity(report.path) if distributed.is_primary() else ""))


def code_of(function: Any) -> str:
    """Returns what tells a function, or a callable object, from others: its name and arguments
    that are bound to it, and a hash of the file that it is written in."""
    if isinstance(function, functools.partial):
        return (f"{code_of(function.func)} of {described(function.args)} "
                f"{described(sorted(function.keywords.items()))}")
    plain = inspect.unwrap(function)
    inside = [described(cell.cell_contents) for cell in getattr(plain, "__closure__", None) or ()]
    what = plain if hasattr(plain, "__qualname__") else type(plain)
    if what is not plain or getattr(plain, "__self__", None) is not None:
        inside.append(described(getattr(plain, "__self__", plain)))
    try:
        source = pathlib.Path(inspect.getsourcefile(what) or "").read_bytes()
    except (OSError, TypeError):  # built in, or typed in
        source = b""
    return " ".join([f"{what.__module__}:{what.__qualname__}",
                     hashlib.sha256(source).hexdigest()[:12], *inside])


def code_of_constraints(decoding: Mapping[str, DecodingConfig]) -> dict[str, str]:
    """Returns `code_of` the functions of one's own that say what may be written, by modality."""
    return {name: code_of(config.allowed) for name, config in sorted(decoding.items())
            if callable(config.allowed)}


def described(value: Any) -> str:
    """Returns a configuration in words that are the same in another process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class Progress:
    """A bar on a terminal, a line now and then elsewhere; called as `evaluator.Progress`."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task, self._last = "", 0.0

    def __call__(self, task: str, done: int, total: int) -> None:
        """Shows that `done` of `total` (0: unknown) examples of a task are written."""
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total or None, desc=task, unit=" examples", leave=False)
            self._bar.update(done - self._bar.n)
        elif task != self._task:
            self._task, self._last = task, time.monotonic()
        elif time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            logging.info("%s: %d%s examples", task, done, f" of {total}" if total else "")

    def close(self) -> None:
        """Removes the bar, before another task."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
