"""What gin-config accepts in silence must be refused, with the fix."""

from __future__ import annotations

import pytest

from vishwam_t5x.core.errors import UserError

DIRECTORY = "--gin.MODEL_DIR='here'"


def refused(setup, *arguments, **keywords) -> UserError:
    with pytest.raises(UserError) as caught:
        setup.parse(*arguments, **keywords)
    assert len(str(caught.value).splitlines()) < 40  # One screen.
    return caught.value


def test_a_good_recipe_builds_what_it_says(setup):
    result = setup.parse(DIRECTORY).call(setup.library.train)
    assert result["model"] == setup.library.Net(setup.library.ModelConfig(emb_dim=16))
    assert (result["model_dir"], result["steps"]) == ("here", 5)
    assert result["optimizer"](2) == 0.02
    assert result["train_data"].name == "digits" and result["eval_data"].name == "held out"


def test_overrides_of_call_win(setup):
    assert setup.parse(DIRECTORY).call(setup.library.train, steps=7)["steps"] == 7


def test_misspelt_macro(setup):
    error = refused(setup, DIRECTORY, "--gin.EMB_DIMM=9")
    assert "EMB_DIMM" in error.problem and "'EMB_DIM'" in error.fix


def test_misspelt_macro_in_a_file_names_the_line(setup):
    name = setup.write("more.gin", "\ninclude 'recipe.gin'\nTRAIN_STEP = 3\n")
    error = refused(setup, DIRECTORY, recipe=name)
    assert "more.gin:3" in error.problem and "'TRAIN_STEPS'" in error.fix


def test_macro_read_only_by_an_unread_macro(setup):
    error = refused(setup, DIRECTORY, "--gin.ONE=1", "--gin.TWO=%ONE")
    assert "ONE" in str(error) and "TWO" in str(error) and "2 mistakes" in error.problem


def test_undefined_macro(setup):
    error = refused(setup, DIRECTORY, "--gin.train.steps=%TRAIN_STEP")
    assert "%TRAIN_STEP" in error.problem and "'TRAIN_STEPS'" in error.fix


def test_unread_binding(setup):
    error = refused(setup, DIRECTORY, "--gin.LongModelConfig.window=3")
    assert "window" in error.problem and "'ModelConfig'" not in error.problem
    assert setup.library.__name__ + ".ModelConfig" in error.fix or "ModelConfig" in error.fix


def test_binding_in_a_scope_nobody_uses(setup):
    error = refused(setup, DIRECTORY, "--gin.evl/Data.name='x'")
    assert "'evl'" in error.fix


def test_unknown_parameter(setup):
    error = refused(setup, DIRECTORY, "--gin.ModelConfig.emb_dmi=4")
    assert "'emb_dmi'" in error.problem and "'emb_dim'" in error.fix


def test_unknown_configurable_in_a_file_and_on_the_command_line(setup):
    name = setup.write("more.gin", """
        from __gin__ import dynamic_registration
        import LIBRARY
        include 'recipe.gin'
        LIBRARY.ModelConfg.emb_dim = 4
        """)
    error = refused(setup, DIRECTORY, recipe=name)
    assert "'ModelConfg'" in error.problem and "more.gin:5" in error.problem
    assert "'ModelConfig'" in error.fix
    error = refused(setup, DIRECTORY, "--gin.ModelConfg.emb_dim=4")
    assert "'ModelConfg'" in error.problem and "ModelConfig" in error.fix


def test_unknown_reference_names_its_own_line(setup):
    name = setup.write("more.gin", """
        from __gin__ import dynamic_registration
        import LIBRARY
        include 'recipe.gin'
        TRAIN_STEPS = 3

        MODEL = @LIBRARY.Nett()
        """)
    error = refused(setup, DIRECTORY, recipe=name)
    assert "more.gin:7" in error.problem and "'Net'" in error.fix


def test_module_not_imported_and_module_not_there(setup):
    name = setup.write("more.gin", """
        from __gin__ import dynamic_registration
        from vishwam_t5x.core import treees
        include 'recipe.gin'
        train.steps = 3
        treees.count = 3
        """)
    error = refused(setup, DIRECTORY, recipe=name)
    assert "'trees'" in str(error) and "'train' is not imported" in str(error)
    assert "2 mistakes" in error.problem  # The lost import is told once, not at every use.


