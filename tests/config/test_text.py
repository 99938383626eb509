"""The saved configuration parses again, and two of them are compared by what they mean."""

from __future__ import annotations

import fnmatch

import pytest

from vishwam_t5x import gin_config
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.gin_differences import NOT_MATHEMATICAL, differences, math_differences

DIRECTORY = "--gin.MODEL_DIR='here'"


def test_text_parses_again_to_the_same(setup):
    first = setup.parse(DIRECTORY, "--gin.train.names=('a', 'b')", "--gin.EMB_DIM=32")
    setup.write("config.gin", first.text())
    second = setup.parse(recipe="config.gin")
    assert second.text() == first.text()
    assert second.flat() == first.flat()
    results = [config.call(setup.library.train) for config in (first, second)]
    for result in results:
        result["optimizer"] = result["optimizer"](3)
    assert results[0] == results[1]


def test_text_keeps_macros_so_that_it_can_be_overridden(setup):
    setup.write("config.gin", setup.parse(DIRECTORY).text())
    again = setup.parse("--gin.EMB_DIM=64", recipe="config.gin")
    assert again.call(setup.library.train)["model"].config.emb_dim == 64


def test_text_does_not_depend_on_the_order_of_lines(setup):
    first = setup.parse(DIRECTORY, "--gin.EMB_DIM=32", "--gin.train.names=('a',)").text()
    second = setup.parse("--gin.train.names=('a',)", "--gin.EMB_DIM=32", DIRECTORY).text()
    assert first == second


def test_flat_resolves_macros(setup):
    flat = setup.parse(DIRECTORY, "--gin.EMB_DIM=32").flat()
    library = setup.library.__name__
    assert flat["EMB_DIM"] == flat[f"{library}.ModelConfig.emb_dim"] == "32"
    assert flat[f"eval/{library}.Data.name"] == "'held out'"
    assert flat[f"{library}.train.train_data"] == f"@train/{library}.Data()"


def test_a_comparison_leaves_the_live_configuration_alone(setup):
    config = setup.parse(DIRECTORY)
    other = setup.parse(DIRECTORY, "--gin.TRAIN_STEPS=9").text()
    live = setup.parse(DIRECTORY, "--gin.TRAIN_STEPS=7")
    math_differences(config.text(), other, allowed=["all"])
    assert live.call(setup.library.train)["steps"] == 7
    assert config.call(setup.library.train)["steps"] == 5  # An older one still builds its own.


def test_equal_values_are_no_difference(setup):
    with_macro = setup.parse(DIRECTORY)
    literal = setup.parse(DIRECTORY, "--gin.ModelConfig.emb_dim=16",
                          "--gin.ModelConfig.dropout_rate=0.0")
    assert with_macro.text() != literal.text()
    assert differences(with_macro.graph, literal.graph) == []
    assert math_differences(with_macro.text(), literal.text()) == []


def test_a_difference_is_named_by_its_macro(setup):
    old, new = setup.parse(DIRECTORY), setup.parse(DIRECTORY, "--gin.EMB_DIM=32")
    (change,) = differences(old.graph, new.graph)
    assert (change.name, change.old, change.new) == ("EMB_DIM", "16", "32")
    assert change.parameters == (f"{setup.library.__name__}.ModelConfig.emb_dim",)
    with pytest.raises(UserError) as caught:
        math_differences(old.text(), new.text())
    assert "EMB_DIM: 16 -> 32" in caught.value.got
    assert "--allow_config_change=EMB_DIM" in caught.value.fix
    assert math_differences(old.text(), new.text(), ["EMB_DIM"]) == [change]


def test_a_difference_without_a_macro_is_named_by_its_parameter(setup):
    old, new = setup.parse(DIRECTORY), setup.parse(DIRECTORY, "--gin.ModelConfig.dropout_rate=0.1")
    (change,) = differences(old.graph, new.graph)
    assert change.name.endswith("ModelConfig.dropout_rate")
    assert (change.old, change.new) == ("0.0", "0.1")  # The default, then the value.
    with pytest.raises(UserError, match="dropout_rate"):
        math_differences(old.text(), new.text())
    math_differences(old.text(), new.text(), ["dropout_rate"])


def test_another_choice_is_a_difference(setup):
    old, new = setup.parse(DIRECTORY), setup.parse(DIRECTORY, "--gin.OPTIMIZER=@lion()")
    with pytest.raises(UserError) as caught:
        math_differences(old.text(), new.text())
    assert "OPTIMIZER" in caught.value.got


