"""What several processes leave out, and what ends them, is the same on all."""

from __future__ import annotations

import contextlib
import json
import types

import pytest

from vishwam_t5x import joining
from vishwam_t5x.core import distributed
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluate import _OneCheckpoint
from vishwam_t5x.evaluation import checkpoint_stream, together
from vishwam_t5x.evaluation.evaluator import TaskResult
from vishwam_t5x.evaluation.loss_evaluator import SplitSums
from vishwam_t5x.evaluation.together import LeftOut
from vishwam_t5x.evaluation_setup import Prepared


def read(number):
    if number % 3 == 0:
        raise LeftOut(f"{number} is broken", damaged=True)
    return number * 10


def test_alone_one_is_read_at_a_time_and_what_cannot_be_used_is_named():
    read_so_far = []
    found = together.read("numbers", range(5), lambda number: (
        read_so_far.append(number), read(number))[1])
    number, error = next(found)
    assert (number, error.why, error.damaged, read_so_far) == (0, "0 is broken", True, [0])
    assert [value if isinstance(value, int) else None for _, value in found] == [10, 20, None, 40]


def test_what_another_process_cannot_read_is_left_out_here_too(monkeypatch):
    monkeypatch.setattr(together.jax, "process_count", lambda: 2)
    monkeypatch.setattr(together, "refuse_together", lambda what, check: check())
    monkeypatch.setattr(together, "exchange", lambda name, mine: [
        mine, json.dumps([[1, "gone", False], [3, "3 is broken too", True]])])
    found = dict(together.read("numbers", range(5), read))
    assert found[2] == 20 and found[4] == 40
    assert found[1].why == "gone (process 1)" and not found[1].damaged
    assert found[0].why == "0 is broken" and found[3].why == "3 is broken"


def test_files_that_are_others_elsewhere_end_all_by_name(monkeypatch):
    """Of the second example the other process has read one file, then none: that is left out."""
    opened = {1: [("a.png", "3 bytes, A")], 2: [("b.png", "4 bytes, B"), ("c.wav", "5 bytes, C")]}
    said = {"files": [[["a.png", "3 bytes, A"]], [["b.png", "4 bytes, B"]]], "left out": []}
    seen = []
    monkeypatch.setattr(together.jax, "process_count", lambda: 2)
    monkeypatch.setattr(together, "refuse_together", lambda what, check: check())
    monkeypatch.setattr(together, "exchange", lambda name, mine: [
        mine, json.dumps(said[name.removeprefix("lines: ")] if json.loads(mine) else [])])

    def read_both():
        return list(together.read("lines", (1, 2), lambda number: seen.append(number) or number,
                                  lambda: opened[seen[-1]]))

    assert read_both() == [(1, 1), (2, 2)]
    said["files"][1][0][1] = "4 bytes, D"
    with pytest.raises(UserError, match="different files of one name: b.png") as error:
        read_both()
    assert "process 0: 4 bytes, B" in error.value.got and "1: 4 bytes, D" in error.value.got


def test_lines_that_cannot_be_read_here_end_all(monkeypatch):
    def lines():
        yield 1
        raise UserError("the file is gone")

    agreed = []

    def refuse_together(what, check):
        with pytest.raises(UserError) as error:
            check()
        agreed.append(what)
        raise error.value

    monkeypatch.setattr(together.jax, "process_count", lambda: 2)
    monkeypatch.setattr(together, "refuse_together", refuse_together)
    with pytest.raises(UserError, match="the file is gone"):
        list(together.read("lines", lines(), read))
    assert agreed == ["lines"]


def test_what_one_process_does_not_see_is_said_before_anything_is_read(tmp_path, monkeypatch):
    ready = object.__new__(Prepared)
    asked = []
    monkeypatch.setattr(distributed, "refuse_together", lambda what, check, seconds: (
        asked.append((what, seconds)), check()))
    with pytest.raises(UserError, match="gone"):
        ready.restore(str(tmp_path / "gone"))
    assert asked == [("checkpoint found", 1800.0)]
    # Here is a folder, and there it is a checkpoint of ours.
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(distributed, "exchange", lambda name, said: [
        said, "other " + said if "full" in name else "0"])
    with pytest.raises(UserError, match="processes differ in the checkpoint"):
        ready.restore(str(tmp_path))