def test_t5x_main_import_is_t5x(setup):
    name = setup.write("more.gin", """
        from __gin__ import dynamic_registration
        import __main__ as train_script
        include 'recipe.gin'
        train_script.train.steps = 3
        """)
    assert "t5x.train has no parameter 'steps'" in str(refused(setup, DIRECTORY, recipe=name))


@pytest.mark.parametrize(("flag", "expected", "fix"), [
    ("--gin.TRAIN_STEPS='600'", "int", "write 600"),
    ("--gin.TRAIN_STEPS=1e3", "int", "write 1000"),
    ("--gin.TRAIN_STEPS=True", "int", "write 1"),
    ("--gin.TRAIN_STEPS=0.5", "int", "type int"),
    ("--gin.TRAIN_STEPS=None", "int", "type int"),
    ("--gin.train.verbose=1", "bool", "bool"),
    ("--gin.ModelConfig.dtype='bfloat61'", "Literal", "'bfloat16'"),
    ("--gin.ModelConfig.sizes=[1, 2]", "tuple[int, ...]", "write (1, 2)"),
    ("--gin.ModelConfig.sizes=3", "tuple[int, ...]", "write (3,)"),
    ("--gin.ModelConfig.sizes=(1, 'x')", "tuple[int, ...]", "tuple[int, ...]"),
    ("--gin.train.names='one'", "Sequence[str]", "write ('one',)"),
    ("--gin.train.model=3", "Module", "Module"),
    ("--gin.train.model=@Net", "Module", "Net()"),
    ("--gin.train.model=@ModelConfig()", "Module", "Module"),
    ("--gin.train.optimizer=@Net()", None, None),  # A Module can be called: no mistake.
    ("--gin.train.steps=@ModelConfig()", "int", "int"),
    ("--gin.train.steps=@adamw", "int", "int"),
    ("--gin.Data.lengths={'inputs': '3'}", "Mapping[str, int]", "Mapping[str, int]"),
    ("--gin.Data.patch=@ModelConfig()", "Patch", "Patch"),
    ("--gin.train.speaker=@Speaker", "Named", "Speaker()"),
    ("--gin.train.speaker=@Data()", "Named", "Named"),
    ("--gin.train.speaker=3", "Named", "Named"),
    ("--gin.train.extras=[@ModelConfig()]", "Sequence", "Patch"),
])
def test_wrong_type(setup, flag, expected, fix):
    if expected is None:
        setup.parse(DIRECTORY, flag)
        return
    error = refused(setup, DIRECTORY, flag)
    assert "wrong type" in error.problem
    assert f"expected: {expected}" in str(error) or expected in str(error)
    assert fix in error.fix


@pytest.mark.parametrize("flag", [
    "--gin.ModelConfig.dropout_rate=0",  # An int where a float is wanted is no slip.
    "--gin.ModelConfig.sizes=(1, 2)",
    "--gin.train.names=['one', 'two']",
    "--gin.train.names=()",
    "--gin.train.anything={'a': [1, (2, 3)], 'b': None}",
    "--gin.train.optimizer=None",
    "--gin.train.optimizer=@lion",
    "--gin.train.model=@other/Net()",
    "--gin.train.steps=-3",
    "--gin.train.speaker=@Speaker()",
    "--gin.train.rate=@lion",
    "--gin.Data.lengths={'inputs': 3}",
    "--gin.train.whatever=3",  # **options takes any name.
])
def test_right_types_pass(setup, flag):
    setup.parse(DIRECTORY, flag)


def test_reference_inside_a_container(setup):
    config = setup.parse(DIRECTORY, "--gin.train.extras=[@one/Patch(), @two/Patch()]",
                         "--gin.one/Patch.size=1", "--gin.two/Patch.size=2")
    extras = config.call(setup.library.train)["extras"]
    assert [patch.size for patch in extras] == [1, 2]


def test_result_of_a_function_is_checked(setup):
    setup.parse(DIRECTORY, "--gin.train.steps=@a_number()")
    assert "Module" in str(refused(setup, DIRECTORY, "--gin.train.model=@a_number()"))


def test_required_macro(setup):
    error = refused(setup)
    assert "MODEL_DIR" in error.got and "recipe.gin:6" in error.got
    assert "--gin.MODEL_DIR='\"...\"'" in error.fix


