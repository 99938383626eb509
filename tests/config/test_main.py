"""`vishwam`: exit codes, one screen, no traceback for a mistake of the user."""

from __future__ import annotations

import sys
import types

import pytest

import helpers
from helpers import vishwam
from vishwam_t5x import __main__ as command
from vishwam_t5x.core.errors import Preempted, UserError


def verb(monkeypatch, run) -> None:
    """Puts `run` in the place of `vishwam train`."""
    module = types.ModuleType("vishwam_t5x.train")
    module.main = run
    monkeypatch.setitem(sys.modules, "vishwam_t5x.train", module)


def raises(error):
    def run(argv):
        raise error
    return run


def test_arguments_and_exit_code_pass_through(monkeypatch):
    seen = []
    verb(monkeypatch, lambda argv: seen.append(argv) or 0)
    assert command.main(["train", "--gin_file=a.gin"]) == 0 and seen == [["--gin_file=a.gin"]]


@pytest.mark.parametrize(("error", "code", "words"), [
    (UserError("it is wrong", got=3, fix="mend it"), 2, "it is wrong\n  got: 3\n  fix: mend it"),
    (Preempted(7, "SIGTERM"), 75, "stopped at step 7"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_exit_codes(monkeypatch, capsys, error, code, words):
    verb(monkeypatch, raises(error))
    assert command.main(["train"]) == code
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown


def test_a_defect_keeps_its_traceback(monkeypatch):
    verb(monkeypatch, raises(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):  # Python prints it and exits with 1.
        command.main(["train"])


def test_a_mistake_does_not_wait_for_the_background():
    done = helpers.run(["-c", """if True:
        import sys, threading, time, types
        from vishwam_t5x import __main__ as command
        from vishwam_t5x.core.errors import BACKGROUND, UserError

        def main(argv):
            threading.Thread(target=time.sleep, args=(1000,), name=BACKGROUND + "_0").start()
            raise UserError("wrong") if argv == ["user"] else ZeroDivisionError("ours")

        sys.modules["vishwam_t5x.train"] = types.SimpleNamespace(main=main)
        sys.argv = ["vishwam", "train", *sys.argv[1:]]
        sys.exit(command.main())
        """, "user"], timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "wrong" in done.stderr


def test_no_configuration_at_all():
    done = vishwam("train")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "MODEL_DIR" in done.stderr or "model_dir" in done.stderr


def test_messages_are_ours():
    done = helpers.run(["-c", """if True:
        import logging
        from absl import logging as absl_logging
        from vishwam_t5x import screen
        screen.show_messages()
        absl_logging.info("by absl %d", 1)
        logging.getLogger("vishwam_t5x.x").info("by us")
        logging.getLogger("jax._src.xla_bridge").info("Unable to initialize backend")
        logging.getLogger("jax").warning("serious")
        """], timeout=60)
    lines = [line.split(" ", 2)[1:] for line in done.stderr.splitlines()]
    assert lines == [["INFO", "by absl 1"], ["INFO", "by us"], ["WARNING", "serious"]]


def test_tensorflow_is_quiet_and_nobody_else():
    done = helpers.run(["-c", """if True:
        import logging, os, sys
        from vishwam_t5x import screen
        screen.show_messages()
        screen.quiet_tensorflow()
        logging.info("by us")
        print("printed", file=sys.stderr)
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are\\n"
                    b"I0000 00:00:1795507923.534622   26677 port.cc:153] oneDNN is on\\n"
                    b"fatal: from C++\\n")
        os.abort()
        """], timeout=60)
    assert done.returncode == -6
    shown = sorted(line.rpartition("INFO ")[2] for line in done.stderr.splitlines())
    assert [line for line in shown if not line.startswith(("  ", "Fatal", "Current"))] == [
        "by us", "fatal: from C++", "printed"]


def test_a_cache_that_cannot_be_written():
    done = vishwam("cache", "--task_or_mixture=quickstart", "--cache_dir=/proc/nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the cache cannot be written" in done.stderr


def test_unknown_verb():
    done = vishwam("trian")
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr and not done.stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_screen(arguments, capsys):
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in command.VERBS) and len(shown.splitlines()) < 25


def test_version(capsys):
    from vishwam_t5x import __version__
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_a_reader_that_goes_away_is_no_traceback():
    import subprocess

    from helpers import ROOT, environment
    done = subprocess.run(f"{sys.executable} -m vishwam_t5x --help | true", shell=True, cwd=ROOT,
                          env=environment(), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_tensorflow_is_kept_out_of_paths(monkeypatch):
    import os
    monkeypatch.delenv("EPATH_USE_TF", raising=False)
    verb(monkeypatch, lambda argv: 0)
    command.main(["train"])
    assert os.environ["EPATH_USE_TF"] == "false"
    monkeypatch.setenv("EPATH_USE_TF", "true")  # Whoever sets it has the last word.
    command.main(["train"])
    assert os.environ["EPATH_USE_TF"] == "true"


def test_show_and_diff(setup):
    recipe = setup.write("plain.gin", "MODEL = 3\n")
    done = vishwam("config", "show", f"--gin_file={recipe}", "--flat", cwd=setup.folder)
    assert (done.returncode, done.stdout) == (0, "MODEL = 3\n"), done.stderr
    other = setup.write("other.gin", "MODEL = 4\n")
    wrong = vishwam("config", "diff", recipe, cwd=setup.folder)
    assert wrong.returncode == 2 and "OLD.gin NEW.gin" in wrong.stderr
    typo = vishwam("config", "show", f"--gin_file={other}", "--gin.MODLE=3", cwd=setup.folder)
    assert typo.returncode == 2 and "did you mean 'MODEL'?" in typo.stderr


def test_diff_marks_the_mathematics(setup, capsys):
    from vishwam_t5x import config
    recipe = """
        from __gin__ import dynamic_registration
        from vishwam_t5x.objectives import losses
        MODEL = @losses.LossConfig()
        losses.LossConfig.z_loss = Z
        """
    old = setup.write("old.gin", recipe.replace("= Z", "= 1e-4"))
    new = setup.write("new.gin", recipe.replace("= Z", "= 0.0"))
    assert config.main(["diff", old, new]) == 0
    assert capsys.readouterr().out.startswith("! vishwam_t5x.objectives.losses.LossConfig.z_loss")
    assert config.main(["diff", old, new, "--gin.losses.LossConfig.z_loss=1e-4"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    with pytest.raises(UserError, match="shw"):
        config.main(["shw"])
