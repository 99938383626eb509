"""MODEL_DIR: where it may be, and that one process at a time trains into it."""

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
        from vishwam_t5x.core.errors import UserError
        from vishwam_t5x.training.run_dir import RunDir
        try:
            with RunDir.open({str(tmp_path)!r}).held():
                print("mine")
        except UserError as error:
            print(error.problem)
        """
    with run_dir.held():
        assert "another process" in helpers.run_python(other)
    assert "mine" in helpers.run_python(other)


def test_terminal_shows_few_numbers(capsys):
    TerminalWriter(10, 0).write(3, {"eval/loss": 1.0, "eval/loss/text": 2.0, "z_loss": 3.0,
                                    "eval/loss/some_task/text": 4.0, "eval/accuracy/text": 5.0})
    assert capsys.readouterr().err.strip() == "step 3/10  eval/loss 1  eval/loss/text 2"