def test_required_is_not_asked_of_another_verb(setup):
    name = setup.write("more.gin", """
        from __gin__ import dynamic_registration
        import LIBRARY
        include 'recipe.gin'
        LIBRARY.evaluate.model = %MODEL
        """)
    from vishwam_t5x import gin_config
    with pytest.raises(UserError, match="MODEL_DIR"):
        setup.parse(recipe=name, roots=[setup.library.train, setup.library.evaluate])
    reader = gin_config._read(gin_config.CommandLine([name]), [])
    from vishwam_t5x.gin_graph import Reach
    assert not Reach(reader.graph, [setup.library.evaluate]).missing
    assert "MODEL_DIR" in Reach(reader.graph, [setup.library.train]).missing


def test_parameter_without_default(setup):
    error = refused(setup, DIRECTORY, "--gin.train.anything=@Plain()")
    assert "Plain.width has no value" in error.problem and "int" in error.fix
    setup.parse(DIRECTORY, "--gin.train.anything=@Plain()", "--gin.Plain.width=3")
    setup.parse(DIRECTORY, "--gin.train.anything=@Plain")  # Whoever calls it may give the width.


def test_root_parameter_without_value_is_told_at_the_call(setup):
    name = setup.write("bare.gin", """
        from __gin__ import dynamic_registration
        import LIBRARY
        LIBRARY.train.model_dir = 'x'
        """)
    config = setup.parse(recipe=name)
    with pytest.raises(UserError, match="train.model has no value"):
        config.call(setup.library.train)


def test_refusal_by_the_library_keeps_its_parts(setup):
    config = setup.parse(DIRECTORY, "--gin.EMB_DIM=7")
    with pytest.raises(UserError) as caught:
        config.call(setup.library.train)
    assert (caught.value.problem, caught.value.got) == ("emb_dim must be even", 7)
    with pytest.raises(UserError, match="must be even"):
        config.macro("MODEL")


def test_settings_of_a_replaced_choice_are_no_mistake(setup):
    config = setup.parse(DIRECTORY, "--gin.OPTIMIZER=@lion()", "--gin.lion.rate=0.5")
    assert config.call(setup.library.train)["optimizer"](1) == -0.5
    assert "adamw" not in config.text()  # Else the text would not parse again.


def test_several_mistakes_are_shown_together(setup):
    error = refused(setup, DIRECTORY, "--gin.Data.nam='x'", "--gin.ModelConfg.emb_dim=3")
    assert "2 mistakes" in error.problem and "'name'" in str(error)
    many = refused(setup, DIRECTORY, *[f"--gin.UNREAD_{index}=1" for index in range(30)])
    assert "24 more" in str(many)


def test_include_of_itself(setup):
    name = setup.write("loop.gin", "include 'loop.gin'\n")
    assert "includes itself" in str(refused(setup, recipe=name))


def test_macro_circle_is_not_followed_forever(setup):
    setup.parse(DIRECTORY, "--gin.TRAIN_STEPS=%A_STEPS", "--gin.A_STEPS=%TRAIN_STEPS")


@pytest.mark.parametrize(("flags", "read"), [
    # A macro's value is built in a scope named after the macro, and what it builds inherits it.
    (["--gin.MODEL/ModelConfig.emb_dim=64"], lambda result: result["model"].config.emb_dim == 64),
    (["--gin.Data.patch=@Patch()", "--gin.Patch.size=1", "--gin.eval/Patch.size=2"],
     lambda result: (result["train_data"].patch.size, result["eval_data"].patch.size) == (1, 2)),
    # A longer scope sees the bindings of its beginnings.
    (["--gin.train.train_data=@a/b/Data()", "--gin.a/Data.name='of a'"],
     lambda result: result["train_data"].name == "of a"),
    # A scope of its own replaces the one around it.
    (["--gin.Data.patch=@p/Patch()", "--gin.p/Patch.size=3"],
     lambda result: result["eval_data"].patch.size == 3),
])
def test_scopes_are_followed_as_gin_follows_them(setup, flags, read):
    assert read(setup.parse(DIRECTORY, *flags).call(setup.library.train))


@pytest.mark.parametrize("flag", [
    "--gin.a/b/Data.name='x'",  # Only @a/Data() is there: a longer scope is not entered.
    "--gin.eval/Patch.size=3",  # In the scope eval, but replaced by p.
    "--gin.TRAIN_STEPS/Data.name='x'",
])
def test_scopes_that_gin_does_not_enter_are_refused(setup, flag):
    error = refused(setup, DIRECTORY, "--gin.train.train_data=@a/Data()",
                    "--gin.Data.patch=@p/Patch()", "--gin.Patch.size=1", flag)
    assert "nothing reads" in error.problem and flag.partition("=")[0] in error.problem
