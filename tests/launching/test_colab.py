"""launch/colab.ipynb: a valid notebook whose cells, run one after another, train on a CPU."""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import types

import pytest

from helpers import ROOT, run

NOTEBOOK = ROOT / "launch" / "colab.ipynb"
SMALL = ["--gin.TRAIN_STEPS=3", "--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=4",
         "--gin.train.eval_examples=8", "--gin.evaluate.max_examples=8"]
# IPython shows a picture; here it is looked at. Everything else is as in the notebook.
RUNNER = """
    import json, os, pathlib, sys, types
    shown = []
    display = types.ModuleType("IPython.display")
    display.Image = lambda filename: pathlib.Path(filename).read_bytes()
    display.display = shown.append
    sys.modules["IPython"] = types.ModuleType("IPython")
    sys.modules["IPython.display"] = display
    names = {"__name__": "__main__"}
    for source in json.loads(pathlib.Path("cells.json").read_text()):
        exec(compile(source, "cell", "exec"), names)
    (picture,) = shown
    assert picture.startswith(b"\\x89PNG") and len(picture) > 10_000
    """


def sources() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


def test_every_cell_is_python_and_installs_nothing_that_is_here():
    for source in sources():
        ast.parse(source)  # No shell lines: they run in Jupyter alone.
    assert "find_spec" in sources()[0] and "pip" in sources()[0]


@pytest.mark.parametrize("smi, devices, runtime, extras", [
    (0, [], "gpu", "seqio,cuda12"), (9, ["/dev/accel0"], "tpu", "seqio,tpu"),
    (None, ["/dev/vfio/0"], "tpu", "seqio,tpu"), (9, [], "cpu", "seqio")])
def test_what_the_runtime_has_decides_what_is_installed(monkeypatch, smi, devices, runtime, extras):
    ran = []

    def popen(words, **_):
        ran.append(words)
        return contextlib.nullcontext(types.SimpleNamespace(returncode=0, stdout=()))

    monkeypatch.setattr(shutil, "which", lambda name: None if smi is None else name)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=smi))
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(glob, "glob", lambda pattern: [name for name in devices
                                                       if fnmatch.fnmatch(name, pattern)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names: dict = {}
    exec(compile(sources()[0], "cell", "exec"), names)
    assert names["RUNTIME"] == runtime
    assert ran[0][-3:] == ("install", "--quiet", f"vishwam_t5x[{extras}]")


@pytest.mark.parametrize("probe, runtime, asked, said", [
    ((0, "cpu 1 cpu\n"), "gpu", None, "jax does not find the GPU"),
    ((0, "cpu 1 cpu\n"), "gpu", "cpu", ""), ((0, "cpu 1 cpu\n"), "cpu", None, ""),
    ((1, ""), "tpu", None, "no libtpu"), ((0, "tpu 1 TPU v2\n"), "tpu", None, "")])
def test_an_accelerator_that_jax_does_not_find_is_the_end(monkeypatch, probe, runtime, asked, said):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if asked:
        monkeypatch.setenv("JAX_PLATFORMS", asked)
    done = types.SimpleNamespace(returncode=probe[0], stdout=probe[1], stderr="no libtpu")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    names = {"subprocess": subprocess, "sys": sys, "os": os, "RUNTIME": runtime,
             "PACKAGE": "vishwam_t5x[x]"}
    with pytest.raises(SystemExit, match=said) if said else contextlib.nullcontext() as caught:
        exec(compile(sources()[1], "cell", "exec"), names)
    assert not said or 'fix: !pip install --upgrade "vishwam_t5x[x]"' in str(caught.value)


def test_the_steps_are_those_of_the_quickstart():
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    notebook = "\n".join(sources())
    for word in ("gin/recipes/quickstart_cpu.gin", "train", "evaluate", "runs/quickstart"):
        assert word in script and word in notebook


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_its_cells_train_and_show_the_page(tmp_path, quickstart_cache):
    changed = [source.replace("EXTRA = []", f"EXTRA = {SMALL!r}") for source in sources()]
    assert changed != sources()
    (tmp_path / "cells.json").write_text(json.dumps(changed))
    done = run(["-c", textwrap.dedent(RUNNER)], cwd=tmp_path, env=quickstart_cache, timeout=1400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "device(s) of cpu" in done.stdout and "exact_match" in done.stdout
