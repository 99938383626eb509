"""The supervisor with real children: what is restarted, what is given up, what is passed on."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from helpers import ROOT

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from started import started

from vishwam_t5x.launching import supervise

FAST = ("--backoff=0.01", "--max-backoff=0.02")
# Each child counts how often it ran in a file; what it does then is the test's.
PRELUDE = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
count = folder / "count"
runs = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(runs))
def log(step):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({{"step": step, "loss": 1.0}}) + "\\n")
"""


def child(folder, body: str) -> list[str]:
    script = folder / "child.py"
    script.write_text(PRELUDE.format(folder=str(folder)) + body)
    return [sys.executable, str(script), f'--gin.MODEL_DIR="{folder}"']


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / "supervise.py"), *arguments]


def supervised(folder, body: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*FAST, *flags, "--", *child(folder, body)), text=True,
                          capture_output=True, timeout=60, check=False)


def ledger(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "supervisor.jsonl").read_text().splitlines()]


def runs(folder) -> int:
    return int((folder / "count").read_text())


@pytest.mark.parametrize("end", ["sys.exit(75)", "sys.exit(76)", "sys.exit(137)",
                                 "os.kill(os.getpid(), signal.SIGKILL)",
                                 "os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_resumable_end_is_restarted(tmp_path, end):
    done = supervised(tmp_path, f"log(runs)\nif runs < 3: {end}\n")
    assert done.returncode == 0, done.stderr
    assert runs(tmp_path) == 3
    records = ledger(tmp_path)
    assert [record["attempt"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["restart"] for record in records] == [True, True, False]
    assert all(record["start"] <= record["end"] for record in records)
    assert records[-1]["code"] == 0 and records[0]["code"] in (75, 76, 137, 143)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_other_ends_are_not_restarted(tmp_path, code):
    done = supervised(tmp_path, f"print('out of luck', file=sys.stderr)\nsys.exit({code})\n")
    assert done.returncode == code and runs(tmp_path) == 1
    assert "  | out of luck" in done.stderr  # The tail, besides the line itself.


def test_the_users_mistake_is_never_restarted(tmp_path):
    done = supervised(tmp_path, "sys.exit(2)", "--restart-on=2")
    assert done.returncode == 2 and "no exit code to restart after" in done.stderr
    assert not (tmp_path / "count").exists()


def test_what_is_restarted_can_be_chosen(tmp_path):
    done = supervised(tmp_path, "sys.exit(3 if runs < 2 else 75)", "--restart-on=3")
    assert done.returncode == 75 and runs(tmp_path) == 2


def test_three_times_the_same_without_progress_is_the_end(tmp_path):
    done = supervised(tmp_path, "print(f'host {runs} is dead', file=sys.stderr)\nsys.exit(76)\n")
    assert done.returncode == supervise.GAVE_UP and runs(tmp_path) == 3
    assert "given up: 76 3 times in a row without progress" in done.stderr
    assert "  | host 3 is dead" in done.stderr
    assert ledger(tmp_path)[-1]["restart"] is False and ledger(tmp_path)[-1]["code"] == 76


def test_machines_that_are_taken_away_are_no_failure(tmp_path):
    """Spot machines may go before the first new step, more often than a run may fail."""
    done = supervised(tmp_path, "sys.exit({3: 76, 5: 76}.get(runs, 75 if runs < 9 else 0))")
    assert done.returncode == 0 and runs(tmp_path) == 9


def test_preemptions_do_not_hide_failures(tmp_path):
    done = supervised(tmp_path, "sys.exit(75 + runs % 2)")
    assert done.returncode == supervise.GAVE_UP and runs(tmp_path) == 5


def test_progress_begins_the_count_anew(tmp_path):
    # Two steps forward at runs 3 and 5: without them it would have ended at run 3.
    done = supervised(tmp_path, "if runs in (3, 5): log(10 * runs)\nsys.exit(76)\n")
    assert done.returncode == supervise.GAVE_UP and runs(tmp_path) == 7
    assert [record["progress"] for record in ledger(tmp_path)] == [
        False, False, True, False, True, False, False]


def test_a_new_checkpoint_is_progress(tmp_path):
    body = "(folder / 'checkpoints' / str(runs if runs < 4 else 3)).mkdir(parents=True, " \
        "exist_ok=True)\nsys.exit(76)\n"
    done = supervised(tmp_path, body)
    assert done.returncode == supervise.GAVE_UP and runs(tmp_path) == 5


def test_failing_again_where_it_failed_before_is_no_progress(tmp_path):
    """A resumed run drops the steps after its checkpoint and writes them again."""
    body = "(folder / 'metrics.jsonl').unlink(missing_ok=True)\nlog(100)\nlog(150)\nsys.exit(76)\n"
    done = supervised(tmp_path, body)
    assert done.returncode == supervise.GAVE_UP
    assert runs(tmp_path) == 3  # The first run made progress, and is the first of the three.


def test_ends_that_take_turns_are_given_up_too(tmp_path):
    done = supervised(tmp_path, "sys.exit(76 if runs % 2 else 137)", "--give-up-after=2")
    assert done.returncode == supervise.GAVE_UP and runs(tmp_path) == 6


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_is_passed_on_and_the_save_waited_for(tmp_path, sent):
    body = """
def save(*_):
    time.sleep(0.3)
    (folder / "saved").write_text("yes")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "ready").write_text("yes")
time.sleep(60)
"""
    with started(command(*FAST, "--", *child(tmp_path, body))) as run:
        run.until_there(tmp_path / "ready")
        run.process.send_signal(sent)
        assert run.wait() == 75, run.said
    assert (tmp_path / "saved").exists()
    assert runs(tmp_path) == 1  # Asked to stop is not asked to start again.
    assert "asked to stop" in ledger(tmp_path)[0]["why"]


def test_the_impatient_interrupt_and_kill(tmp_path):
    body = """
signal.signal(signal.SIGTERM, lambda *_: (folder / "term").write_text("yes"))
signal.signal(signal.SIGINT, lambda *_: (folder / "int").write_text("yes"))
(folder / "ready").write_text("yes")
while True: time.sleep(0.05)
"""
    with started(command(*FAST, "--", *child(tmp_path, body))) as run:
        run.until_there(tmp_path / "ready")
        for name in ("term", "int"):
            run.process.send_signal(signal.SIGINT)
            run.until_there(tmp_path / name)
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 128 + signal.SIGKILL


def test_a_stop_ends_the_wait_between_runs(tmp_path):
    # Longer than the deadlines here: it is the signal that ends it.
    with started(command("--backoff=500", "--max-backoff=500", "--",
                         *child(tmp_path, "sys.exit(75)"))) as run:
        run.until_said("restart in")
        run.process.terminate()
        assert run.wait() == 75 and runs(tmp_path) == 1


def test_stderr_is_passed_on_as_it_comes(tmp_path):
    with started(command("--", *child(
            tmp_path, "print('early', file=sys.stderr, flush=True)\n"
            "while not (folder / 'go').exists(): time.sleep(0.05)\n"))) as run:
        run.until_said("early\n")  # While the child still runs.
        (tmp_path / "go").write_text("")
        assert run.wait() == 0


def test_a_command_that_cannot_be_started(tmp_path):
    done = subprocess.run(command("--", str(tmp_path / "nothing")), text=True,
                          capture_output=True, check=False)
    assert done.returncode == 2 and "cannot be started" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistyped_command_makes_no_folder(tmp_path):
    folder = tmp_path / "new"
    done = subprocess.run(command("--model-dir", str(folder), "--", sys.executable, "-c",
                                  "raise SystemExit(2)"), capture_output=True, check=False)
    assert done.returncode == 2 and not folder.exists()


def test_it_needs_the_standard_library_alone(tmp_path):
    """In a Python without site-packages, from a copy of the one file."""
    copy = tmp_path / "supervise.py"
    copy.write_bytes((ROOT / "vishwam_t5x" / "launching" / "supervise.py").read_bytes())
    done = subprocess.run([sys.executable, "-I", "-S", str(copy), "--", sys.executable, "-c", ""],
                          capture_output=True, text=True, cwd=tmp_path, env={}, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words, expected", [
    (["--gin.MODEL_DIR='runs/a'"], "runs/a"),
    (["--gin.MODEL_DIR=\"runs/a\"", "--gin.MODEL_DIR=\"runs/b\""], "runs/b"),
    (["--gin_bindings=MODEL_DIR = 'gs://bucket/a'"], "gs://bucket/a"),
    (["--gin_bindings", "MODEL_DIR = 'runs/c'"], "runs/c"),
    (["--gin.MODEL_DIRECTORY='x'"], None),
])
def test_the_model_dir_is_found_in_the_command(words, expected):
    assert supervise.model_dir_of(["vishwam", "train", *words]) == expected


def test_the_wait_doubles_to_a_limit_with_jitter():
    policy = supervise.Policy(frozenset(), backoff=4.0, max_backoff=30.0)
    longest = [policy.wait_seconds(n, lambda low, high: high) for n in range(1, 6)]
    shortest = [policy.wait_seconds(n, lambda low, high: low) for n in range(1, 6)]
    assert longest == [4.0, 8.0, 16.0, 30.0, 30.0]
    assert shortest == [seconds / 2 for seconds in longest]
    assert policy.wait_seconds(10_000, lambda low, high: high) == 30.0


def test_a_ledger_in_a_bucket_keeps_its_lines(tmp_path):
    """Objects of a bucket cannot be appended to: the whole is written."""
    epath = pytest.importorskip("etils.epath")
    path = epath.Path(tmp_path) / "supervisor.jsonl"

    class Remote:
        parent = path.parent
        exists, read_text, write_text = path.exists, path.read_text, path.write_text

    for _ in range(2):
        supervise.Supervisor([sys.executable, "-c", ""], supervise.Policy(frozenset()),
                             supervise.Progress(None), Remote()).run()
    assert len(ledger(tmp_path)) == 2


def test_the_environment_is_passed(tmp_path):
    seen = tmp_path / "seen"
    code = f"import os; open({str(seen)!r}, 'w').write(os.environ['MARK'])"
    result = supervise.Supervisor(
        [sys.executable, "-c", code], supervise.Policy(frozenset()), supervise.Progress(None),
        environment={**os.environ, "MARK": "here"}).run()
    assert result == 0 and seen.read_text() == "here"


def test_what_is_being_written_to_a_bucket_is_no_progress(tmp_path):
    class Bucket:
        def __truediv__(self, name):
            return tmp_path / name

        def __str__(self):
            return "gs://bucket/run"

    written = tmp_path / "checkpoints" / "10"
    written.mkdir(parents=True)
    progress = supervise.Progress(Bucket())
    assert not progress.advanced()
    (written / "commit_success.txt").write_text("")
    assert progress.advanced() and progress.checkpoint == 10
    (tmp_path / "checkpoints" / "20").mkdir()
    assert not progress.advanced()
    assert supervise.Progress(tmp_path).advanced()  # On a disk the name itself comes last.


def test_a_bucket_that_cannot_be_read_is_said_and_does_not_end_the_run(capsys):
    class Bucket:
        """A path whose library raises errors of its own."""

        def __truediv__(self, name):
            return self

        def iterdir(self):
            raise RuntimeError("401 no login")

        open = iterdir

    progress = supervise.Progress(Bucket())
    assert not progress.advanced() and progress.step is None
    assert "401 no login" in capsys.readouterr().err
