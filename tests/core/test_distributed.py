"""Several processes agree, refuse together, and say who is missing."""

import subprocess
import sys
import textwrap

import process_groups
import pytest

import helpers
from vishwam_t5x.core import distributed
from vishwam_t5x.core.errors import UserError

PRELUDE = """
import json, os, sys
index, count, port = map(int, sys.argv[1:])
from vishwam_t5x.core import coordination, distributed
from vishwam_t5x.core.errors import PeersLost, Resumable, UserError
distributed.initialize(f"localhost:{port}", count, index, 30)
import jax
"""


def run_together(code: str, count: int = 2, env=None) -> list[str]:
    """What each process printed; they must all end well."""
    running = process_groups.start_code(
        PRELUDE + textwrap.dedent(code) + "\ndistributed.leave(0)", count=count, env=env)
    outputs = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    return [output for output, _ in outputs]


def test_exchange_compare_and_refuse():
    outputs = run_together("""
        for turn in range(3):
            assert distributed.exchange("turn", f"{index}-{turn}") == [
                f"{process}-{turn}" for process in range(count)]
        assert distributed.any_process(index == 2) and not distributed.any_process(False)
        assert distributed.from_primary("word", f"from {index}") == "from 0"
        distributed.compare("versions", {"same": "x"}, fix="none")

        def check():
            if index == 1:
                raise UserError("the disk is full", got="0 bytes")

        for do in (lambda: distributed.refuse_together("disk", check),
                   lambda: distributed.compare("settings", {
                       "a": "1\\n2", "b": f"x\\nrate {0.5 if index == 2 else 0.1}"}, fix="look")):
            try:
                do()
            except UserError as error:
                print(str(error).replace("\\n", " | "))
        for error in (OSError("no space left"), Resumable("the storage is away")):
            def check(error=error):
                if index == 0:
                    raise error
            try:
                distributed.refuse_together("place", check)
            except Exception as found:
                print(type(found).__name__, found)
        try:
            if index != 1:
                distributed.barrier("the bridge", timeout=1)
        except PeersLost as lost:
            print(lost.missing, str(lost))
        """, count=3)
    for index, output in enumerate(outputs):
        refused, differing, fault, passing, *late = output.splitlines()
        assert "the disk is full" in refused
        assert ("process 1 (" in refused) == (index != 1)
        assert "the processes differ in settings" in differing and "process 2 (" in differing
        assert "process 0  b: rate 0.1" in differing and "process 2  b: rate 0.5" in differing
        assert "a: 1" not in differing
        assert fault.startswith("RuntimeError process 0 (" if index else "OSError no space left")
        assert "no space left" in fault
        assert passing.startswith("Resumable ") and "the storage is away" in passing
        if index != 1:
            assert late[0].startswith("(1,) the bridge: process 1 (")
            assert late[0].endswith("missing (not there after 1 s)")


def test_damaged_records_are_judged_by_all_together():
    """Half of one host's records are damaged, none of the other's: both stop, with one message."""
    outputs = run_together("""
        sys.path[:0] = ["tests", "tests/data"]
        import test_packing
        from vishwam_t5x.core.batch import DataPosition
        stream = test_packing.damaged_stream(range(100), max_bad_fraction=0.002)
        position = DataPosition()
        for _ in range(3):
            batch = stream.batch(position, rows=[0, 1] if index == 0 else [])
            position = batch.plan.end
        assert (stream.num_bad > 2) == (index == 0), "no process stops by itself"
        try:
            stream.check_damage()
        except UserError as error:
            print(str(error).replace("\\n", " | "))
        """)
    assert outputs[0] == outputs[1] and "too many damaged records" in outputs[0]


def test_two_processes_of_one_number():
    port = process_groups.free_port()
    code = """
        import sys
        from vishwam_t5x.core import distributed
        from vishwam_t5x.core.errors import UserError
        try:
            distributed.initialize(sys.argv[1], 3, int(sys.argv[2]), 30)
        except UserError as error:
            print(error)
        """
    running = [subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), f"localhost:{port}", index],
        env=helpers.environment(), cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True)
        for index in "011"]
    for process in running:
        assert "two processes are number 1" in process.communicate(timeout=60)[0]


@pytest.mark.parametrize(("arguments", "problem"), [
    (("host:1", 2, None), "go together"), (("host:1", 2, 2), "from 0"),
    (("host", 2, 0), "HOST:PORT"), ((":80", 2, 0), "HOST:PORT")])
def test_wrong_addresses_and_numbers(arguments, problem):
    with pytest.raises(UserError, match=problem):
        distributed.initialize(*arguments)


def test_alone_everything_is_agreed():
    assert distributed.exchange("alone", "x") == ["x"]
    assert distributed.any_process(True) and not distributed.any_process(False)
    with pytest.raises(UserError, match="mine"):
        distributed.refuse_together("alone", lambda: (_ for _ in ()).throw(UserError("mine")))
    with pytest.raises(OSError, match="mine"):
        distributed.refuse_together("alone", lambda: (_ for _ in ()).throw(OSError("mine")))


def test_code_version_knows_the_users_modules(tmp_path, monkeypatch):
    (tmp_path / "my_own_model.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_own_model  # noqa: F401

    before = distributed.code_version()
    assert "module my_own_model " in before and "source " in before
    assert "flax " in before and "optax " in before and "module jax " not in before
    (tmp_path / "my_own_model.py").write_text("x = 2\n")
    assert distributed.code_version() != before


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_number_of_processes_that_is_none(variable, monkeypatch):
    monkeypatch.setenv(variable, "2(x3)")
    with pytest.raises(UserError, match=f"{variable} is not the number of processes"):
        distributed.initialize()
