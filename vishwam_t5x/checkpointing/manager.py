"""Checkpoints of a run: saved in the background, verified when restored, kept by rule.

A save holds the training loop for as long as it takes to order the copy from device to host.
A write that fails is reported, and the next save tries again. Of several processes it ends all, to
be resumed: the others are somewhere in the middle of it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from vishwam_t5x.checkpointing import directory as directories
from vishwam_t5x.checkpointing import manifest as manifests
from vishwam_t5x.checkpointing.local_tier import LocalTier, run_id
from vishwam_t5x.checkpointing.manifest import DamagedCheckpoint
from vishwam_t5x.checkpointing.policy import CheckpointConfig
from vishwam_t5x.checkpointing.restore import restore_state
from vishwam_t5x.checkpointing.writing import Writer, can_snapshot, snapshot
from vishwam_t5x.core import coordination, storage
from vishwam_t5x.core.coordination import process_name
from vishwam_t5x.core.distributed import any_process, barrier, is_primary
from vishwam_t5x.core.errors import PeersLost, UserError
from vishwam_t5x.core.trees import flatten_names

log = logging.getLogger(__name__)

_AGREE_EVERY = 10  # steps between questions of the time in runs of several processes


class NotBegun(OSError):
    """A save that no process has begun, since one of them could not."""


class Checkpoints:
    """The checkpoints of one run, in MODEL_DIR/checkpoints/STEP/.

    One run at a time may hold a directory: opening it removes the remains of a killed save. To read
    checkpoints of a run that may be going on, use `restore.restore_params` or `.restore_state`.
    """

    def __init__(self, folder: str | os.PathLike, config: CheckpointConfig, *,
                 clock: Callable[[], float] = time.monotonic,
                 before_commit: Callable[[], None] | None = None, tidy: bool = True) -> None:
        """Opens the folder, removing what a killed save left there.

        Args:
            folder: MODEL_DIR/checkpoints; made when the first checkpoint is saved.
            config: when to save, what to keep, how to verify.
            clock: seconds, for saving by time.
            before_commit: called in process 0, in the background, just before a checkpoint
                becomes one; if it raises, the save has failed.
            tidy: remove what other saves left there, killed or set aside; False: only add.
        """
        self.folder = directories.absolute(folder)
        self._policy, self._keep = config.policy(), config.retention()
        self._verify, self._clock, self._tidy = config.verify, clock, tidy
        self._writer = Writer(config.compress, before_commit)
        self._local: LocalTier | None = None
        if config.local_folder is not None:
            self._local = LocalTier(config.local_folder, run_id(self.folder.parent),
                                    config.local_period)
        self._local_only: int | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[bool] | None = None
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._last_step, self._last_time = 0, clock()
        self._saved: int | None = None
        self._succeeded, self._said_no_metric = True, False
        self.failed_saves = 0
        """Writes that failed since the run began."""
        self.seconds_held = 0.0
        """How long the last `save` held its caller."""
        self.restored_step: int | None = None
        """Step of the checkpoint last restored."""
        if tidy and is_primary():  # nobody waits: none writes before all begin their first save
            directories.sweep(self.folder)

    # --- saving ---

    def should_save(self, step: int) -> bool:
        """Returns whether a checkpoint is due after `step` steps; the same in every process."""
        if step <= self._last_step:
            return False
        due = self._persistent_due(step)
        # Asked for last, so that `save` knows which of the two it is.
        self._local_only = step if not due and self._local and self._local.due(step) else None
        return due or self._local_only is not None

    def _persistent_due(self, step: int) -> bool:
        elapsed = self._clock() - self._last_time
        if not self._policy.by_clock or jax.process_count() == 1:
            return self._policy.due(step, self._last_step, elapsed)
        if step % _AGREE_EVERY:  # clocks differ, and agreeing costs a message to every process
            return self._policy.due(step, self._last_step, None)
        return any_process(self._policy.due(step, self._last_step, elapsed), "save by the clock")

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> bool:
        """Saves `state` as the checkpoint of `step`, in the background.

        The state may be donated as soon as this returns. If the save before is still being
        written, it is waited for first. A checkpoint of this step saved before in this run is left.
        Never raises because of the disk; see `wait` for how it went.

        Args:
            step: steps done.
            state: pytree of jax and NumPy arrays.
            metrics: numbers by name, for keeping the best; those that are not finite never are.

        Returns:
            Whether the write has begun, or had been done.
        """
        start = time.monotonic()
        if self._local is not None and self._local_only == step:
            self._local_only = None
            self._local.save(step, flatten_names(state))
            self.seconds_held = time.monotonic() - start
            return True
        self.wait()
        waited = time.monotonic() - start
        if waited > 1.0:
            log.warning("saving step %d waited %.1f s for the save before it: saves are ordered "
                        "faster than they can be written; raise SAVE_PERIOD", step, waited)
        if step == self._saved:
            return True
        flat = flatten_names(state)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        self._look_for_best_metric(step, numbers)
        in_background = can_snapshot()
        try:
            if in_background:
                flat = snapshot(flat)
            else:
                self._begin(step, flat, numbers)
        except PeersLost:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, training goes on
            self._succeeded = False
            self._report_failure(step, error)
        else:
            self._succeeded = True
            self._writing = self._pool.submit(
                self._write, step, flat if in_background else None, numbers)
        self._last_step, self._last_time = step, self._clock()
        self.seconds_held = time.monotonic() - start
        return self._succeeded

    def wait(self) -> bool:
        """Waits until nothing is being written; returns whether the last save succeeded."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._succeeded = writing.result()
        return self._succeeded

    def close(self) -> None:
        """Waits until nothing is being written and ends the background thread."""
        self.wait()
        if self._local is not None:
            self._local.close(self._saved if self._succeeded else None)
        self._pool.shutdown()
        self._writer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look_for_best_metric(self, step: int, metrics: Mapping[str, float]) -> None:
        name = self._keep.best_metric
        if name is None or name in metrics or self._said_no_metric:
            return
        self._said_no_metric = True
        log.warning(
            "checkpoints are kept by '%s', which the one of step %d does not have (%s): it cannot "
            "be the best; let SAVE_PERIOD be a multiple of EVAL_PERIOD", name, step,
            f"only {', '.join(sorted(metrics))}" if metrics else "nothing was evaluated at this "
            "step")

    def _begin(self, step: int, flat: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        target = self.folder / str(step)
        failure: Exception | None = None
        try:
            self._prepare(target, flat)
        except Exception as error:  # noqa: BLE001 - raised again, once the others know
            failure = error
        # In Orbax's hands, one process that could not begin would leave the others waiting.
        if any_process(failure is not None, "save begun"):
            raise NotBegun(str(failure or "another process cannot write")) from failure
        self._writer.begin(target, step, flat, metrics)

    def _prepare(self, target: epath.Path, flat: Mapping[str, Any]) -> None:
        if jax.process_count() > 1:
            directories.probe(self.folder, sum(leaf.nbytes for leaf in flat.values())
                              // jax.process_count())
        if is_primary():
            if not storage.is_remote(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            directories.remove(target)  # one of another time line, or damaged
            if self.failed_saves:  # its slowest files may have come after it was swept
                directories.sweep(self.folder)

    def _write(self, step: int, flat: Mapping[str, Any] | None, metrics: Mapping[str, float]
               ) -> bool:
        """Runs in the background thread: everything from the host's memory to the disk."""
        start = time.monotonic()
        try:
            if flat is not None:
                self._begin(step, flat, metrics)
            manifest = self._writer.finish()
        except Exception as error:  # noqa: BLE001 - whatever it was, training goes on
            self._report_failure(step, error)
            return False
        self._saved = step
        if manifest is not None:
            size = sum(size for size, _ in manifest.files.values())
            log.info("checkpoint %s saved: %.1f MB in %.2f s", self.folder / str(step), size / 1e6,
                     time.monotonic() - start)
            self._metrics[step] = metrics
            if self._tidy:
                self._discard()
        return True

    def _report_failure(self, step: int, error: Exception) -> None:
        self.failed_saves += 1
        ends = jax.process_count() > 1 and not isinstance(error, NotBegun)
        if ends:
            # The others are somewhere in Orbax's barriers, whose numbers do not agree any more.
            coordination.put("lost", f"{process_name(jax.process_index())} could not write the "
                             f"checkpoint of step {step}: {error}"[:500])
        self._writer.reset()
        older: str | int = "not known"
        listed = False
        with contextlib.suppress(OSError):  # the disk may be the reason why we are here
            steps = [known for known in directories.steps_in(self.folder) if known != step]
            older, listed = steps[-1] if steps else "none", True
        log.error(
            "CHECKPOINT NOT SAVED at step %d: %s: %s\n  %s; the last checkpoint on disk is %s",
            step, type(error).__name__, error, "all processes end and can be resumed" if ends else
            "training goes on and the next save will try again", older, exc_info=error)
        # The next save sweeps too; a bucket that was away might be another process's by now.
        if is_primary() and listed and not storage.is_remote(self.folder):
            try:
                directories.sweep(self.folder)
            except OSError as left:
                log.error("what it had written could not be removed: %s", left)

    def _discard(self) -> None:
        """Deletes the checkpoints that need not be kept, in process 0."""
        try:
            steps = directories.steps_in(self.folder)
            kept = self._keep.kept({step: self._metrics_of(step) for step in steps})
            for step in steps:
                if step not in kept and not directories.is_pinned(self.folder / str(step)):
                    directories.remove(self.folder / str(step))
            directories.remove_set_aside(self.folder)
        except Exception as error:  # noqa: BLE001 - the save itself went well
            log.error("checkpoints no longer needed could not be deleted: %s", error)

    def _metrics_of(self, step: int) -> Mapping[str, float]:
        if step not in self._metrics:
            try:
                self._metrics[step] = manifests.read(self.folder / str(step)).metrics
            except DamagedCheckpoint:
                self._metrics[step] = {}
        return self._metrics[step]

    # --- restoring ---

    def all_steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, rising; the newest may be damaged."""
        return directories.steps_in(self.folder)

    def latest_step(self) -> int | None:
        """Returns the newest of `all_steps`, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the best checkpoint by the metric that is kept by; None if there is none."""
        if self._keep.best_metric is None:
            return None
        scored = {step: self._metrics_of(step) for step in self.all_steps()}
        return self._keep.best_of(scored)

    def restore(self, abstract_state: Any, step: int | None = None) -> Any | None:
        """Restores the newest good checkpoint, or that of `step`, and goes on from there.

        A damaged one is passed over for the next older one, and said. Checkpoints newer than the
        one restored are of a future that will now be another one: they are renamed, and deleted
        after the next save.

        Args:
            abstract_state: the state wanted: `jax.ShapeDtypeStruct`s with the shardings and dtypes
                to restore to; NumPy leaves are restored to the host.
            step: which one; None: the newest.

        Returns:
            The state, or None if there are no checkpoints. `restored_step` says of which step.

        Raises:
            UserError: there are only damaged ones, none of `step`, or it is of another model.
        """
        self.wait()
        steps = directories.agreed_steps_in(self.folder)
        if step is not None and step not in steps:
            raise UserError("there is no checkpoint of this step", got=step,
                            fix=f"in {self.folder}: {', '.join(map(str, steps)) or 'none'}")
        return self._restore_newest(abstract_state, steps, math.inf if step is None else step + 1)

    def restore_before(self, abstract_state: Any, step: int) -> Any | None:
        """Restores the newest good checkpoint of fewer than `step` steps; see `restore`."""
        self.wait()
        return self._restore_newest(
            abstract_state, directories.agreed_steps_in(self.folder), step)

    def _restore_newest(self, abstract_state: Any, steps: list[int], below: float) -> Any | None:
        steps = [step for step in steps if step < below]
        damaged: dict[int, str] = {}
        local = [] if self._local is None else [
            step for step in self._local.agreed_steps() if step not in steps and step < below]
        for candidate in sorted([*steps, *local], reverse=True):
            if candidate in local:
                if (state := self._restore_local(candidate, abstract_state)) is not None:
                    return state
                continue
            try:
                state = self._restore_one(candidate, abstract_state)
            except DamagedCheckpoint as damage:
                damaged[candidate] = str(damage)
                log.error("%s; trying the next older one", damage)
                continue
            self._set_aside(candidate, damaged)
            self._saved = candidate
            log.info("restored step %d from %s", candidate, self.folder / str(candidate))
            return state
        if damaged:
            raise directories.all_damaged(self.folder, list(damaged.values()))
        return None

    def _restore_local(self, step: int, abstract_state: Any) -> Any | None:
        assert self._local is not None
        wanted = flatten_names(abstract_state)
        try:
            arrays = self._local.restore(step, wanted)
        except DamagedCheckpoint as damage:
            log.warning("local checkpoint of step %d cannot be used (%s); trying an older one",
                        step, damage.why)
            return None
        self._set_aside(step, {})
        self._saved = None  # not in MODEL_DIR
        log.info("restored step %d from the local disks", step)
        return jax.tree.unflatten(jax.tree.structure(abstract_state),
                                  [arrays[name] for name in wanted])

    def _restore_one(self, step: int, abstract_state: Any) -> Any:
        return restore_state(self.folder / str(step), abstract_state, self._verify)

    def _set_aside(self, restored: int, damaged: Mapping[int, str]) -> None:
        self._last_step, self._last_time = restored, self._clock()
        self.restored_step = restored
        if self._local is not None:
            self._local.begin_line(restored)
        newer = [step for step in self.all_steps() if step > restored] if is_primary() else []
        for step in newer:
            name = directories.set_aside(
                self.folder / str(step),
                directories.DAMAGED if step in damaged else directories.ABANDONED)
            self._metrics.pop(step, None)
            log.warning("checkpoint %d is newer than the one restored: it is %s now, which will be "
                        "deleted after the next save", step, name)
        barrier("newer checkpoints set aside")
