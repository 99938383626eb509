"""T5X's spelling of the command line, and what becomes of slips in it."""

from __future__ import annotations

import pytest

from vishwam_t5x.command_line import CommandLine
from vishwam_t5x.core.errors import UserError


def test_every_spelling():
    line = CommandLine.split(
        ["--gin_file=a.gin", "--gin_file", "b.gin", "--gin.X='x=y'", "--gin_bindings=Y = 2",
         "--gin_bindings", "s/M.z=3", "--gin_search_paths=p,q", "--allow_config_change=A,B",
         "--checkpoint=c", "--all", "one"], "infer", ("checkpoint", "all"), positional=1)
    assert line.files == ["a.gin", "b.gin"]
    assert [binding for _, binding in line.bindings] == ["X = 'x=y'", "Y = 2", "s/M.z = 3"]
    assert line.search_paths == ["p", "q"] and line.allowed == ["A", "B"]
    assert line.flags == {"checkpoint": "c", "all": ""} and line.positional == ["one"]


@pytest.mark.parametrize("value", ["runs/x", "/tmp/x", "bfloat16", "~/x", "nan", "gs://bucket/x"])
def test_a_string_without_quotes_is_told_how_to_be_quoted(value):
    with pytest.raises(UserError) as caught:
        CommandLine.split([f"--gin.MODEL_DIR={value}"], "train")
    assert f"--gin.MODEL_DIR='\"{value}\"'" in caught.value.fix


@pytest.mark.parametrize("value", ["1", "-1", "1e-3", "0.5", "True", "None", "'x'", '"x"', "%A",
                                   "@f()", "@a.b/c.d()", "{'a': 1}", "(1, 2)", "[]", "%a/B"])
def test_gin_values_pass(value):
    assert CommandLine.split([f"--gin.X={value}"], "train").bindings[0][1] == f"X = {value}"


@pytest.mark.parametrize(("argv", "words"), [
    (["--gin_fle=a.gin"], "'gin_file'"),
    (["--gin.X"], "--gin.NAME=VALUE"),
    (["--gin.X", "=", "3"], "--gin.NAME=VALUE"),
    (["--gin.X="], "--gin.NAME=VALUE"),
    (["--gin_file"], "--gin_file=VALUE"),
    (["recipe.gin"], "--gin_file=recipe.gin"),
    (["-x"], "--help"),
])
def test_slips(argv, words):
    with pytest.raises(UserError) as caught:
        CommandLine.split(argv, "train")
    assert words in caught.value.fix


def test_bindings_come_after_all_files_in_their_order(setup):
    late = setup.write("late.gin", "TRAIN_STEPS = 1\n")
    config = setup.parse("--gin.TRAIN_STEPS=2", "--gin_bindings=TRAIN_STEPS = 3",
                         f"--gin_file={late}", "--gin.MODEL_DIR='x'")
    assert config.call(setup.library.train)["steps"] == 3
    assert [file.rpartition("/")[2] for file in config.files] == ["recipe.gin", "late.gin"]


def test_flags_of_the_verb(setup):
    config = setup.parse("--checkpoint=c", "--gin.MODEL_DIR='x'", "--allow_config_change=A",
                         flags=("checkpoint",))
    assert config.flags == {"checkpoint": "c"} and config.allowed == {"A"}


def test_a_value_is_never_run_as_python(setup):
    marker = setup.folder / "ran"
    with pytest.raises(UserError):
        setup.parse(f"--gin.TRAIN_STEPS=open({str(marker)!r}, 'w').close()")
    with pytest.raises(UserError):
        setup.parse("--gin.TRAIN_STEPS=2 + 3")
    assert not marker.exists()


@pytest.mark.parametrize(("line", "words"), [
    ("TRAIN_STEPS = foo", 'TRAIN_STEPS = "foo"'),
    ("TRAIN_STEPS 3", "NAME = VALUE"),
    ("TRAIN_STEPS = (1,", "NAME = VALUE"),
    ("TRAIN_STEPS = ", "NAME = VALUE"),
    ("TRAIN_STEPS = 'a", "NAME = VALUE"),
    ("    TRAIN_STEPS = = 3", "NAME = VALUE"),
])
def test_a_file_that_is_no_gin(setup, line, words):
    setup.write("bad.gin", f"include 'recipe.gin'\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        setup.parse(recipe="bad.gin")
    assert words in caught.value.fix and "bad.gin:3" in caught.value.problem


def test_an_error_in_an_imported_module_is_not_blamed_on_gin(setup):
    (setup.folder / "broken_module.py").write_text("def broken(:\n")
    setup.write("more.gin", "from __gin__ import dynamic_registration\nimport broken_module\n")
    with pytest.raises(SyntaxError, match="invalid syntax"):
        setup.parse(recipe="more.gin")
