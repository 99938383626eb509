"""Inputs from object stores: gin files, tasks, files of inputs and what those name."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from PIL import Image

from vishwam_t5x import gin_files
from vishwam_t5x.core import storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.evaluation import input_file
from vishwam_t5x.evaluation.batch_file import read_batch
from vishwam_t5x.objectives.masking import PatchSpec


@pytest.fixture
def place(tmp_path):
    folder = f"memory://{tmp_path.name}"
    yield folder
    storage.remove_tree(folder)


def test_gin_file(place):
    from vishwam_t5x import gin_config

    run, part = f"{place}/run.gin", f"{place}/parts/part.gin"
    storage.write_text(part, "TRAIN_STEPS = 7\n")
    storage.write_text(run, f"include 'gin/recipes/quickstart_cpu.gin'\ninclude '{part}'\n"
                            "MODEL_DIR = '/tmp/x'\n")
    config = gin_config.parse([f"--gin_file={run}"], "train")
    assert config.macro("TRAIN_STEPS") == 7
    with pytest.raises(UserError, match="no gin file 'memory://"):
        gin_files.find(f"{place}/none.gin", [])
    with pytest.raises(UserError, match="in folders"):
        gin_files.search_paths([place])


def test_picture_and_recording(place):
    drawn = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(drawn, "PNG")
    storage.write_bytes(f"{place}/a.png", drawn.getvalue())
    pixels = input_file.read_picture(f"{place}/a.png", PatchSpec(4, 3), (2, 2)).pixels
    assert pixels.shape == (8, 8, 3) and pixels[..., 0].min() == 255
    recorded = io.BytesIO()
    with wave.open(recorded, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(np.array([0, 16384], "<i2").tobytes())
    storage.write_bytes(f"{place}/b.wav", recorded.getvalue())
    samples, rate = input_file.read_sound(f"{place}/b.wav")
    assert rate == 8000 and samples.tolist() == [0.0, 0.5]
    with pytest.raises(UserError, match="cannot be read"):
        input_file.read_picture(f"{place}/none.png", PatchSpec(4, 3), (2, 2))


class Reader(input_file.InputReader):
    """Says which folder it was given."""

    def example(self, fields, folder):
        return folder


def test_file_of_inputs(place):
    storage.write_bytes(f"{place}/in/lines.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n')
    reader = Reader(None, "text", None, None, {})
    assert [(line.number, line.fields, line.example)
            for line in reader.read(f"{place}/in/lines.jsonl")] == [
        (1, {"text": "a"}, f"{place}/in"), (3, {"text": "b"}, f"{place}/in")]
    with pytest.raises(UserError, match="there is none"):
        list(reader.read(f"{place}/none.jsonl"))


def test_batch(place):
    packed = io.BytesIO()
    np.savez(packed, encoder_input_tokens=np.ones((1, 4), np.int32),
             decoder_target_tokens=np.ones((1, 3), np.int32))
    storage.write_bytes(f"{place}/batch.npz", packed.getvalue())
    assert read_batch(f"{place}/batch.npz", ("text",), ("text",))[
        "targets/text/targets"].shape == (1, 3)


def test_tasks_by_path(place, run_python, tmp_path):
    # In a process of its own: SeqIO's registry is one for all. file:// is remote to the door too.
    (tmp_path / "far_tasks.py").write_text("import seqio\nFOUND = True\n")
    out = run_python(f"""
        from vishwam_t5x.data.tf import examples
        module, = examples.import_task_modules(["file://{tmp_path}/far_tasks.py"])
        print(module.__name__, module.FOUND)
        try:
            examples.import_task_modules(["file://{tmp_path}/none.py"])
        except Exception as error:
            print(error)
        """)
    assert "far_tasks True" in out and "there is no such file of tasks" in out
