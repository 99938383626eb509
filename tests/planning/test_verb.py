"""`vishwam plan` end to end, on a small recipe."""

import importlib.util
import json

import pytest

import helpers

RECIPE = helpers.ROOT / "benchmarks/t5x_size.gin"

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'vishwam_t5x[plan]'")
needs_cuda_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    and importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax's CUDA plugin is not installed: pip install 'vishwam_t5x[plan]'")


def plan(*flags, home, check=True):
    """Runs `vishwam plan` on the small recipe and returns the finished process."""
    done = helpers.vishwam("plan", f"--gin_file={RECIPE}", "--gin_bindings=MESH = None", *flags,
                           env={"HOME": str(home)})
    assert not check or done.returncode == 0, done.stderr
    return done


def figures(*flags, home):
    """Returns what `vishwam plan --json` prints."""
    return json.loads(plan("--json", *flags, home=home).stdout)

# `vishwam train` up to the compiled step, whose traced program it hashes.
TRAIN = """
import hashlib, os, sys
sys.path.insert(0, "benchmarks")
import common
from vishwam_t5x import train
from vishwam_t5x.training import compilation

class Stop(Exception): pass

lower = compilation.lower_step
def hashed(*arguments):
    lowered = lower(*arguments)
    print("HASH", hashlib.sha256(lowered.as_text().encode()).hexdigest(), flush=True)
    os._exit(0)
compilation.lower_step = hashed
common.write_text_cache({cache!r})
train.main(["--gin_file={recipe}", "--gin_bindings=MESH = None", "--gin.MODEL_DIR='{model}'",
            "--gin.CACHE_DIR='{cache}'"])
"""


def test_the_planned_program_is_the_one_that_train_compiles(tmp_path):
    planned = figures("--target=cpu:8", home=tmp_path)
    said = helpers.run_python(TRAIN.format(cache=str(tmp_path / "cache"), recipe=RECIPE,
                                           model=tmp_path / "run"), devices=8)
    assert f"HASH {planned['program']}" in said
    assert planned["mesh"] == {"replica": 1, "data": 8, "fsdp": 1, "tensor": 1}
    (gradients,) = planned["collectives"]
    assert (gradients["kind"], gradients["axes"]) == ("all-reduce", "data")
    # Every gradient is summed over the devices, and little else is sent.
    assert 1 <= gradients["operand_bytes"] / planned["bytes"]["parameters"] < 1.3
    assert planned["fits"] and planned["estimate"]["best"] is None


OPTIONS = """
import dataclasses
from vishwam_t5x import plan_worker
from vishwam_t5x.parallelism import xla_flags
from vishwam_t5x.planning import compile, targets
from vishwam_t5x.planning.program import Recipe
from vishwam_t5x.training import setup

_, recipe = plan_worker.read(["--gin_file={recipe}", "--gin_bindings=MESH = None"])
target = targets.resolve("cpu:2")
asked = []

class Lowered:
    def as_text(self): return "program"
    def compile(self, compiler_options):
        asked.append(compiler_options)
        raise SystemExit(0)

setup.compilation.lower_step = lambda *_: Lowered()
xla_flags.compiler_options = lambda devices: {{"an_option": len(devices)}}
for quick, platform in ((False, "tpu"), (True, "tpu"), (True, "cpu")):
    compile.targets.description = lambda target: ""
    compile.targets.devices = lambda target: __import__("jax").devices()
    try:
        compile.compile_recipe(recipe, dataclasses.replace(target, platform=platform), None, quick)
    except SystemExit:
        pass
print("ASKED", asked)
"""


def test_plans_are_compiled_with_the_options_of_training():
    said = helpers.run_python(OPTIONS.format(recipe=RECIPE), devices=2)
    ours, least = "'an_option': 2", "'exec_time_optimization_effort': -1.0"
    assert f"ASKED [{{{ours}}}, {{{ours}, {least}}}, {{{ours}}}]" in said


@pytest.mark.slow
def test_figures_are_remembered(tmp_path):
    first = figures("--target=cpu:1", home=tmp_path)
    again = figures("--target=cpu:1", home=tmp_path)
    other = figures("--target=cpu:1", "--gin.BATCH_SIZE=8", home=tmp_path)
    assert again["compile_seconds"] == first["compile_seconds"]
    assert other["program"] != first["program"]
    remembered = list((tmp_path / ".cache/vishwam_t5x/plans").glob("*.json"))
    assert len(remembered) == 2
    # The verdict is made anew: the memory of this machine, or our table of it, may have changed.
    for file in remembered:
        file.write_text(json.dumps({**json.loads(file.read_text()), "limit_bytes": 1,
                                    "fits": False}))
    again = figures("--target=cpu:1", home=tmp_path)
    assert again["fits"] and again["limit_bytes"] == first["limit_bytes"]
    assert again["compile_seconds"] == first["compile_seconds"]


@pytest.mark.slow
def test_a_search_ends_with_lines_to_paste(tmp_path):
    done = plan("--target=cpu:8", "--search=2", "--watch", "--no_cache", "--json=false",
                home=tmp_path)
    assert "by what was predicted" in done.stdout and "mesh.MeshConfig." in done.stdout
    assert "compiling 2 of at most 2 for cpu:8" in done.stderr
    assert "takes --gin_file=gin/hardware/cpu_8.gin too" in done.stderr
    assert not (tmp_path / ".cache/vishwam_t5x/plans").exists()


def test_mistakes_are_one_screen(tmp_path):
    for flags, said in ((["--target=tpu-v4-33"], "tpu-v4-32"), ([], "--target=tpu-v4-32"),
                        (["--target=cpu:1", "--search=x"], "--search=4"),
                        (["--target=cpu:3"], "BATCH_SIZE"),
                        (["--target=cpu:1", "--quick=maybe"], "--quick takes no value")):
        done = plan(*flags, home=tmp_path, check=False)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@needs_tpu_compiler
def test_a_tpu_that_is_not_there(tmp_path):
    planned = figures("--target=tpu-v4-8", "--quick", "--gin.PRECISION='bfloat16'",
                      home=tmp_path)
    assert planned["fits"] and planned["mesh"]["fsdp"] == 4
    assert {one["axes"] for one in planned["collectives"]} == {"fsdp"}
    assert planned["estimate"]["bound"] in ("compute", "memory", "messages")
    assert 0 < planned["estimate"]["mfu"] < 1


@needs_tpu_compiler
def test_what_does_not_fit_gets_three_remedies(tmp_path):
    flags = ("--target=tpu-v3-8", "--gin.PRECISION='bfloat16'", "--gin.BATCH_SIZE=524288",
             "--quick")
    planned = figures(*flags, home=tmp_path)
    assert not planned["fits"] and planned["bytes"]["total"] > planned["limit_bytes"]
    assert len(planned["remedies"]) == 3
    assert all(one["lines"] and one["total"] < planned["bytes"]["total"]
               for one in planned["remedies"])
    page = plan(*flags, home=tmp_path).stdout
    assert "DOES NOT FIT" in page and "REMAT = " in page


@needs_cuda_compiler
def test_a_gpu_that_is_not_there(tmp_path):
    planned = figures("--target=gtx1650", "--gin.PRECISION='auto'", home=tmp_path)
    assert planned["fits"] and planned["precision"] == "float16"
    assert planned["bytes"]["total"] > planned["bytes"]["parameters"] > 0
    assert planned["collectives"] == []
