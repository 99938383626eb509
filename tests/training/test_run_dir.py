"""MODEL_DIR: where it may be, and that one process at a time trains into it."""

import contextlib
import json
import os
import threading
import time

import pytest

import helpers
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.training.run_dir import RunDir
from vishwam_t5x.training.writers import TerminalWriter


@pytest.mark.parametrize(("place", "words"), [
    ("", "MODEL_DIR is empty"), ("s3://bucket/run", "Google Cloud"), (__file__, "cannot be made")])
def test_refused(place, words):
    with pytest.raises(UserError, match=words):
        RunDir.open(place)


def test_one_process_at_a_time(tmp_path):
    run_dir = RunDir.open(tmp_path)
    other = f"""
        from vishwam_t5x.core.errors import Resumable, UserError
        from vishwam_t5x.training.run_dir import RunDir
        try:
            with RunDir.open({str(tmp_path)!r}).held(0.2):
                print("mine")
        except (UserError, Resumable) as error:
            print(type(error).__name__, error)
        """
    with run_dir.held(0.0):
        said = helpers.run_python(other)
        assert "UserError another process" in said and f"held by process {os.getpid()} on" in said
        # As from a host that is gone, or of which nothing is known.
        for sign in ({"host": "elsewhere", "process": 17, "boot": "x", "began": "1"}, None):
            (tmp_path / ".lock").write_text("" if sign is None else json.dumps(sign))
            said = helpers.run_python(other)
            assert "Resumable " in said and "still held after 0.2 s" in said
            assert ("process 17 on elsewhere" in said) == (sign is not None)
    assert "mine" in helpers.run_python(other)


def test_a_lock_that_goes_is_waited_for(tmp_path, caplog):
    run_dir = RunDir.open(tmp_path)

    def release_once_said():
        deadline = time.monotonic() + 30
        while "waiting up to" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        first.close()

    first = contextlib.ExitStack()
    first.enter_context(run_dir.held(0.0))
    (tmp_path / ".lock").write_text("{}")
    thread = threading.Thread(target=release_once_said)
    thread.start()
    with run_dir.held(60.0):
        thread.join(30)
    assert "process ? on an unknown host: waiting up to 60 s" in caplog.text


def test_terminal_shows_few_numbers(capsys):
    TerminalWriter(10, 0).write(3, {"eval/loss": 1.0, "eval/loss/text": 2.0, "z_loss": 3.0,
                                    "eval/loss/some_task/text": 4.0, "eval/accuracy/text": 5.0})
    assert capsys.readouterr().err.strip() == "step 3/10  eval/loss 1  eval/loss/text 2"
