"""Where gin files are found."""

from __future__ import annotations

import pytest

from vishwam_t5x import gin_config, gin_files
from vishwam_t5x.core.errors import UserError


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_order_of_the_search(tmp_path, monkeypatch):
    given, here, installed = tmp_path / "given", tmp_path / "here", tmp_path / "gin_files"
    monkeypatch.chdir(write(here / "x").parent)
    monkeypatch.setattr(gin_files, "INSTALLED", installed)
    monkeypatch.setattr(gin_files, "checkout", lambda: None)
    paths = gin_files.search_paths([given])
    third = write(installed / "models" / "tiny.gin")
    assert gin_files.find("gin/models/tiny.gin", paths) == third
    second = write(here / "gin" / "models" / "tiny.gin")
    assert gin_files.find("gin/models/tiny.gin", paths) == second
    first = write(given / "gin" / "models" / "tiny.gin")
    assert gin_files.find("gin/models/tiny.gin", paths) == first
    assert gin_files.find(second, paths) == second
    assert gin_files.available(paths) == ["gin/models/tiny.gin"]


def test_unknown_file_lists_folders_and_near_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "gin" / "recipes" / "quickstart.gin")
    for name in ("gin/recipes/quikstart.gin", "quickstart.gin", "gin/runs/quickstart.gin"):
        with pytest.raises(UserError) as caught:
            gin_files.find(name, gin_files.search_paths())
        assert str(tmp_path) in caught.value.got
        assert "'gin/recipes/quickstart.gin'" in caught.value.fix
    with pytest.raises(UserError, match="gin_search_paths"):
        gin_files.find("zzzzz.gin", [tmp_path])


def test_include_uses_the_search_path(setup):
    write(setup.folder / "elsewhere" / "gin" / "more.gin", "TRAIN_STEPS = 8\n")
    setup.write("main.gin", "include 'recipe.gin'\ninclude 'gin/more.gin'\nMODEL_DIR = 'x'\n")
    with pytest.raises(UserError, match="gin/more.gin"):
        setup.parse(recipe="main.gin")
    config = setup.parse("--gin_search_paths=elsewhere", recipe="main.gin")
    assert config.call(setup.library.train)["steps"] == 8


def test_hardware_need_not_be_chosen():
    """With no file of gin/hardware the mesh is that of the devices at hand."""
    config = gin_config.parse(
        ["--gin_file=gin/runs/pretrain.gin", "--gin_file=gin/models/tiny.gin",
         "--gin_file=gin/optimizers/adafactor.gin", "--gin_file=gin/objectives/ul2_text.gin",
         '--gin.MODEL_DIR="x"', '--gin.MIXTURE_OR_TASK_NAME="a"', "--gin.BATCH_SIZE=4",
         "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 64}", "--gin.TRAIN_STEPS=4"],
        "train")
    assert config.flat()["vishwam_t5x.train.train.mesh"] == "None"
