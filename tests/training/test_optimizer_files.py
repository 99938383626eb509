"""Every file in gin/optimizers builds the optimizer it speaks of."""

import pathlib

import numpy as np
import pytest

import helpers
from vishwam_t5x import gin_config, train
from vishwam_t5x.training import optimizers
from vishwam_t5x.training.optimizer_families import OptaxOptimizer
from vishwam_t5x.training.optimizer_groups import OptimizerGroups

FILES = {
    "adafactor": (optimizers.Adafactor, {"beta1": None, "global_norm_clip": None}, 1e-2),
    "adafactor_constant": (optimizers.Adafactor, {"beta1": None}, 1e-3),
    "adafactor_unified_io2": (optimizers.Adafactor, {
        "beta1": 0.9, "global_norm_clip": 1.0, "skip_nan_updates": True, "decay_rate": 0.8}, 1e-2),
    "adafactor_groups": (OptimizerGroups, {"groups": (("^encoder/", None),)}, 1e-2),
    "adamw": (optimizers.AdamW, {"b2": 0.98, "global_norm_clip": 1.0}, 7e-5),
    "lion": (optimizers.Lion, {"b2": 0.99, "global_norm_clip": 1.0}, 7e-5),
    "optax": (OptaxOptimizer, {"name": "adam", "settings": {}, "global_norm_clip": 1.0}, 7e-5),
    "sgd": (optimizers.SGD, {"momentum": 0.9, "global_norm_clip": 1.0}, 7e-5),
}


def test_all_files_are_here():
    files = pathlib.Path(helpers.ROOT, "gin", "optimizers").glob("*.gin")
    assert {file.stem for file in files} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_builds(name):
    kind, fields, peak = FILES[name]
    arguments = ["--gin_file=gin/recipes/quickstart_cpu.gin",
                 f"--gin_file=gin/optimizers/{name}.gin", "--gin.TRAIN_STEPS=600"]
    if not name.startswith("adafactor"):
        arguments.append("--gin.LEARNING_RATE=7e-5")
    config = gin_config.parse(arguments, "train", flags=train.FLAGS)
    optimizer = config.arguments(train.train)["optimizer"]
    assert type(optimizer) is kind
    found = {field: getattr(optimizer, field) for field in fields}
    assert found == fields
    np.testing.assert_allclose(max(float(optimizer.schedule(step)) for step in range(0, 600, 50)),
                               peak, rtol=1e-5)
    optimizer.build()


def test_groups_and_settings_in_gin():
    config = gin_config.parse([
        "--gin_file=gin/recipes/quickstart_cpu.gin",
        "--gin_file=gin/optimizers/adafactor_groups.gin", "--gin.TRAIN_STEPS=600",
        "--gin.OPTIMIZER_GROUPS=(('^encoder/', None), ('^decoder/', 0.1), "
        "('embedding$', @optimizers.AdamW()))",
        "--gin.optimizers.AdamW.learning_rate=2e-3",
        "--gin.optimizers.Adafactor.multiply_by_parameter_scale=@optimizers.HParamMap()",
        "--gin.optimizers.HParamMap.rules=(('scale$', False), ('.*', True))",
    ], "train", flags=train.FLAGS)
    found = config.arguments(train.train)["optimizer"]
    assert [treatment for _, treatment in found.groups[:2]] == [None, 0.1]
    assert isinstance(found.groups[2][1], optimizers.AdamW)
    assert found.groups[2][1].learning_rate == 2e-3
    assert found.default.multiply_by_parameter_scale["encoder/encoder_norm/scale"] is False
    assert found.frozen("encoder/encoder_norm/scale") and not found.frozen("decoder/x")