def test_harmless_changes_pass_and_are_told(setup):
    old = setup.parse(DIRECTORY)
    new = setup.parse("--gin.MODEL_DIR='there'")
    (change,) = math_differences(old.text(), new.text())
    assert change.name == "MODEL_DIR" and change.reason == NOT_MATHEMATICAL["*.model_dir"]


def test_a_macro_is_judged_by_everything_it_reaches(setup):
    both = setup.write("both.gin", """
        from __gin__ import dynamic_registration
        import LIBRARY
        include 'recipe.gin'
        WHERE = 'here'
        MODEL_DIR = %WHERE
        LIBRARY.Data.name = %WHERE
        """)
    old, new = setup.parse(recipe=both), setup.parse("--gin.WHERE='there'", recipe=both)
    with pytest.raises(UserError, match=r"WHERE: 'here' -> 'there'   in \S+\.Data\.name\n"):
        math_differences(old.text(), new.text())


def test_an_old_configuration_that_cannot_be_read(setup):
    new = setup.parse(DIRECTORY).text()
    old = new.replace(".ModelConfig", ".ModelConfigOfLastYear")
    with pytest.raises(UserError) as caught:
        math_differences(old, new)
    assert "allow_config_change=all" in caught.value.fix
    assert math_differences(old, new, ["all"]) == []


def test_read_text_refuses_nothing_but_names(setup):
    graph = gin_config.read_text("UNREAD = 3\n", "x.gin")
    assert graph.macros["UNREAD"].value == 3


def test_what_only_a_harmless_setting_refers_to_is_harmless(setup):
    recipe = setup.write("checkpoints.gin", """
        from __gin__ import dynamic_registration
        import LIBRARY
        include 'recipe.gin'
        MODEL_DIR = 'here'
        LIBRARY.train.checkpoint_cfg = @saving/LIBRARY.Data()
        saving/LIBRARY.Data.name = 'often'
        """)
    old = setup.parse(recipe=recipe)
    new = setup.parse("--gin.saving/Data.name='rarely'", recipe=recipe)
    (change,) = math_differences(old.text(), new.text())
    assert change.new == "'rarely'" and change.reason
    elsewhere = setup.parse("--gin.Data.name='letters'", recipe=recipe)  # Training reads it too.
    with pytest.raises(UserError, match="Data.name"):
        math_differences(old.text(), elsewhere.text())


def test_the_patterns_name_parameters_that_exist():
    """A renamed parameter must not silently begin to count as mathematics."""
    train = pytest.importorskip("vishwam_t5x.train")
    from vishwam_t5x import t5x_scripts
    from vishwam_t5x.data.source import DatasetConfig
    from vishwam_t5x.gin_graph import name_of, parameters_of
    from vishwam_t5x.models.config import EncoderDecoderConfig

    names = [f"{name_of(target)}.{parameter}"
             for target in (train.train, DatasetConfig, EncoderDecoderConfig, t5x_scripts.train)
             for parameter in parameters_of(target)]
    other_verbs = ("vishwam_t5x.", "t5x.")
    unmatched = [pattern for pattern in NOT_MATHEMATICAL if not pattern.startswith(other_verbs)
                 and not fnmatch.filter(names, pattern)]
    assert unmatched == []


def test_a_bare_model_file_is_compared_by_its_model(setup):
    text = """
        from __gin__ import dynamic_registration
        import LIBRARY
        MODEL = @LIBRARY.NAME()
        """
    files = [setup.write("old.gin", text.replace("NAME", "ModelConfig")),
             setup.write("new.gin", text.replace("NAME", "LongModelConfig"))]
    old, new = (gin_config.parse([f"--gin_file={file}"], "config") for file in files)
    (change,) = differences(old.graph, new.graph)
    assert change.name == "MODEL" and not change.reason


@pytest.mark.parametrize("flags", [
    ["--gin.MODEL/ModelConfig.emb_dim=64"],  # Hides the binding that reads EMB_DIM.
    ["--gin.OPTIMIZER=@lion()", "--gin.lion.rate=0.5"],  # Leaves adamw's settings unread.
    ["--gin.train.optimizer=@adamw()", "--gin.adamw.rate=%EMB_DIM"],
    ["--gin.Data.patch=@p/Patch()", "--gin.p/Patch.size=3", "--gin.eval/Data.lengths={'a': 1}"],
    ["--gin.train.anything={'a': (1, 2.5, None, True, 'it\\'s \"so\"', -1e-8)}"],
])
def test_whatever_was_given_parses_again(setup, flags):
    first = setup.parse(DIRECTORY, *flags)
    setup.write("config.gin", first.text())
    second = setup.parse(recipe="config.gin")
    assert second.text() == first.text() and second.flat() == first.flat()
    assert math_differences(first.text(), second.text()) == []