def test_the_baseline_is_counted_in_process_0_alone_and_agreed_on(monkeypatch):
    one, asked = object.__new__(_OneCheckpoint), []
    one.baseline = types.SimpleNamespace(of=lambda task, split: {"unigram/text": 3.0})
    monkeypatch.setattr(distributed, "refuse_together", lambda what, check, seconds: (
        asked.append(what), check()))
    for primary, metrics in ((True, {"unigram/text": 3.0}), (False, {})):
        monkeypatch.setattr(distributed, "is_primary", lambda primary=primary: primary)
        result = TaskResult("texts", {})
        one._add_baseline(result, SplitSums())
        assert result.metrics == metrics
    assert asked == ["unigram model"] * 2


def test_several_processes_are_watched(monkeypatch):
    began = []

    @contextlib.contextmanager
    def watchdog(config, ledger):
        began.append(config)
        yield

    monkeypatch.setattr(joining, "Watchdog", watchdog)
    for joined in (False, True):
        monkeypatch.setattr(distributed, "is_joined", lambda joined=joined: joined)
        with joining.watched():
            assert len(began) == joined
    assert began[0].phase_seconds is None and began[0].peer_seconds == 60


def checkpoint(restore):
    one = object.__new__(_OneCheckpoint)
    one.ready = types.SimpleNamespace(restore=restore)
    return one


def test_a_checkpoint_is_passed_over_only_if_it_is_gone(tmp_path, monkeypatch):
    def fail(place):
        raise UserError("it cannot be read")

    here = tmp_path / "checkpoints" / "10"
    here.mkdir(parents=True)
    def break_down(place):
        raise ValueError("it cannot be decoded")

    with pytest.raises(UserError, match="it cannot be read"):
        checkpoint(fail).load(str(here), may_be_gone=True)
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "any_process", lambda flag, *name: told.append(flag) or flag)
        with pytest.raises(ValueError, match="it cannot be decoded"):
            checkpoint(break_down).load(str(here), may_be_gone=True)
    assert told == [True]
    here.rmdir()
    with pytest.raises(UserError, match="it cannot be read"):
        checkpoint(fail).load(str(here), may_be_gone=False)
    assert checkpoint(fail).load(str(here), may_be_gone=True) is None
    # Another process could not read it: this one, which could, does not go on alone.
    (tmp_path / "a.npz").write_bytes(b"")
    report = types.SimpleNamespace(path=str(tmp_path / "a.npz"))
    whole = checkpoint(lambda place: ({}, report))
    assert whole.load(str(here), may_be_gone=True)[1] is report
    monkeypatch.setattr("vishwam_t5x.core.distributed.any_process", lambda *args: True)
    assert whole.load(str(here), may_be_gone=True) is None
    here.mkdir()
    with pytest.raises(UserError, match="another process cannot read the checkpoint"):
        whole.load(str(here), may_be_gone=True)


def test_a_look_that_fails_in_process_0_fails_everywhere(monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint_stream, "refuse_together", lambda what, check: (
        asked.append(what), check()))
    checkpoint_stream.is_gone("/nowhere")
    assert asked == ["checkpoints looked at"]


@pytest.mark.parametrize(("flags", "text", "alone"), [
    ({}, "", False), ({"num_shards": "1"}, "", False), ({"num_shards": "4"}, "", True),
    ({}, "infer.infer:\n  num_shards = 4\n", True), ({}, "NUM_SHARDS = 12\n", True),
    ({}, "infer.infer.num_shards = 1\n", False)])
def test_jobs_that_share_work_do_not_join_by_themselves(monkeypatch, flags, text, alone):
    joined = []
    monkeypatch.setattr(joining.distributed, "initialize", lambda *args: joined.append(args))
    config = types.SimpleNamespace(flags=flags, text=lambda: text)
    joining.join(config)
    assert joined == ([] if alone else [(None, None, None, 300)])
    config.flags = {**flags, "coordinator_address": "h:1", "process_count": "2",
                    "process_index": "x"}
    with pytest.raises(UserError, match="--process_index must be a whole number"):
        joining.join(config)
    config.flags["process_index"] = "1"
    joining.join(config)
    assert joined[-1] == ("h:1", 2, 1, 300)
